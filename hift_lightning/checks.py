"""Values of the configuration that libraries would refuse late, or in words that do not help."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hift_lightning.engine.errors import ConfigurationError


def check_configuration(cfg: DictConfig) -> None:
    """Refuse values that no run can work with, before anything is built.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.

    Raises:
        ConfigurationError: a value must be given or cannot work; values that are not looked at here are
            refused by what they are given to.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigurationError(f"`{missing[0]}` must be given; add `{missing[0]}=...` to the command.")
    _check_whole_number("seed", cfg.seed, at_least=0)
    _check_whole_number("trainer.max_steps", cfg.trainer.max_steps, at_least=-1)
    _check_whole_number("trainer.accumulate_grad_batches", cfg.trainer.accumulate_grad_batches, at_least=1)
    if not _is_number(cfg.learning_rate) or not cfg.learning_rate > 0:
        raise ConfigurationError(f"`learning_rate={cfg.learning_rate}` is not possible; give a number above 0.")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).exists():
        raise ConfigurationError(
            f"The checkpoint `ckpt_path={cfg.ckpt_path}` does not exist; give the path of one, or "
            "`ckpt_path=null` to start anew."
        )


def _check_whole_number(key: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigurationError(f"`{key}={value}` is not possible; give a whole number from {at_least} on.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
