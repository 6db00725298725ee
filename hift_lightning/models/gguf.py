"""Models in GGUF files: their weights are turned into floating point and a folder of safetensors once."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from hift_lightning.cache import cache_root, digest_of_file, made_once
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.models.pretrained import locate

# what transformers reads such files with
PACKAGES = ("gguf", "accelerate")


def safetensors_of_gguf(pretrained: str | None, cache_dir: str | None = None) -> str | None:
    """Return the folder with the weights of a GGUF file in fp32, its configuration and its tokenizer.

    The first call converts the file, which takes about half a minute for 135M parameters; later ones find the
    folder. Any other value is returned as it is.

    Args:
        pretrained: the path of a `.gguf` file, or `package:<import name>/<file>` of one inside an installed
            package, which is not imported; or anything that `hift_lightning.models.pretrained.locate` takes.
        cache_dir: the folder that keeps what has been converted; `None` for `~/.cache/hift_lightning`.

    Raises:
        ConfigurationError: the file or its package is not there, a package that reads it is not installed, the
            file is broken, or the cache cannot be written.
    """
    if pretrained is None or not pretrained.endswith(".gguf"):
        return pretrained
    file = _locate_file(pretrained)
    folder = cache_root(cache_dir) / "models" / f"{file.stem}-{digest_of_file(file)[:16]}"
    return str(made_once(folder, lambda target: _convert(file, target), "model.cache_dir"))


def _locate_file(pretrained: str) -> Path:
    if pretrained.startswith("package:"):
        folder, _, name = pretrained.rpartition("/")
        file = locate(folder, ()) / name
    else:
        file = Path(pretrained)
    if not file.is_file():
        raise ConfigurationError(
            f"The file `{file}` of `model.pretrained={pretrained}` does not exist; give "
            "`model.pretrained=/path/to/model.gguf`, or `model.pretrained=null` for random weights."
        )
    return file


def _convert(file: Path, folder: Path) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"`{file.name}` cannot be read without the packages {' and '.join(f'`{name}`' for name in missing)}; "
            f"run `pip install {' '.join(missing)}`."
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load: Any = AutoModelForCausalLM.from_pretrained

    rank_zero_info(f"Converting `{file}`, once; this takes about half a minute for 135M parameters.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        quantized, found = load(file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a broken file makes the reader raise many unrelated types; the reason is passed on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"`{file}` cannot be converted ({reason}); get the file again.") from error
    if missing := sorted(found["missing_keys"]) or sorted(name for name, *_ in found["mismatched_keys"]):
        raise ConfigurationError(
            f"`{file}` lacks {len(missing)} tensors of the model, the first is `{missing[0]}`, as where it is one of "
            "several parts (`-00001-of-00002`); give a file that holds the whole model."
        )
    config = quantized.config
    # a model that comes from GGUF refuses to be saved, so its weights go into one that does not
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
