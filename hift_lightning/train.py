"""The training application: test, fine-tune, test again, and tell what it took."""

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from hift_lightning.checks import check_configuration
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.classification import ClassificationModule
from hift_lightning.report import (
    collect_metrics,
    interruption_names_checkpoint,
    one_sentence_errors,
    print_table,
    write_metrics,
)
from hift_lightning.strategies import HiFTStrategy


def train(cfg: DictConfig) -> dict[str, float]:
    """Run the job that `cfg` describes.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.

    Returns:
        Flat names and numbers, as they stand in `metrics.json`.

    Raises:
        ConfigurationError: a value of the configuration cannot work.
    """
    check_configuration(cfg)
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    # what is quick to build comes first, so that a value which cannot work ends the run before weights are loaded
    trainer = instantiate(
        cfg.trainer,
        strategy=_built(cfg.strategy),
        callbacks=[instantiate(callback) for callback in cfg.callbacks.values() if callback is not None],
        logger=_built(cfg.logger),
    )
    tokenizer = instantiate(cfg.model.tokenizer)
    data = instantiate(cfg.data, tokenizer=tokenizer)
    network = instantiate(cfg.model.network, tokenizer=tokenizer)
    module = ClassificationModule(
        network, instantiate(cfg.optimizer), instantiate(cfg.get("scheduler")), cfg.data.num_classes
    )

    if isinstance(trainer.strategy, HiFTStrategy):
        trainer.strategy.check_patterns(module)

    with interruption_names_checkpoint(trainer):
        before = trainer.test(module, data, verbose=False)
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
        validated = trainer.validate(module, data, verbose=False)
        after = trainer.test(module, data, verbose=False)

    metrics = collect_metrics(trainer, before, [*validated, *after])
    write_metrics(metrics, cfg.output_dir)
    print_table(metrics, trainer, cfg.output_dir)
    return metrics


@hydra.main(version_base="1.3", config_path="pkg://hift_lightning.conf", config_name="train")
def main(cfg: DictConfig) -> float:
    """Run `train` on the command line's configuration; return what a sweep optimises."""
    with one_sentence_errors():
        metrics = train(cfg)
        if cfg.objective not in metrics:
            raise ConfigurationError(
                f"`objective={cfg.objective}` was not measured; name one of {', '.join(sorted(metrics))}."
            )
    return metrics[cfg.objective]


def _built(node: DictConfig | str | bool | None) -> object:
    """Instantiate a node, or pass on one of Lightning's own words such as `auto` or `false`."""
    return instantiate(node) if OmegaConf.is_dict(node) else node


if __name__ == "__main__":
    main()
