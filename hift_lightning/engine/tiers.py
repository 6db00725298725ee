"""Where parked tensors lie: in host memory or in files.

A tier hands out buffers. A buffer is read and written a range of rows at a time, so that a large tensor need never be
in memory whole.
"""

import os
import shutil
import sys
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hift_lightning.engine.errors import ConfigurationError, ParkedStateError
from hift_lightning.engine.leftovers import mark_in_use, remove_leftovers

ALL_ROWS = slice(None)


class Buffer(ABC):
    """A parked tensor."""

    tensor: Tensor
    """The parked tensor as a host tensor, for whoever reads it whole (a checkpoint)."""

    @abstractmethod
    def read(self, rows: slice = ALL_ROWS) -> Tensor:
        """Rows of the parked tensor, in host memory."""

    @abstractmethod
    def write(self, values: Tensor, rows: slice = ALL_ROWS) -> None:
        """Park values, from any device, as these rows."""

    @abstractmethod
    def check(self) -> None:
        """Raise :class:`ParkedStateError` if the tensor is lost."""


class Tier(ABC):
    """A place for parked tensors."""

    in_host_memory: bool
    """Whether a parked tensor is ordinary host memory, which a CPU device can compute on as it is."""

    @abstractmethod
    def allocate(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """Make a buffer.

        Args:
            like: a tensor of the shape and strides that will be parked; it may be on "meta".
            dtype: in which it is kept.
            device: where it will come from and go to.
        """

    def adopt(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """Make a buffer that holds a tensor; arguments as in :meth:`allocate`."""
        buffer = self.allocate(tensor, dtype, device)
        buffer.write(tensor)
        return buffer


class HostMemory(Tier):
    """Host memory, pinned where the device can use that."""

    in_host_memory = True

    def allocate(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """See :meth:`Tier.allocate`."""
        pin = can_pin(device.type)
        return _HostBuffer(torch.empty_like(like, dtype=dtype, device="cpu", pin_memory=pin))

    def adopt(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """See :meth:`Tier.adopt`; a host tensor that is as it should be becomes the buffer itself, not a copy."""
        fits = tensor.device.type == "cpu" and tensor.dtype == dtype
        if fits and (tensor.is_pinned() or not can_pin(device.type)):
            return _HostBuffer(tensor)
        return super().adopt(tensor, dtype, device)


class _HostBuffer(Buffer):
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self, rows: slice = ALL_ROWS) -> Tensor:
        return self.tensor if rows == ALL_ROWS else self.tensor[rows]

    def write(self, values: Tensor, rows: slice = ALL_ROWS) -> None:
        self.read(rows).copy_(values, non_blocking=True)

    def check(self) -> None:
        """Does nothing, since memory is not lost."""


class Files(Tier):
    """Files in a folder, one a tensor, read and written directly.

    They lie in a folder of their own that only the owner may enter, and go when nothing refers to them any more. Those
    of a process that was killed go when the next one parks in the same folder.

    Args:
        folder: an existing folder on a disk with room for the parked state.

    Raises:
        ConfigurationError: if the folder does not exist or cannot be written to, and on Windows.
    """

    in_host_memory = False

    def __init__(self, folder: str | Path) -> None:
        if sys.platform == "win32":
            raise ConfigurationError(
                f"`offload={str(folder)!r}` parks state in files by calls that Windows has not; use `offload='cpu'`."
            )
        try:
            remove_leftovers(Path(folder).glob(f"{_PREFIX}*/{_LOCK}"), lambda lock: shutil.rmtree(lock.parent))
            self.folder, lock = _new_locked_folder(Path(folder))
        except OSError as error:
            raise ConfigurationError(
                f"`offload={str(folder)!r}` cannot hold parked state ({error.strerror}); name a folder that exists and "
                "can be written to, or `offload='cpu'`."
            ) from error
        self._made = 0
        weakref.finalize(self, _remove, self.folder, lock)

    def allocate(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """See :meth:`Tier.allocate`.

        Raises:
            ParkedStateError: if the disk is full.
        """
        self._made += 1
        return _FileBuffer(self, self.folder / f"{self._made:06d}.bin", tuple(like.shape), dtype)


_PREFIX, _LOCK = "hift-parked-", "in-use"


def _new_locked_folder(parent: Path) -> tuple[Path, int]:
    """Make a folder with a file in it that is locked for as long as this process has it open."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        if mark_in_use(lock):
            return folder, lock
        os.close(lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


class _FileBuffer(Buffer):
    def __init__(self, tier: Files, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._tier = tier  # the folder lives as long as a buffer in it
        self.path, self.shape, self.dtype = path, shape, dtype
        self._nbytes = torch.Size(shape).numel() * dtype.itemsize
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            # takes the room now: a disk that is full must be told of here, and not by a signal at a mapped page
            os.posix_fallocate(descriptor, 0, max(self._nbytes, 1))
        except OSError as error:
            raise ParkedStateError(
                error.errno, f"no room for {self._nbytes:,} bytes of parked state: {error.strerror}", str(path)
            ) from error
        finally:
            os.close(descriptor)
        self.tensor = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=dtype).view(shape)

    def read(self, rows: slice = ALL_ROWS) -> Tensor:
        values = torch.empty_like(self.tensor[rows] if self.shape else self.tensor)
        self._transfer(values, rows, os.O_RDONLY, os.preadv)
        return values

    def write(self, values: Tensor, rows: slice = ALL_ROWS) -> None:
        self._transfer(values.to("cpu", self.dtype).contiguous(), rows, os.O_WRONLY, os.pwritev)

    def check(self) -> None:
        try:
            length = self.path.stat().st_size
        except OSError as error:
            raise self._gone(error) from error
        if length < self._nbytes:
            raise self._too_short(self._nbytes)

    def _gone(self, error: OSError) -> ParkedStateError:
        return ParkedStateError(error.errno, f"a file of parked state is gone: {error.strerror}", str(self.path))

    def _too_short(self, expected: int) -> ParkedStateError:
        return ParkedStateError(f"a file of parked state is too short: {self.path} ends before byte {expected:,}")

    def _transfer(
        self, values: Tensor, rows: slice, flags: int, transfer: Callable[[int, list[memoryview], int], int]
    ) -> None:
        if values.numel() == 0:
            return
        start = rows.indices(self.shape[0])[0] if self.shape else 0
        offset = start * (self._nbytes // self.shape[0]) if self.shape else 0
        view = memoryview(values.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        try:
            descriptor = os.open(self.path, flags)
        except OSError as error:
            raise self._gone(error) from error
        try:
            done = 0
            while done < len(view):
                try:
                    count = transfer(descriptor, [view[done:]], offset + done)
                except OSError as error:
                    failed = f"a file of parked state can be read or written no more: {error.strerror}"
                    raise ParkedStateError(error.errno, failed, str(self.path)) from error
                if count == 0:
                    raise self._too_short(offset + len(view))
                done += count
        finally:
            os.close(descriptor)


_pinning: dict[str, bool] = {}


def can_pin(device_type: str) -> bool:
    """Whether host memory can be pinned for this kind of device; asked of the device once, by trying."""
    if device_type not in _pinning:
        accelerator = torch.accelerator.current_accelerator()
        _pinning[device_type] = accelerator is not None and accelerator.type == device_type and _try_to_pin()
    return _pinning[device_type]


def _try_to_pin() -> bool:
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):  # backends without pinned memory say so in either way
        return False
