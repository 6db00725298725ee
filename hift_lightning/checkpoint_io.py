"""Checkpoints in local files: written in a stream, put in place at once, and checked before anything is loaded."""

import contextlib
import errno
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from torch.serialization import get_crc32_options, set_crc32_options
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError, chain
from hift_lightning.engine.leftovers import mark_in_use, remove_leftovers

# Hidden, without the name or the suffix of a checkpoint: ModelCheckpoint, the Trainer's search for the checkpoint of a
# requeued job (`hpc_ckpt_` anywhere in a name) and ours (`*.ckpt`) pass over it.
_TEMPORARY = ".hift-saving-"

# A module and HiFT's engines copy what they load, one tensor at a time; others keep the tensors that they are given.
_COPIED_BY_WHO_LOADS = {"state_dict", "optimizer_states", "engines"}
_HIFT = "hift"

META = "meta.pt"
"""What is no sharded tensor in the folders of sharded runs, as of Lightning's own."""

_ZIP = b"PK\x03\x04"
_FOLDER = 0x10


def refuse_folder(path: Path) -> None:
    """Refuse the folder of a sharded run, which other strategies cannot load.

    Raises:
        ConfigurationError: it is one.
    """
    if (path / META).is_file():
        raise ConfigurationError(
            f"The checkpoint `{path}` is the folder of a sharded run, and `strategy='hift_fsdp2'` loads it, on one "
            "device too; for a single file, go on from it there with `save_distributed_checkpoint=False`."
        )


class StreamingCheckpointIO(TorchCheckpointIO):
    """Saves checkpoints without a copy in memory and never half, and loads only whole ones that run no code.

    *Saving* writes straight into a temporary file in the same folder, which only its owner may read, syncs it to the
    disk and renames it, so under the checkpoint's name there is the former file or the whole new one. Tensors are
    written from where they are, mapped files included. When saving fails, or the process is killed, the former file
    stays; the temporary file of a killed process goes at the next save into its folder.

    *Loading* first compares every record of the file with its CRC-32, in a stream (:meth:`check`), since
    :func:`torch.load` takes a flipped bit for a weight. Then the file is mapped and read with ``weights_only=True``
    unless the caller says ``False``: unpickling arbitrary objects runs their code. The model's weights, optimizer
    states and masters are given out as parts of the mapped file, whatever device they were saved from; all other
    tensors as copies, so that nobody who keeps one keeps the file mapped.

    Paths on other file systems (``s3://...``) and saving on Windows are left to Lightning's own way.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: what :func:`torch.save` takes.
            path: of the file; its folder is made where it does not exist.
            storage_options: not taken, as by Lightning's own class.

        Raises:
            ConfigurationError: if the file cannot be written; a former file of this name is as it was.
            TypeError: if ``storage_options`` are given.
        """
        local = _local_path(path)
        if local is None or storage_options is not None or sys.platform == "win32":
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(local.parent.glob(f"{_TEMPORARY}*"), Path.unlink)
            _save(checkpoint, local)
        except (OSError, RuntimeError) as error:
            # torch raises an error of its own on top of what stopped the writing, also on top of Ctrl-C
            cause = next((link for link in chain(error) if not isinstance(link, RuntimeError)), error)
            if not isinstance(cause, OSError):
                raise cause from None
            name = errno.errorcode.get(cause.errno or 0, "no errno")
            former = "; the one saved there before is unharmed" if local.is_file() else ""
            raise ConfigurationError(
                f"The checkpoint `{local}` could not be saved ({name}: {cause.strerror or cause}){former}; make room "
                "or mend the folder, or save to another one."
            ) from error

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint.

        Args:
            path: of the file.
            map_location: as for :func:`torch.load`.
            weights_only: ``False`` also loads objects whose unpickling runs code; ``None`` is ``True``.

        Raises:
            FileNotFoundError: if there is no such file.
            ConfigurationError: if it is not whole, was not written by :func:`torch.save`, or holds other things than
                tensors and primitives.
        """
        weights_only = weights_only is not False
        local = _local_path(path)
        if local is None:
            return super().load_checkpoint(path, map_location, weights_only)
        self.check(local)
        checkpoint = _loaded(local, map_location, weights_only)
        if isinstance(checkpoint, dict):
            for part in (checkpoint, checkpoint.get(_HIFT, {})):
                for key in part.keys() - _COPIED_BY_WHO_LOADS - {_HIFT}:
                    part[key] = tree_map_only(torch.Tensor, torch.clone, part[key])
        return checkpoint

    @classmethod
    def outline(cls, path: str | Path) -> dict[str, Any]:
        """Load a local checkpoint with all its tensors on "meta", which is quick: none of their bytes is read.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ConfigurationError: if its beginning or its directory is damaged, or it is something else (see
                :meth:`load_checkpoint`).
        """
        cls.check(path, contents=False)
        outline = _loaded(Path(path), "meta", weights_only=True)
        if not isinstance(outline, dict) or not isinstance(outline.get("state_dict"), dict):
            raise ConfigurationError(
                f"`{path}` is no checkpoint of a Trainer: it has no `state_dict`; give the path of one that is."
            )
        return outline

    @staticmethod
    def check(path: str | Path, *, contents: bool = True) -> None:
        """Raise unless a local file is a whole checkpoint; its bytes are read once, and nothing in it is run.

        Args:
            path: of the file.
            contents: ``False`` looks at its beginning and its directory alone, which is quick.

        Raises:
            FileNotFoundError: if there is no such file.
            ConfigurationError: if it is empty, cut short, damaged, or something else.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        refuse_folder(path)
        try:
            with path.open("rb") as file:
                start = file.read(len(_ZIP))
        except OSError as error:
            raise ConfigurationError(
                f"The checkpoint `{path}` cannot be read ({error.strerror}); give the path of a file that can."
            ) from error
        if not start:
            raise _not_whole(path, "the file is empty")
        if start != _ZIP:
            raise ConfigurationError(
                f"`{path}` is no checkpoint: it begins with {start!r} and not as files of `torch.save` do; give the "
                "path of a checkpoint (one written by torch older than 1.6 must be saved anew with it)."
            )
        try:
            with zipfile.ZipFile(path) as records:
                names = records.namelist()
                # torch's own reader takes a record that is marked as a folder for one without bytes
                folders = [record.filename for record in records.infolist() if record.external_attr & _FOLDER]
                damaged = (records.testzip() if contents else None) or next(iter(folders), None)
                stored = all(record.compress_type == zipfile.ZIP_STORED for record in records.infolist())
        except Exception as error:  # flipped bits in its directory make the reader raise many unrelated types
            raise _not_whole(path, f"it is cut short or its directory is damaged: {_reason(error)}") from error
        if damaged is not None:
            raise _not_whole(path, f"its record `{damaged}` is damaged")
        if sum(name.count("/") == 1 and name.endswith("/data.pkl") for name in names) != 1 or not stored:
            raise ConfigurationError(
                f"`{path}` is no checkpoint: it is a zip archive, but not one of `torch.save`; give the path of a "
                "checkpoint."
            )


def _loaded(path: Path, map_location: Any, weights_only: bool) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)
    except Exception as error:  # records that contradict each other make torch raise many unrelated types
        if not weights_only:
            raise
        if not isinstance(error, pickle.UnpicklingError):
            raise ConfigurationError(
                f"The checkpoint `{path}` cannot be loaded ({_reason(error)}); give one that `torch.save` wrote."
            ) from error
        raise ConfigurationError(
            f"The checkpoint `{path}` holds something else than tensors and primitives "
            f"({_reason(error)}), and loading that could run code; if you trust where it comes from, pass "
            "`weights_only=False`, otherwise do not load it."
        ) from error
    return checkpoint


def _local_path(path: _PATH) -> Path | None:
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    descriptor, temporary = _new_temporary(path.parent)
    try:
        with open(descriptor, "wb") as file:
            with _with_checksums():
                torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _new_temporary(folder: Path) -> tuple[int, Path]:
    """Make a file and lock it for as long as it is open, which tells it from a leftover."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=folder)
        if mark_in_use(descriptor):
            return descriptor, Path(name)
        os.close(descriptor)


@contextlib.contextmanager
def _with_checksums() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(True)
    try:
        yield
    finally:
        set_crc32_options(before)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # so some network file systems say that they do not sync folders
            raise
    finally:
        os.close(descriptor)


def _not_whole(path: Path, flaw: str) -> ConfigurationError:
    return ConfigurationError(
        f"The checkpoint `{path}` is not whole ({flaw}); go on from an earlier one, or copy it again from where it is "
        "whole."
    )


def _reason(error: BaseException) -> str:
    """The heart of a long message: the name that is not allowed, or the first sentence."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return f"`{refused[1]}`"
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
