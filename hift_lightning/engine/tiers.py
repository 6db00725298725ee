"""Where parked tensors lie: in host memory, in files, or in a tier that a user registers.

A tier hands out buffers. A buffer is read and written a range of rows at a time, so that a large tensor need never be
in memory whole.
"""

import functools
import inspect
import os
import sys
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from hift_lightning.engine.errors import ConfigurationError, ParkedStateError
from hift_lightning.engine.leftovers import FolderInUse
from hift_lightning.engine.pinned import can_pin
from hift_lightning.engine.registry import Registry

ALL_ROWS = slice(None)


class Buffer(ABC):
    """A parked tensor."""

    tensor: Tensor
    """The parked tensor as a host tensor, for whoever reads it whole (a checkpoint); always the same one."""

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


MakeTier = Callable[..., Tier]
_AnyMakeTier = TypeVar("_AnyMakeTier", bound=MakeTier)

TIERS: Registry[MakeTier] = Registry("register_tier")
"""What makes the tiers, by name."""


def register_tier(name: str) -> Callable[[_AnyMakeTier], _AnyMakeTier]:
    """A decorator that makes a class (or a function that returns a :class:`Tier`) a place to park.

    ``offload="name"`` calls it without arguments, ``offload="name:where"`` with the string ``where``; once for each
    optimizer.

    Args:
        name: for ``offload=``.

    Raises:
        ConfigurationError: if another tier has this name.
    """
    return TIERS.register(name)


def check_offload(offload: str | Path) -> None:
    """Raise if parked state cannot be kept there.

    Args:
        offload: ``"none"`` keeps all state on the device, ``"cpu"`` parks it in host memory, the path of a folder
            (``"files:path"`` in full) in files; or what :func:`register_tier` says.

    Raises:
        ConfigurationError: for any other value.
    """
    _tier_of(offload)


def make_tier(offload: str | Path) -> Tier:
    """Make the place to park that a setting names; see :func:`check_offload`."""
    name, where = _tier_of(offload)
    return TIERS[name](*where)


def _tier_of(offload: str | Path) -> tuple[str, list[str]]:
    """The name of a tier, and the arguments to make it with."""
    name, colon, where = str(offload).partition(":")
    if name not in TIERS:
        is_path = isinstance(offload, str | os.PathLike)
        if not is_path or not Path(offload).is_dir():
            if is_path and "/" in str(offload) and not colon and not Path(offload).exists():
                raise ConfigurationError(
                    f"The folder `offload={str(offload)!r}` does not exist; make it, as with `mkdir -p {offload}`, or "
                    "name another."
                )
            shown = str(offload) if is_path else offload
            raise ConfigurationError(
                f"`offload={shown!r}` is no place to park optimizer state; choose one of {TIERS.names()}, the path of "
                "a folder that exists, or register a place with `register_tier`."
            )
        return "files", [str(offload)]
    arguments = [where] if colon else []
    try:
        inspect.signature(TIERS[name]).bind(*arguments)
    except TypeError as error:
        raise ConfigurationError(
            f"`offload={str(offload)!r}` does not fit the tier `{name}` ({error}); write `{name}` if it takes no "
            f"argument, `{name}:where` if it takes one (`files:/path/of/a/folder`)."
        ) from error
    return name, arguments


@register_tier("none")  # state stays on the device, and what has to be parked all the same (masters) lies here
@register_tier("cpu")
class HostMemory(Tier):
    """Host memory, pinned where the device can use that."""

    in_host_memory = True

    def allocate(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """See :meth:`Tier.allocate`; what can no longer be pinned lies in other memory, which a warning tells."""
        if can_pin(device.type):
            try:
                return HostBuffer(torch.empty_like(like, dtype=dtype, device="cpu", pin_memory=True))
            except RuntimeError as error:
                warnings.warn(
                    f"Host memory for what is parked can no longer be pinned ({str(error).splitlines()[0]}), so it is "
                    "copied more slowly; make more host memory free, or park in files (`offload`).",
                    stacklevel=2,
                )
        return HostBuffer(torch.empty_like(like, dtype=dtype, device="cpu"))

    def adopt(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """See :meth:`Tier.adopt`; a host tensor that is as it should be becomes the buffer itself, not a copy."""
        fits = tensor.device.type == "cpu" and tensor.dtype == dtype
        if fits and (tensor.is_pinned() or not can_pin(device.type)):
            return HostBuffer(tensor)
        return super().adopt(tensor, dtype, device)


class HostBuffer(Buffer):
    """A tensor in host memory.

    Args:
        tensor: the memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self, rows: slice = ALL_ROWS) -> Tensor:
        """See :meth:`Buffer.read`."""
        return self.tensor if rows == ALL_ROWS else self.tensor[rows]

    def write(self, values: Tensor, rows: slice = ALL_ROWS) -> None:
        """See :meth:`Buffer.write`."""
        self.read(rows).copy_(values, non_blocking=True)

    def check(self) -> None:
        """Does nothing, since memory is not lost."""


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions lie in memory in the order of this one's (``channels_last``).

    torch's fused optimizers go through the memory of weights, gradients and state side by side.
    """
    return torch.empty_like(tensor, device="meta").stride()


def has_rows_in_memory(tensor: Tensor) -> bool:
    """Whether the tensor has rows, and each lies in memory by itself and without gaps."""
    return tensor.dim() > 0 and tensor.numel() > 0 and tensor.stride(0) * tensor.shape[0] == tensor.numel()


@register_tier("files")
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
                f"`offload={str(folder)!r}` parks state in files with system calls that Windows lacks; use "
                "`offload='cpu'`."
            )
        try:
            in_use = FolderInUse(Path(folder).absolute(), "hift-parked-")
        except OSError as error:
            raise ConfigurationError(
                f"`offload={str(folder)!r}` cannot hold parked state ({error.strerror}); name a folder that exists and "
                "can be written to, or `offload='cpu'`."
            ) from error
        self.folder = in_use.path
        self._made = 0
        weakref.finalize(self, _unless_forked, os.getpid(), in_use.remove)

    def allocate(self, like: Tensor, dtype: torch.dtype, device: torch.device) -> Buffer:
        """See :meth:`Tier.allocate`.

        Raises:
            ParkedStateError: if the disk is full.
        """
        self._made += 1
        return _FileBuffer(self, self.folder / f"{self._made:06d}.bin", like, dtype)


def _unless_forked(process: int, remove: Callable[[], None]) -> None:
    """Remove what this process has made, and not at the end of one that was forked from it."""
    if os.getpid() == process:
        remove()


class _FileBuffer(Buffer):
    def __init__(self, tier: Files, path: Path, like: Tensor, dtype: torch.dtype) -> None:
        self._tier = tier  # the folder lives as long as a buffer in it
        self.path = path
        self._nbytes = like.numel() * dtype.itemsize
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            # takes the room now: a disk that is full must be told of here, and not by a signal at a mapped page
            os.posix_fallocate(descriptor, 0, max(self._nbytes, 1))
        except OSError as error:
            raise ParkedStateError(
                error.errno,
                f"no room for {self._nbytes:,} bytes of parked state: {error.strerror}; give `offload` a folder on a "
                "disk with more",
                str(path),
            ) from error
        finally:
            os.close(descriptor)
        # what is mapped of it stays
        weakref.finalize(self, _unless_forked, os.getpid(), functools.partial(path.unlink, missing_ok=True))
        flat = torch.from_file(str(path), shared=True, size=like.numel(), dtype=dtype)
        self.tensor = flat.as_strided(like.shape, dense_strides(like))

    def read(self, rows: slice = ALL_ROWS) -> Tensor:
        if not self._lie_together(rows):
            return self._rows(rows).clone()
        values = torch.empty_like(self._rows(rows))
        self._transfer(values, rows, os.O_RDONLY, os.preadv)
        return values

    def write(self, values: Tensor, rows: slice = ALL_ROWS) -> None:
        if not self._lie_together(rows):
            self._rows(rows).copy_(values)
            return
        values = values.to("cpu", self.tensor.dtype)
        if values.stride() != (like := self._rows(rows)).stride():
            values = torch.empty_like(like).copy_(values)
        self._transfer(values, rows, os.O_WRONLY, os.pwritev)

    def _rows(self, rows: slice) -> Tensor:
        return self.tensor if rows == ALL_ROWS else self.tensor[rows]

    def _lie_together(self, rows: slice) -> bool:
        """Whether they are one stretch of the file; otherwise they are reached through its map."""
        return rows == ALL_ROWS or has_rows_in_memory(self.tensor)

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
        offset = 0
        if rows != ALL_ROWS:
            all_rows = self.tensor.shape[0]
            offset = rows.indices(all_rows)[0] * (self._nbytes // all_rows)
        in_memory = values.as_strided((values.numel(),), (1,))  # in whatever order the dimensions lie there
        view = memoryview(in_memory.view(torch.uint8).numpy())  # type: ignore[arg-type]
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
