"""The training application: test, fine-tune, test again, and tell what it took."""

import contextlib
import os
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from hift_lightning.checkpoint_io import StreamingCheckpointIO, refuse_folder
from hift_lightning.checks import (
    check_configuration,
    check_objective,
    check_that_it_is_measured,
    check_that_the_rate_is_read,
    check_that_the_shape_is_read,
)
from hift_lightning.data import SentenceDataModule, TextDataModule
from hift_lightning.engine.compatibility import check_weights
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.architecture import check_positions
from hift_lightning.models.optimization import check_optimizer
from hift_lightning.output import alone_in, check_folders, check_writable, set_earlier_logs_aside
from hift_lightning.process_memory import PeakAnonymousMemory
from hift_lightning.processes import no_folder_of_its_own, refuse_sweep_over_processes
from hift_lightning.report import (
    best_checkpoints,
    collect_metrics,
    end_on_sigterm,
    failure_names_checkpoint,
    last_checkpoint,
    one_sentence_errors,
    print_table,
    saved_checkpoints,
    write_metrics,
)
from hift_lightning.strategies.blockwise import BlockwiseTraining
from hift_lightning.strategies.refusals import needs_gradients, not_with_fused
from hift_lightning.targets import check_command, check_targets, trusted_by_the_user

CONFIG_PATH, CONFIG_NAME = "pkg://hift_lightning.conf", "train"


def train(cfg: DictConfig, trusted_targets: Collection[str] = ()) -> dict[str, float]:
    """Run the job that `cfg` describes.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.
        trusted_targets: import paths that a `_target_` may name besides what belongs in its place; the application
            takes them from the command line.

    Returns:
        Flat names and numbers, as they stand in `metrics.json`.

    Raises:
        ConfigurationError: a value of the configuration cannot work.
    """
    choose_objective(cfg)
    check_configuration(cfg)
    check_that_it_is_measured(cfg)
    check_targets(cfg, trusted_targets)
    check_objective(cfg.objective, instantiate(cfg.model.module).func)
    check_writable("output_dir", cfg.output_dir)
    L.seed_everything(cfg.seed, workers=True, verbose=False)

    begins = _Begins()
    # what is quick to build comes first, so that a value which cannot work ends the run before weights are there
    trainer = instantiate(
        cfg.trainer,
        strategy=_built(cfg.strategy),
        callbacks=[begins, *(instantiate(callback) for callback in cfg.callbacks.values() if callback is not None)],
        logger=_built(cfg.logger),
        **({} if cfg.evaluate else {"limit_val_batches": 0}),
    )
    outline: dict[str, Any] = {}
    if cfg.ckpt_path is not None and not isinstance(trainer.strategy, ModelParallelStrategy):
        refuse_folder(Path(cfg.ckpt_path))
        if isinstance(trainer.strategy, BlockwiseTraining):
            outline = StreamingCheckpointIO.outline(cfg.ckpt_path)
    refuse_sweep_over_processes(trainer)
    if trainer.is_global_zero:
        check_folders(trainer)
    _check_fused(trainer)
    check_optimizer(instantiate(cfg.optimizer), instantiate(cfg.get("scheduler")))
    tokenizer = instantiate(cfg.model.tokenizer)
    data = instantiate(cfg.data, tokenizer=tokenizer)
    of_data = outline.get(SentenceDataModule.__qualname__)
    if of_data is not None and isinstance(data, SentenceDataModule):
        data.load_state_dict(of_data)
    _check_validation_interval(trainer, data)
    if cfg.model.pretrained is None:
        # random numbers for billions of weights take minutes, so it is built without memory once
        with torch.device("meta"):
            network = instantiate(cfg.model.network, tokenizer=tokenizer)
        _choose_group_size(cfg, trainer, _build_module(cfg, trainer, network))

    last = partial(last_checkpoint, trainer, saved_checkpoints(trainer), cfg.ckpt_path)
    alone = alone_in(cfg.output_dir) if trainer.is_global_zero else contextlib.nullcontext()
    with alone, PeakAnonymousMemory() as memory, failure_names_checkpoint(trainer, last, cfg.ckpt_path):
        if trainer.is_global_zero:
            set_earlier_logs_aside(trainer)
        module = _build_module(cfg, trainer, build_network(cfg, trainer, tokenizer))
        own_way = any(is_overridden(hook, module) for hook in ("on_load_checkpoint", "configure_model"))
        if outline and not own_way:
            check_weights(module, outline["state_dict"], module.strict_loading)
        _choose_group_size(cfg, trainer, module)
        before, after = [], []
        if cfg.evaluate:
            before = trainer.test(module, data, verbose=False)
            end_on_sigterm(trainer)
            if _takes_masters(trainer) and cfg.model.pretrained is not None:
                # testing has rounded the weights, and masters are made from what lies in the files
                module.network = torch.nn.Identity()  # its memory is given back first
                module = _build_module(cfg, trainer, build_network(cfg, trainer, tokenizer))
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path)
        end_on_sigterm(trainer)
        trained_here = not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        if cfg.ckpt_path is not None and trained_here and not begins.has_begun:
            rank_zero_warn(
                f"Nothing was left to train: `ckpt_path={cfg.ckpt_path}` is of step {trainer.global_step} and has "
                f"{trainer.current_epoch} epochs behind it; give more than `trainer.max_steps={trainer.max_steps}` and "
                f"`trainer.max_epochs={trainer.max_epochs}`."
            )
        train_loss = trainer.callback_metrics.get("train/loss")
        if cfg.evaluate:
            after = trainer.validate(module, data, verbose=False)
            end_on_sigterm(trainer)
            after = [*after, *trainer.test(module, data, verbose=False)]
            end_on_sigterm(trainer)

    metrics = collect_metrics(trainer, before, after)
    if train_loss is not None:
        metrics["train/loss"] = float(train_loss)
    if memory.peak_bytes is not None:
        metrics["memory/peak_rss_anon_bytes"] = memory.peak_bytes
    if trainer.is_global_zero:
        write_metrics(metrics, cfg.output_dir)
        print_table(metrics, last(), cfg.output_dir, best_checkpoints(trainer))
    return metrics


class _Begins(Callback):
    """Notes whether a batch has been trained on, and has data go on where the checkpoint was under every strategy."""

    has_begun = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has not done so where a schedule has asked for the number of steps, for which data were set up
        trainer.fit_loop._load_combined_loader_states()

    @override
    def on_train_batch_start(self, *args: Any) -> None:
        self.has_begun = True


def main() -> None:
    """Run the application on the command line's arguments."""
    sys.argv += no_folder_of_its_own(os.environ)
    with one_sentence_errors():
        check_command(sys.argv[1:], run, CONFIG_PATH, CONFIG_NAME)
        run()


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=CONFIG_NAME)
def run(cfg: DictConfig) -> float:
    """Run `train` on the command line's configuration; return what a sweep optimises."""
    with one_sentence_errors():
        overrides = HydraConfig.get().overrides.task
        check_that_the_rate_is_read(cfg, overrides)
        check_that_the_shape_is_read(cfg, overrides)
        metrics = train(cfg, trusted_by_the_user(cfg))
        if cfg.objective not in metrics:
            raise ConfigurationError(
                f"`objective={cfg.objective}` was not measured; name one of {', '.join(sorted(metrics))}."
            )
    return metrics[cfg.objective]


def choose_objective(cfg: DictConfig) -> None:
    """Take the training loss where the model's own objective would be, and `evaluate=false` does not measure that.

    Args:
        cfg: the composed configuration of `conf/train.yaml`, which is changed; an objective that was given stays.
    """
    if cfg.get("evaluate") is not False or not OmegaConf.is_interpolation(cfg, "objective"):
        return
    own = OmegaConf.select(cfg, "objective", throw_on_resolution_failure=False)
    if str(own).startswith(("val/", "test/")):
        cfg.objective = "train/loss"
        rank_zero_info("With `evaluate=false` the objective is `train/loss`, of which less is better.")


def build_network(cfg: DictConfig, trainer: L.Trainer, tokenizer: Any) -> Any:
    """Build the network with its weights.

    Random weights are made on the device and in the dtype of the training. Pretrained ones are loaded on the CPU in
    the dtype of the training; where masters are taken from them, in one that loses nothing of them.
    New weights, of a whole model or of a head, are the same whenever it is called.

    Args:
        cfg: the composed configuration.
        trainer: knows device and dtype.
        tokenizer: the tokenizer, or `None`.

    Raises:
        ConfigurationError: the model cannot be built.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.model.pretrained is None:
        with trainer.init_module(empty_init=False):
            return instantiate(cfg.model.network, tokenizer=tokenizer)
    with trainer.precision_plugin.tensor_init_context():
        dtype = torch.get_default_dtype()
    return instantiate(cfg.model.network, tokenizer=tokenizer, dtype=dtype, lossless=_takes_masters(trainer))


def _build_module(cfg: DictConfig, trainer: L.Trainer, network: Any) -> L.LightningModule:
    check_positions(network, cfg.data.max_length)
    module: L.LightningModule = instantiate(cfg.model.module)(
        network, instantiate(cfg.optimizer), instantiate(cfg.get("scheduler"))
    )
    if isinstance(trainer.strategy, BlockwiseTraining):
        trainer.strategy.check_patterns(module)
    return module


def _check_fused(trainer: L.Trainer) -> None:
    """Tell what the strategy would refuse after the test before training."""
    if not isinstance(trainer.strategy, BlockwiseTraining) or trainer.strategy.settings.update != "fused":
        return
    why = needs_gradients(
        trainer.gradient_clip_val,
        trainer.gradient_clip_algorithm,
        trainer.accumulate_grad_batches,
        scaled=getattr(trainer.precision_plugin, "scaler", None) is not None,
    )
    if why is not None:
        raise ConfigurationError(not_with_fused(why))


def _check_validation_interval(trainer: L.Trainer, data: L.LightningDataModule) -> None:
    """Tell what Lightning would refuse after the test before training."""
    interval = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is None or not isinstance(interval, int) or not trainer.limit_val_batches:
        return
    if type(data) not in (SentenceDataModule, TextDataModule):  # others may not be ready to be asked
        return
    data.setup("fit")
    batches = -(-len(data.train_dataloader()) // trainer.world_size)
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    if interval > batches:
        raise ConfigurationError(
            f"`trainer.val_check_interval={interval}` is more than the {batches} batches of an epoch, within which it "
            f"counts with `trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch}`; give a smaller one, a "
            "share of the epoch such as 1.0, or `trainer.check_val_every_n_epoch=null`."
        )


def _choose_group_size(cfg: DictConfig, trainer: L.Trainer, module: Any) -> None:
    if isinstance(trainer.strategy, BlockwiseTraining) and trainer.strategy.settings.group_size == "auto":
        batch = module.blank_batch(cfg.data.batch_size, cfg.data.max_length)  # as large as any of the data
        trainer.strategy.choose_group_size(trainer, module, batch)


def _takes_masters(trainer: L.Trainer) -> bool:
    return isinstance(trainer.strategy, BlockwiseTraining) and trainer.strategy.settings.master_weights


def _built(node: DictConfig | str | bool | None) -> object:
    """Instantiate a node, or pass on one of Lightning's own words such as `auto` or `false`."""
    return instantiate(node) if OmegaConf.is_dict(node) else node


if __name__ == "__main__":
    main()
