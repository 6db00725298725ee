"""Folders that are made once and read by later runs: made apart, renamed when whole, checked before each use."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_info

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.leftovers import IN_USE, FolderInUse

# what every file of the folder has to be, by its name
MANIFEST = "manifest.json"


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder that holds everything cached.

    Args:
        cache_dir: the folder; `None` for `hift_lightning` in `$XDG_CACHE_HOME`, or in `~/.cache` where that is
            not set.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hift_lightning"


def made_once(folder: Path, make: Callable[[Path], None], setting: str) -> Path:
    """Return `folder`, made by `make` unless an earlier run has left it whole.

    It is made in a temporary folder beside it and renamed, so nobody ever reads a part of it, and of several
    processes that make it at one time the first one wins. A folder whose files are not, to the byte, what was
    written is made anew, with a message.

    Args:
        folder: where it lies; its name has to tell everything that it is made from.
        make: writes the files, without folders in it, into the folder that it is given.
        setting: the key of the configuration that moves the cache, for the message.

    Raises:
        ConfigurationError: it cannot be read or written.
    """
    try:
        flaw = _flaw(folder)
    except PermissionError as error:
        raise ConfigurationError(
            f"The cache `{folder}` cannot be read ({error.strerror}); have it made readable by its owner, or give "
            f"`{setting}=/path/to/folder` for another one."
        ) from error
    if flaw is None:
        return folder
    if folder.exists():
        rank_zero_info(f"The cache `{folder}` is broken ({flaw}) and is made anew.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        in_use = FolderInUse(folder.parent, f".{folder.name}-")
    except OSError as error:
        raise _not_writable(folder, setting, error) from error
    try:
        make(in_use.path)
        files = [path for path in sorted(in_use.path.iterdir()) if path.name != IN_USE]
        contents = {path.name: _fingerprint(path) for path in files}
        (in_use.path / MANIFEST).write_text(json.dumps(contents, indent=2), encoding="utf-8")
        if _flaw(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            # as open as the folder that it lies in, and writable by its owner alone: others may share the cache
            mode = folder.parent.stat().st_mode
            for path in (*files, in_use.path / MANIFEST):
                path.chmod(mode & 0o644)
            in_use.path.chmod(mode & 0o755)
            in_use.release()
            _rename(in_use.path, folder)
    except OSError as error:
        raise _not_writable(folder, setting, error) from error
    finally:
        in_use.remove()
    return folder


def digest_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flaw(folder: Path) -> str | None:
    """Say what is wrong with a folder, if anything."""
    try:
        contents = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in contents.items():
            if (folder / name).stat().st_size != size:
                return f"`{name}` has {(folder / name).stat().st_size} bytes instead of {size}"
            if digest_of_file(folder / name) != digest:
                return f"`{name}` is not what was written"
    except PermissionError:
        raise
    except FileNotFoundError as error:
        return f"`{Path(error.filename).name}` is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _fingerprint(path: Path) -> tuple[int, str]:
    return path.stat().st_size, digest_of_file(path)


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        # all is well if another process has put its own there in the meantime
        if _flaw(target) is not None:
            raise


def _not_writable(folder: Path, setting: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The cache `{folder}` cannot be written ({error}); give `{setting}=/path/to/folder` with space in it."
    )
