"""What a run has trained, as a folder that `from_pretrained` of transformers loads.

    hift-export outputs/2026-11-24/10-15-00 my-model
    hift-export outputs/2026-11-24/10-15-00/checkpoints/step-300.ckpt my-model --dtype float16

A checkpoint of `strategy=hift_fsdp2` may be a folder of shards.

`python -m hift_lightning.export` is the same command.
"""

import argparse
import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hift_lightning.checkpoint_io import META, StreamingCheckpointIO
from hift_lightning.data.sentences import SentenceDataModule
from hift_lightning.engine.compatibility import check_weights
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.masters import master_of
from hift_lightning.engine.settings import parse_bytes
from hift_lightning.models.sentence_classifier import HEAD_FILE, SentenceClassifier, without_pooler
from hift_lightning.report import one_sentence_errors
from hift_lightning.targets import CONVERTED, NETWORKS, TOKENIZERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_SIZE = "5GB"

# the module's attribute that the network is
_NETWORK = "network."

# A run's configuration may come from a stranger; these build what it says without running anything that it brings.
_BUILDERS = {*NETWORKS, *TOKENIZERS, *CONVERTED}


def export(
    network: nn.Module,
    folder: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = SHARD_SIZE,
) -> Path:
    """Write a network as safetensors, with its configuration and tokenizer, where `from_pretrained` finds them.

    A :class:`SentenceClassifier` is none of transformers' own models: its body is written for
    `AutoModel.from_pretrained`, and its head beside it, in `head.safetensors`, with the pooling and the kind of head
    in the metadata; `hift_lightning.models.load_classifier` loads both.

    Args:
        network: a model of transformers, or a `SentenceClassifier`; it stays as it is.
        folder: made where it does not exist.
        weights: under the names of the network's own state dict, such as the masters of a run
            (`HiFT.master_state_dict()`), or under those of a module that holds the network once, such as what
            `trainer.strategy.master_state_dict()` gives; `None` for the network's.
        tokenizer: a transformers tokenizer that belongs to it; `None` writes none.
        dtype: that parameters are rounded to, once; `None` for that of each of the network's. Buffers keep theirs.
        max_shard_size: most bytes of a file, as a number or such as "5GB".

    Returns:
        The folder.

    Raises:
        ConfigurationError: the folder is not empty or cannot be written, the network is of another kind, the weights do
            not fit it or are sharded, a weight has no value in the dtype, or the size of a file cannot be read.
    """
    from transformers import PreTrainedModel

    folder = Path(folder)
    if not isinstance(network, (PreTrainedModel, SentenceClassifier)):
        raise ConfigurationError(
            f"`{type(network).__name__}` is neither a model of transformers nor a `SentenceClassifier`, so there is no "
            "folder that `from_pretrained` would load; save its `state_dict()` with safetensors yourself."
        )
    shard_bytes = parse_bytes("max_shard_size", max_shard_size)
    _check_folder(folder)
    existed = folder.exists()
    rounded = _rounded(network, network.state_dict() if weights is None else _of_network(network, weights), dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(network, SentenceClassifier):
            _save_model(network.body, _below("body.", rounded), folder, shard_bytes)
            _save_head(network, _below("head.", rounded), folder)
        else:
            _save_model(network, rounded, folder, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except BaseException as error:
        _empty(folder, existed)
        if isinstance(error, OSError):
            raise ConfigurationError(
                f"The folder `{folder}` cannot be written ({error.strerror or error}); make room, or give another one."
            ) from error
        raise
    return folder


def _of_network(network: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Those of the network under its own names, where a module holds it in an attribute."""
    names = network.state_dict().keys()
    if not names.isdisjoint(weights):
        return weights
    first = next(iter(names))
    holders = {given.removesuffix(first) for given in weights if given.endswith(f".{first}")}
    whole = [holder for holder in holders if all(f"{holder}{name}" in weights for name in names)]
    return _below(whole[0], weights) if len(whole) == 1 else weights


def export_run(
    run: str | Path, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: int | str = SHARD_SIZE
) -> Path:
    """Export what a run of the application has trained; its masters where it has any.

    Args:
        run: the run's folder, for its newest checkpoint that is whole, or one of its checkpoints; the folder of a
            sharded run is read whole into host memory.
        folder: as for `export`.
        dtype: as for `export`; `None` for that of the weights in the checkpoint.
        max_shard_size: as for `export`.

    Returns:
        The folder.

    Raises:
        ConfigurationError: there is no such run or no whole checkpoint, the configuration brings a network or a
            tokenizer of its own; or see `export`.
    """
    shard_bytes = parse_bytes("max_shard_size", max_shard_size)
    _check_folder(Path(folder))
    root = _run_of(Path(run))
    cfg = _configuration(root)
    for part in ("network", "tokenizer"):
        _check_builders(cfg, part)
    network = instantiate(cfg.model.network, tokenizer=None, weights=False)
    tokenizer = instantiate(cfg.model.tokenizer)
    path, checkpoint = _load(Path(run), root, cfg)
    trained = _below(_NETWORK, checkpoint["state_dict"])
    check_weights(network, trained)
    network.load_state_dict(trained, assign=True)
    _tie(network)
    masters = _masters(network, checkpoint)
    _name_classes(network, checkpoint)
    rank_zero_info(
        f"Exporting `{path}`: {len(masters)} of {len(trained)} weights from their fp32 masters, "
        f"{'without a tokenizer, as the run had none' if tokenizer is None else 'with the tokenizer'}."
    )
    _tell_of_better(path, checkpoint)
    return export(
        network,
        folder,
        weights={**trained, **masters},
        tokenizer=tokenizer,
        dtype=dtype,
        max_shard_size=shard_bytes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `hift-export`.

    Args:
        arguments: those of the command line by default.
    """
    parser = argparse.ArgumentParser("hift-export", description="Write what a run has trained for `from_pretrained`.")
    parser.add_argument("run", help="folder of a run, for its newest whole checkpoint, or the path of a checkpoint")
    parser.add_argument("folder", help="where to write; must be empty or not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; that of the run's by default")
    parser.add_argument("--max-shard-size", default=SHARD_SIZE, help="most bytes of a file (default: %(default)s)")
    given = parser.parse_args(arguments)
    with one_sentence_errors():
        folder = export_run(given.run, given.folder, DTYPES.get(given.dtype), given.max_shard_size)
        print(f"written: {folder}")


# --- weights ----------------------------------------------------------------------------------------------------------


def _rounded(network: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The network's state dict with these weights, on the host; what is tied is one tensor."""
    own = network.state_dict(keep_vars=True)
    if any(isinstance(value, DTensor) for value in weights.values()):
        raise ConfigurationError(
            "The weights are sharded, and one process writes them; have all ranks call "
            "`trainer.strategy.master_state_dict()`, and the first one give `export` what it gets as `weights`."
        )
    check_weights(network, dict(weights))
    done: dict[int, Tensor] = {}
    for name, tensor in own.items():
        if id(tensor) in done:
            continue
        target = weights[name].dtype if not isinstance(tensor, nn.Parameter) else dtype or tensor.dtype
        value = weights[name].detach().to("cpu", target)
        narrower = value.is_floating_point() and value.dtype != weights[name].dtype
        if narrower and bool(value.isinf().any()) and not bool(weights[name].isinf().any()):
            raise ConfigurationError(
                f"The weight `{name}` has values that {target} does not hold; give `--dtype=bfloat16` or `float32`."
            )
        done[id(tensor)] = value
    return {name: done[id(tensor)] for name, tensor in own.items()}


def _masters(network: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The checkpoint's masters under all names of their weights; weights set by others than a step are their own."""
    engines = checkpoint.get("hift", {}).get("engines", [])
    masters = {name: master for engine in engines for name, master in _below(_NETWORK, engine["masters"]).items()}
    own = network.state_dict(keep_vars=True)
    of_weight = {id(own[name]): master for name, master in masters.items() if name in own}
    masters_of_own = {name: of_weight[id(weight)] for name, weight in own.items() if id(weight) in of_weight}
    return {name: master_of(own[name].detach(), master) for name, master in masters_of_own.items()}


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _tie(network: nn.Module) -> None:
    """Make one parameter of what the run has trained as one."""
    body: Any = network.body if isinstance(network, SentenceClassifier) else network
    head = body.get_output_embeddings()
    if head is not None and not torch.equal(head.weight, body.get_input_embeddings().weight):
        return  # the files that the run began with had a head of its own, whatever their config.json says
    body.tie_weights()


# --- files ------------------------------------------------------------------------------------------------------------


def _shared(model: nn.Module) -> dict[str, str]:
    """The first name of each weight that has several, by its further ones."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: known for name, weight in named if (known := first.setdefault(id(weight), name)) != name}


def _save_model(model: Any, weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Have transformers save a model of this configuration with these weights; the given one stays as it is."""
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
        if _shared(shell) != _shared(model):  # a head of its own, or one that is tied, whatever the configuration says
            config = copy.deepcopy(model.config)
            text = config.get_text_config()
            config.tie_word_embeddings = text.tie_word_embeddings = not text.tie_word_embeddings
            other = type(model)(config)
            shell = other if _shared(other) == _shared(model) else shell
    if getattr(model, "pooler", None) is None:
        without_pooler(shell)
    if model.can_generate():
        shell.generation_config = copy.deepcopy(model.generation_config)
    if unknown := sorted(weights.keys() - shell.state_dict().keys()):
        raise ConfigurationError(
            f"`{type(model).__name__}` has {len(unknown)} weights that its architecture has not, the first is "
            f"`{unknown[0]}`, as adapters are; merge them into its own weights first."
        )
    shell.load_state_dict(weights, assign=True)
    shell.tie_weights()
    shell.save_pretrained(folder, max_shard_size=shard_bytes)


def _save_head(network: SentenceClassifier, weights: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt", "pooling": network.pooling, "head": network.kind_of_head}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / HEAD_FILE, metadata)


def _check_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            f"`{folder}` is {'not empty' if folder.is_dir() else 'no folder'}; give an empty folder or a new one, "
            "since a mixture of two models would be loaded without a word."
        )


def _empty(folder: Path, existed: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if existed:
        folder.mkdir(exist_ok=True)


# --- the run ----------------------------------------------------------------------------------------------------------


def _run_of(path: Path) -> Path:
    """The folder of the run that a path names or lies in."""
    if not path.exists():
        raise ConfigurationError(f"`{path}` does not exist; give the folder of a run, or one of its checkpoints.")
    for folder in (path, *path.absolute().parents):
        if (folder / ".hydra" / "config.yaml").is_file():
            return folder
        if path.is_dir() and not (path / META).is_file():
            break
    raise ConfigurationError(
        f"`{path}` is {'no folder of a run' if path.is_dir() else 'not in the folder of a run'}: there is no "
        "`.hydra/config.yaml`; give the folder that `python train.py` wrote to, or a checkpoint in it."
    )


def _configuration(root: Path) -> DictConfig:
    cfg = OmegaConf.load(root / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.output_dir = str(root)  # the folder may have been moved since
    _make_absolute(cfg.model, _started_in(root))
    return cfg


def _started_in(root: Path) -> Path:
    """The folder in which the run's relative paths begin."""
    record = root / ".hydra" / "hydra.yaml"
    hydra = OmegaConf.load(record) if record.is_file() else OmegaConf.create()
    if OmegaConf.select(hydra, "hydra.job.chdir"):
        return root
    return Path(OmegaConf.select(hydra, "hydra.runtime.cwd") or "")


def _make_absolute(node: DictConfig, folder: Path) -> None:
    """Have what is pretrained be looked for where the run has found it, and not on a hub where it has the same name."""
    for key in node:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, str(key)):
            continue
        value = node[key]
        if isinstance(value, DictConfig):
            _make_absolute(value, folder)
        elif key == "pretrained" and value and (folder / str(value)).exists():
            node[key] = str((folder / str(value)).absolute())


def _check_builders(cfg: DictConfig, part: str) -> None:
    try:
        targets = list(_targets(OmegaConf.to_container(cfg.model[part], resolve=True)))
    except OmegaConfBaseException as error:
        raise ConfigurationError(
            f"`model.{part}` of the run's `.hydra/config.yaml` cannot be read ({error.args[0]}); call `export` of "
            "`hift_lightning.export` in Python."
        ) from error
    for target in targets:
        if target not in _BUILDERS:
            raise ConfigurationError(
                f"`model.{part}` of the run's `.hydra/config.yaml` is built by `{target}`, and this command runs only "
                "builders of this project; call `export` of `hift_lightning.export` in Python."
            )


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from _targets(part)


def _load(run: Path, root: Path, cfg: DictConfig) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that is named, or the newest of the run that is whole."""
    if run.is_file() or (run / META).is_file():
        return run, _trainer_checkpoint(run)
    folder = Path(OmegaConf.select(cfg, "callbacks.checkpoint.dirpath") or root / "checkpoints")
    # without the application's own callback Lightning saves beside the log; below a run may be another one's folder
    found = list(folder.glob("*.ckpt")) or [
        path for path in root.rglob("*.ckpt") if next(p for p in path.parents if (p / ".hydra").is_dir()) == root
    ]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return path, _trainer_checkpoint(path)
        except ConfigurationError as error:
            rank_zero_warn(f"Passed over: {error}")
    raise ConfigurationError(
        f"`{run}` has no checkpoint that is whole, nor has `{folder}`; give the path of a checkpoint, or train with "
        "`trainer.enable_checkpointing=true`."
    )


def _name_classes(network: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Write the labels of a sentence classifier that were words where transformers keeps them."""
    words = checkpoint.get(SentenceDataModule.__qualname__, {}).get("words")
    if isinstance(network, SentenceClassifier) and words:
        config: Any = network.body.config
        config.id2label = dict(enumerate(words))
        config.label2id = {word: index for index, word in enumerate(words)}


def _tell_of_better(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Warn where a monitor had found an earlier checkpoint to be better than this one."""
    for state in checkpoint.get("callbacks", {}).values():
        best = Path(state.get("best_model_path") or path).name
        if state.get("monitor") is not None and best != path.name:
            rank_zero_warn(
                f"`{path.name}` is exported, and by `monitor={state['monitor']}` the best checkpoint is `{best}`; give "
                "its path to export that one."
            )


def _trainer_checkpoint(path: Path) -> dict[str, Any]:
    sharded = (path / META).is_file()
    checkpoint = StreamingCheckpointIO().load_checkpoint(path / META if sharded else path)
    if sharded:
        _put_together(checkpoint, path)
    if not isinstance(checkpoint, dict) or not _below(_NETWORK, checkpoint.get("state_dict", {})):
        raise ConfigurationError(
            f"`{path}` is no checkpoint of a run of `train.py`: it has no weights of a network; give one that is."
        )
    return checkpoint


def _put_together(checkpoint: dict[str, Any], folder: Path) -> None:
    """Put the weights and masters that `hift_fsdp2` has saved in shards where tensors on "meta" stand for them."""
    tensors = _sharded_tensors(folder)
    places = [("state_dict", checkpoint.get("state_dict", {}))]
    places += [(f"masters_{i}", one["masters"]) for i, one in enumerate(checkpoint.get("hift", {}).get("engines", []))]
    for prefix, place in places:
        # a tied weight is saved under one of its names, and one tensor on "meta" stands for it under all of them
        whole = {id(place[name]): tensors[f"{prefix}.{name}"] for name in place if f"{prefix}.{name}" in tensors}
        place.update({name: whole.get(id(tensor), tensor) for name, tensor in place.items()})


def _sharded_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights and masters of a sharded checkpoint, whole and by their names in the folder."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    from hift_lightning.strategies.sharded_checkpoints import CarefulReader

    try:
        reader = CarefulReader(folder)
        tensors = {
            name: torch.empty(saved.size, dtype=saved.properties.dtype)
            for name, saved in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(("state_dict.", "masters_")) and isinstance(saved, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            # this process reads for itself, which is told of as if it were a mistake
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(tensors, storage_reader=reader, no_dist=True)
    # damaged files make the reader raise many unrelated types, or an error that is no `Exception`
    except (Exception, CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ConfigurationError(f"The checkpoint `{folder}` is not whole ({reason}); give an earlier one.") from error
    return tensors


if __name__ == "__main__":
    main()
