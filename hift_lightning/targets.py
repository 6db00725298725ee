"""What a configuration may name with `_target_`: a class of the kind that its place is for, and never a function.

A configuration file may come from somebody else, and Hydra calls whatever a `_target_` names. So every `_target_` is
looked at before anything is built. Importing a module runs it too; only libraries that the application is made of are
imported on a configuration's word.
"""

import importlib
import itertools
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import (
    create_automatic_config_search_path,
    detect_calling_file_or_module_from_task_function,
    get_args_parser,
)
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from hift_lightning.engine.errors import ConfigurationError

LIBRARIES = ("hift_lightning", "lightning", "torch", "torchmetrics", "transformers")
KEY = "trusted_targets"


@dataclass(frozen=True)
class Place:
    """Where in a configuration a `_target_` may stand, and what it may name there."""

    keys: str
    """Regular expression on the node's full key."""
    bases: tuple[str, ...] = ()
    """Classes whose subclasses are taken."""
    names: tuple[str, ...] = ()
    """Single classes and functions that are taken besides."""


PLUGINS = (
    "lightning.pytorch.accelerators.Accelerator",
    "lightning.pytorch.plugins.CheckpointIO",
    "lightning.pytorch.plugins.Precision",
    "lightning.pytorch.plugins.LayerSync",
    "lightning.fabric.plugins.ClusterEnvironment",
    "lightning.pytorch.profilers.Profiler",
)
NETWORKS = ("hift_lightning.models.sentence_classifier", "hift_lightning.models.causal_lm")
TOKENIZERS = ("hift_lightning.models.load_tokenizer",)
CONVERTED = ("hift_lightning.models.gguf.safetensors_of_gguf",)
PLACES = (
    Place("optimizer", bases=("torch.optim.Optimizer",)),
    Place(
        "scheduler",
        bases=("torch.optim.lr_scheduler.LRScheduler",),
        names=tuple(f"hift_lightning.schedule.{name}" for name in ("constant", "linear", "cosine")),
    ),
    Place(r"callbacks\.[^.]+", bases=("lightning.pytorch.callbacks.Callback",)),
    Place(
        r"callbacks\.[^.]+\..+",
        names=("lightning.pytorch.callbacks.progress.rich_progress.RichProgressBarTheme", "datetime.timedelta"),
    ),
    Place("logger", bases=("lightning.pytorch.loggers.Logger",)),
    Place("strategy", bases=("lightning.pytorch.strategies.Strategy",)),
    Place("trainer", bases=("lightning.pytorch.Trainer",)),
    Place(r"(strategy|trainer)\..+", bases=PLUGINS),
    Place("data", bases=("lightning.pytorch.LightningDataModule",)),
    Place(r"model\.module", bases=("lightning.pytorch.LightningModule",)),
    Place(
        r"model\.network",
        bases=("torch.nn.Module",),
        names=NETWORKS,
    ),
    Place(
        r"model\.tokenizer",
        bases=("transformers.PreTrainedTokenizerBase",),
        names=TOKENIZERS,
    ),
    # what stands in `model.converted` is referred to by the other two
    Place(r"model\.(converted|network\.pretrained|tokenizer\.pretrained)", names=CONVERTED),
)

HYDRA_CALLBACKS = ("hift_lightning.sweep.SweepTable", "hift_lightning.output.OutputFolder")
HYDRA_PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")
LOGGING_CLASS = r"logging\.(handlers\.)?\w*(Handler|Formatter)"
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_targets(cfg: DictConfig, trusted: Collection[str] = ()) -> None:
    """Refuse every `_target_` that names something else than its place is for, before anything is built.

    Args:
        cfg: the composed configuration of `conf/train.yaml`.
        trusted: import paths that are taken in every place.

    Raises:
        ConfigurationError: there is one.
    """
    for key, target in _values(cfg):
        node, _, name = key.rpartition(".")
        if name == "_target_" and target not in trusted:
            _check(node, target)


def trusted_by_the_user(cfg: DictConfig) -> list[str]:
    """Return the import paths that the user trusts: those of `trusted_targets` on the command line, or in the file.

    The file is `conf/train.yaml` alone: any other, such as a preset of somebody else's, could ask for itself.

    Args:
        cfg: the composed configuration, in a run of the application.

    Raises:
        ConfigurationError: the list comes from another file.
    """
    listed = [str(target) for target in cfg.get(KEY) or []]
    on_the_command = any(map(_lists_targets, HydraConfig.get().overrides.task))
    in_the_file = OmegaConf.select(OmegaConf.load(str(files("hift_lightning.conf") / "train.yaml")), KEY)
    if listed and not on_the_command and listed != in_the_file:
        raise ConfigurationError(
            f"`{KEY}={listed}` comes from a file other than conf/train.yaml, and a file cannot ask to be trusted "
            f"itself; if you trust what it names, add `{_on_the_command(*listed)}` to the command."
        )
    return listed


def check_command(arguments: Sequence[str], function: Any, config_path: str, config_name: str) -> None:
    """Refuse a command with which Hydra itself would run something else than Hydra and this application.

    Hydra makes its callbacks, sweeper, launcher and logging from the node `hydra` before the application begins, so the
    configuration is composed once more, ahead of it, and of a sweep that goes through presets (`-m experiment=a,b`) the
    configuration with each.

    Args:
        arguments: those of the command.
        function: what `hydra.main` decorates.
        config_path: as `hydra.main` is given it.
        config_name: likewise.

    Raises:
        ConfigurationError: there is such a thing, or a file that the command names is no YAML.
    """
    given = get_args_parser().parse_args(list(arguments))
    if given.experimental_rerun is not None:
        raise ConfigurationError(
            f"`--experimental-rerun={given.experimental_rerun}` reads a pickle, which can run anything; give the "
            "overrides of that run, which stand in its .hydra/overrides.yaml."
        )
    caller = detect_calling_file_or_module_from_task_function(function)
    search_path = create_automatic_config_search_path(*caller, given.config_path or config_path)
    if given.config_dir is not None:
        path = f"file://{Path(given.config_dir).absolute()}"
        search_path.prepend(provider="command-line", path=path, anchor=SearchPathQuery(provider="schema"))
    for mode in RunMode:  # which of them it is, the configuration may decide
        composed = _compose(search_path, given.config_name or config_name, given.overrides, mode)
        if composed is None:
            continue
        listed = composed.get(KEY) if any(map(_lists_targets, given.overrides)) else None
        trusted = list(listed or [])
        check_hydra_nodes(composed.hydra, trusted)
        if mode is RunMode.MULTIRUN:
            for overrides in _with_each_preset(search_path, [*_sweeper_params(composed), *given.overrides]):
                swept = _compose(search_path, given.config_name or config_name, overrides, mode)
                if swept is not None:
                    check_hydra_nodes(swept.hydra, trusted)


def _compose(search_path: ConfigSearchPath, config_name: str, overrides: list[str], mode: RunMode) -> DictConfig | None:
    """The configuration with the node `hydra`; `None` where Hydra, which composes it again, will tell what is wrong."""
    with _hydra(search_path) as hydra:
        try:
            return hydra.compose_config(config_name, overrides, mode, validate_sweep_overrides=False)
        except (HydraException, OmegaConfBaseException):
            return None
        except YAMLError as error:
            raise ConfigurationError(
                f"A file of the configuration is no YAML ({' '.join(str(error).split())}); mend it there."
            ) from error
        except ValueError as error:
            nameless = [
                override.input_line
                for override in OverridesParser.create().parse_overrides(overrides)
                if _chooses_a_preset(hydra, override)
                and not override.is_sweep_override()
                and not isinstance(override.value(), (str, list))
            ]
            if not nameless:
                raise
            raise ConfigurationError(
                f"`{nameless[0]}` names no option of its group; name one of those in conf/, as in `logger=none` and "
                "`scheduler=constant`."
            ) from error


def _sweeper_params(composed: DictConfig) -> list[str]:
    """The overrides that the configuration itself gives to a sweep."""
    try:
        sweeper = OmegaConf.to_container(composed.hydra.sweeper, resolve=True)
    except InterpolationResolutionError:
        return []  # so that Hydra can make no sweeper of it
    assert isinstance(sweeper, dict)
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


@contextmanager
def _hydra(search_path: ConfigSearchPath) -> Iterator[Hydra]:
    try:
        yield Hydra.create_main_hydra2("train", search_path)
    finally:
        GlobalHydra.instance().clear()


def _chooses_a_preset(hydra: Hydra, override: Override) -> bool:
    parent, _, name = override.key_or_group.rpartition("/")
    return name in hydra.config_loader.list_groups(parent)


def _with_each_preset(search_path: ConfigSearchPath, overrides: list[str]) -> list[list[str]]:
    """The overrides of the jobs of a sweep that goes through presets, without what else it goes through."""
    jobs: dict[str, list[str]] = {}
    swept = False
    with _hydra(search_path) as hydra:
        for override in OverridesParser.create(hydra.config_loader).parse_overrides(overrides):
            key = override.get_key_element()
            if not override.is_sweep_override():
                jobs[key] = [f"{key}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep() and _chooses_a_preset(hydra, override):
                jobs[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
                swept = True
    return [list(job) for job in itertools.product(*jobs.values())] if swept else []


def check_hydra_nodes(hydra: DictConfig, trusted: Collection[str] = ()) -> None:
    """Refuse what would let Hydra itself run something else than Hydra and this application.

    Args:
        hydra: the node `hydra` of a composed configuration.
        trusted: import paths of targets that are taken all the same.

    Raises:
        ConfigurationError: there is such a thing.
    """
    for key, value in _values(hydra, "hydra"):
        node, _, name = key.rpartition(".")
        if name == "_target_" and value not in trusted:
            callback = re.fullmatch(r"hydra\.callbacks\.[^.]+", node) and value in HYDRA_CALLBACKS
            plugin = node in ("hydra.sweeper", "hydra.launcher") and str(value).startswith(HYDRA_PLUGINS)
            if not callback and not plugin:
                raise ConfigurationError(
                    f"`{key}={value}` would be run by Hydra before the application begins; leave it out, or, if you "
                    f"trust it, add `{_on_the_command(value)}` to the command."
                )
        if re.match(r"hydra\.(job|hydra)_logging\.", key) and (
            name == "()"
            or (name == "class" and not re.fullmatch(LOGGING_CLASS, str(value)))
            or (str(value).startswith("ext://") and value not in STREAMS)
            or re.fullmatch(r"\$\{.*\}", str(value))  # not known yet, and it may become any node
        ):
            raise ConfigurationError(
                f"`{key}={value}` would be called to set logging up; leave it out, or use a handler or formatter of "
                "Python's `logging`."
            )


def _values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a node with its full key; interpolations are followed as Hydra follows them."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return
    names: list[Any] = list(range(len(node)) if isinstance(node, ListConfig) else node.keys())
    for name in names:
        full_key = f"{key}.{name}" if key else str(name)
        if OmegaConf.is_missing(node, name):
            continue
        try:
            value = node[name]
        except InterpolationResolutionError:  # refers to what Hydra knows only when a job begins
            value = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index]
        yield full_key, value
        yield from _values(value, full_key)


def _check(node: str, target: Any) -> None:
    place = next((place for place in PLACES if re.fullmatch(place.keys, node)), None)
    if place is None:
        raise _refusal(node, target, "stands where no class belongs")
    if target in place.names:
        return
    wanted = [f"a class derived from `{base}`" for base in place.bases] + [f"`{name}`" for name in place.names]
    found = _find(node, target)
    if not isinstance(found, type) or not issubclass(found, tuple(_find(node, base) for base in place.bases)):
        raise _refusal(node, target, f"is not what belongs there: {' or '.join(wanted)}")


def _find(node: str, target: Any) -> Any:
    """What an import path names; only modules of known libraries are imported for it."""
    parts = str(target).split(".")
    if not all(part.isidentifier() and not part.startswith("__") for part in parts):
        raise _refusal(node, target, "is no import path of a class")
    known = parts[0] in LIBRARIES
    if not known and parts[0] not in sys.modules:
        raise _refusal(node, target, f"is in none of {', '.join(LIBRARIES)}, and importing it would run it")
    try:
        found: Any = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part) and known:
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise _refusal(node, target, f"cannot be imported ({error})") from error
    return found


def _refusal(node: str, target: Any, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"`{node}._target_={target}` {why}; name what belongs there, or, if you trust it, add "
        f"`{_on_the_command(target)}` to the command."
    )


def _lists_targets(override: str) -> bool:
    return override.lstrip("+").startswith(f"{KEY}=")


def _on_the_command(*targets: Any) -> str:
    return f"{KEY}=[{','.join(map(str, targets))}]"
