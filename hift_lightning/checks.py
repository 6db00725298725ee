"""Values of the configuration that libraries would refuse late, or in words that do not help."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from hift_lightning.checkpoint_io import META
from hift_lightning.engine.errors import ConfigurationError

# precisions of Lightning under which the weights themselves have 16 bits
WITH_MASTERS = ("bf16-true", "16-true")
# NumPy's
_LARGEST_SEED = 2**32 - 1
# Lightning has its own in their place
_MAY_BE_NULL = ("strategy", "logger")
_WITH_SWITCHES = ("strategy", "trainer", "callbacks", "optimizer", "scheduler")
_LENGTHS = ("max_steps", "max_epochs", "limit_train_batches")
# what is best of the numbers that the application measures
_BEST = {"accuracy": "max", "f1": "max", "loss": "min", "perplexity": "min"}
# callbacks that look for the best of a `monitor`, and take `mode=min` where none is given
_LOOK_FOR_THE_BEST = ("Checkpoint", "EarlyStopping")
# what a module measures begins with one of these
PARTS = ("train", "val", "test")


def check_configuration(cfg: DictConfig) -> None:
    """Refuse values that no run can work with, before anything is built.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.

    Raises:
        ConfigurationError: a value must be given or cannot work; values that are not looked at here are
            refused by what they are given to.
    """
    for group in ("model", "data", "optimizer", "trainer", "callbacks", *_MAY_BE_NULL):
        if cfg.get(group) is None and not (group in _MAY_BE_NULL and group in cfg.keys()):  # noqa: SIM118
            raise ConfigurationError(f"`{group}` must be given; `python train.py --help` tells the choices.")
    for key in ("seed", "evaluate", "learning_rate", "objective", "output_dir", "ckpt_path"):
        if key not in cfg.keys():  # noqa: SIM118
            raise ConfigurationError(f"`{key}` must be given; leave `~{key}` out of the command.")
    for key in ("output_dir", "ckpt_path"):
        if not isinstance(cfg[key], str) and (key, cfg[key]) != ("ckpt_path", None):
            raise ConfigurationError(f"`{key}={_shown(cfg[key])}` is not possible; give a path.")
    for group in _WITH_SWITCHES:
        _check_switches(group, cfg.get(group))
    _check_that_data_fit_the_model(cfg)
    _check_that_the_strategy_is_one(cfg.get("strategy"))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigurationError(f"`{missing[0]}` must be given; add `{missing[0]}=...` to the command.")
    _check_whole_number("seed", cfg.seed, at_least=0, at_most=_LARGEST_SEED)
    if cfg.data.get("seed") is not None:
        _check_whole_number("data.seed", cfg.data.seed, at_least=0, at_most=_LARGEST_SEED)
    if cfg.data.get("num_classes") is not None:
        _check_whole_number("data.num_classes", cfg.data.num_classes, at_least=2)
    _check_whole_number("data.batch_size", cfg.data.batch_size, at_least=1)
    _check_whole_number("data.max_length", cfg.data.max_length, at_least=1)
    _check_whole_number("trainer.max_steps", cfg.trainer.max_steps, at_least=-1)
    if cfg.trainer.get("max_epochs") is not None:
        _check_whole_number("trainer.max_epochs", cfg.trainer.max_epochs, at_least=-1)
    if "num_workers" in cfg.data:
        _check_whole_number("data.num_workers", cfg.data.num_workers, at_least=0)
    _check_whole_number("trainer.accumulate_grad_batches", cfg.trainer.accumulate_grad_batches, at_least=1)
    if cfg.trainer.get("val_check_interval") == 0:
        raise ConfigurationError(
            "`trainer.val_check_interval=0` is not possible; give a number above 0, or `evaluate=false` for no "
            "validation."
        )
    clip = cfg.trainer.get("gradient_clip_val")
    if clip is not None and not (_is_number(clip) and clip >= 0):
        raise ConfigurationError(
            f"`trainer.gradient_clip_val={clip}` is not possible; give a number from 0 on, or `null`."
        )
    if not isinstance(cfg.evaluate, bool):
        raise ConfigurationError(f"`evaluate={cfg.evaluate}` is not possible; give `true` or `false`.")
    nothing = next((key for key in _LENGTHS if cfg.trainer.get(key) == 0), None)
    if nothing is not None and str(cfg.objective).startswith("train/"):
        raise ConfigurationError(
            f"`trainer.{nothing}=0` trains nothing, and `objective={cfg.objective}` is measured while training; give a "
            "number above 0, or another objective."
        )
    if OmegaConf.select(cfg, "strategy.master_weights") is True and cfg.trainer.precision not in WITH_MASTERS:
        raise ConfigurationError(
            "`strategy.master_weights=true` keeps fp32 masters of 16-bit weights, which "
            f"`trainer.precision={cfg.trainer.precision}` has not; give `trainer.precision=bf16-true` or `16-true`, or "
            "leave `strategy.master_weights` out."
        )
    if not _is_number(cfg.learning_rate) or not 0 < cfg.learning_rate < float("inf"):
        raise ConfigurationError(f"`learning_rate={cfg.learning_rate}` is not possible; give a number above 0.")
    if cfg.ckpt_path is not None:
        _check_checkpoint(Path(cfg.ckpt_path))


def check_that_it_is_measured(cfg: DictConfig) -> None:
    """Refuse an objective or a monitor of a part of the data that the run leaves out, and one that looks for the worst.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.

    Raises:
        ConfigurationError: there is one.
    """
    part = str(cfg.objective).partition("/")[0]
    if part in ("val", "test") and (why := _why_not_measured(cfg, part)) is not None:
        raise ConfigurationError(
            f"`objective={cfg.objective}` is not measured with `{why}`; add `objective=train/loss`."
        )
    _check_monitors(cfg)


def check_that_the_rate_is_read(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a `learning_rate` of the command that the optimizer does not read.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.
        overrides: those of the command, or of a run of a sweep.

    Raises:
        ConfigurationError: it has a rate of its own, and a sweep over the other one would compare a run with itself.
    """
    given = any(override.lstrip("+").startswith("learning_rate=") for override in overrides)
    if not given or not OmegaConf.is_dict(cfg.get("optimizer")):
        return
    optimizer = OmegaConf.to_container(cfg.optimizer, resolve=False)
    if re.search(r"\$\{[^}]*\blearning_rate\b", str(optimizer)) is None:
        raise ConfigurationError(
            f"`learning_rate={cfg.learning_rate}` is not read by `{cfg.optimizer._target_}`, which has its own "
            f"`optimizer.lr={cfg.optimizer.get('lr')}`; give `optimizer.lr={cfg.learning_rate}` instead."
        )


def check_that_the_shape_is_read(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse a `model.network.config` of the command beside pretrained weights, which bring their own shape.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.
        overrides: those of the command, or of a run of a sweep.

    Raises:
        ConfigurationError: there is one.
    """
    given = next((each for each in overrides if each.lstrip("+~").startswith("model.network.config.")), None)
    if given is not None and OmegaConf.select(cfg, "model.pretrained") is not None:
        raise ConfigurationError(
            f"`{given}` is read for random weights only, and the pretrained ones bring their own shape; add "
            "`model.pretrained=null`, or leave it out."
        )


def check_objective(objective: Any, module: Any) -> None:
    """Refuse an objective of which it is known before any work that nobody measures it.

    Args:
        objective: a name of `metrics.json`.
        module: the class that makes the LightningModule; only one that tells itself what it has `measured` is looked
            at, since a class derived from it may measure more.

    Raises:
        ConfigurationError: the module measures no such thing. What callbacks measure is known after the run.
    """
    measured: tuple[str, ...] | None = vars(module).get("measured")
    part, slash, _ = str(objective).partition("/")
    if measured is None or (slash and part not in PARTS) or objective == "steps":
        return
    known = ["train/loss", *(f"{part}/{name}" for part in ("val", "test") for name in measured)]
    if objective not in [*known, *(f"test/{name}_before" for name in measured)]:
        raise ConfigurationError(
            f"`objective={objective}` is not measured by `{module.__name__}`; give one of {', '.join(known)}."
        )


def _check_monitors(cfg: DictConfig) -> None:
    for name, callback in (cfg.get("callbacks") or {}).items():
        monitor = callback.get("monitor") if OmegaConf.is_dict(callback) else None
        if str(monitor).startswith("val/") and (why := _why_not_measured(cfg, "val")) is not None:
            raise ConfigurationError(
                f"`callbacks.{name}.monitor={monitor}` is not measured with `{why}`; give another one, or leave "
                f"`{why.partition('=')[0]}` out."
            )
        if monitor is not None and str(callback.get("_target_")).endswith(_LOOK_FOR_THE_BEST):
            _check_mode(f"callbacks.{name}", str(monitor), callback)


def _check_mode(place: str, monitor: str, callback: DictConfig) -> None:
    mode, best = callback.get("mode", "min"), _BEST.get(re.sub(rf"^({'|'.join(PARTS)})/", "", monitor))
    if best is not None and mode in ("min", "max") and mode != best:
        extreme = {"min": "lowest", "max": "highest"}[mode]
        raise ConfigurationError(
            f"`{place}.mode={mode}` takes the {extreme} `{monitor}` for the best, which is the worst; give "
            f"`{'' if 'mode' in callback else '+'}{place}.mode={best}`."
        )


def _why_not_measured(cfg: DictConfig, part: str) -> str | None:
    """What of the configuration leaves the validation (`val`) or the `test` out, if anything."""
    limit = f"limit_{part}_batches"
    if not cfg.evaluate:
        return "evaluate=false"
    return f"trainer.{limit}={cfg.trainer[limit]}" if cfg.trainer.get(limit) == 0 else None


def _check_that_data_fit_the_model(cfg: DictConfig) -> None:
    # by the keys alone: a number of classes that the model looks up in the data may not be there
    classifies = "num_classes" in cfg.model.module.keys()  # noqa: SIM118
    has_classes = "num_classes" in cfg.data.keys()  # noqa: SIM118
    if classifies != has_classes:
        kinds = {True: "classes of sentences", False: "texts without classes"}
        fitting = "film_reviews" if classifies else "text"
        raise ConfigurationError(
            f"The model learns {kinds[classifies]} and the data `{cfg.data._target_}` are {kinds[has_classes]}; "
            f"leave `data=...` out, or give `data={fitting}`."
        )
    of_network = OmegaConf.select(cfg, "model.network.num_classes")
    if classifies and isinstance(of_network, int) and of_network != OmegaConf.select(cfg, "data.num_classes"):
        raise ConfigurationError(
            f"`model.network.num_classes={of_network}` is another number than "
            f"`data.num_classes={cfg.data.num_classes}`; give the latter alone."
        )
    if classifies and cfg.model.tokenizer is None:
        raise ConfigurationError(
            "`model.tokenizer=null` leaves a classifier nothing to read sentences with; give "
            "`model.tokenizer.pretrained=/path/to/folder`."
        )


def _check_that_the_strategy_is_one(strategy: Any) -> None:
    if OmegaConf.is_dict(strategy) and "_target_" not in strategy:
        settings = ", ".join(f"`strategy.{name}`" for name in strategy)
        raise ConfigurationError(
            f"`strategy` names no class with `_target_`, and has only {settings or 'nothing'}, as where a preset or a "
            "command sets what is HiFT's under `strategy=full`; give `strategy=hift`, or leave the preset or the "
            "settings out."
        )


def _check_checkpoint(path: Path) -> None:
    if not path.exists():
        raise ConfigurationError(
            f"The checkpoint `ckpt_path={path}` does not exist; give the path of one (a run names its own at its end), "
            "or `ckpt_path=null` to start anew."
        )
    if path.is_dir() and not (path / META).is_file():
        checkpoints = sorted(path.rglob("*.ckpt"), key=lambda found: found.stat().st_mtime)
        remedy = f"give its newest, `ckpt_path={checkpoints[-1]}`" if checkpoints else "give the path of one"
        raise ConfigurationError(
            f"`ckpt_path={path}` is a folder and no checkpoint; {remedy}, or `ckpt_path=null` to start anew."
        )


def _check_whole_number(key: str, value: Any, at_least: int, at_most: int | None = None) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):
        possible = f"from {at_least} on" if at_most is None else f"from {at_least} to {at_most}"
        raise ConfigurationError(f"`{key}={value}` is not possible; give a whole number {possible}.")


def _check_switches(key: str, value: Any) -> None:
    """Refuse words that other programs read as a switch, and Hydra as text, which would count as true."""
    if isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        raise ConfigurationError(f"`{key}={value}` is a word here and no switch; give `true` or `false`.")
    if OmegaConf.is_config(value):
        keys = value.keys() if OmegaConf.is_dict(value) else range(len(value))
        for inner in keys:
            if not OmegaConf.is_missing(value, inner) and not OmegaConf.is_interpolation(value, inner):
                _check_switches(f"{key}.{inner}", value[inner])


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
