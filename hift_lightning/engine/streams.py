"""Copies beside the compute, on a stream of their own where the device has streams."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


def device_module(device: torch.device) -> Any:
    """``torch.cuda`` or the like; ``None`` for the CPU, and where torch has no module for this kind of device."""
    return None if device.type == "cpu" else getattr(torch, device.type, None)


class DeviceMemory(NamedTuple):
    """Bytes of a device's memory, by the names of ``torch.cuda.memory_stats``; not rounded up, where it tells these."""

    current: int
    peak: int
    allocated: int
    """All that has been allocated so far, including memory freed since."""


class SideStream:
    """A stream for copies; on a device without streams everything happens in order anyway.

    Args:
        device: where to and from is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = device_module(device)
        make_stream = getattr(self._module, "Stream", None) if hasattr(self._module, "stream") else None
        self._stream: Any = None if make_stream is None else make_stream(device=device)

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Within it, copies are issued on the side stream, after all that has been issued so far.

        Memory that they write to has to be allocated outside of it, so that it belongs to the stream that uses it.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            yield

    def join(self) -> None:
        """Make what is issued from now on wait for the copies."""
        if self._stream is not None:
            self._module.current_stream(self._device).wait_stream(self._stream)

    def memory(self) -> DeviceMemory | None:
        """What the device counts of its memory; ``None`` where it keeps no count."""
        if not hasattr(self._module, "memory_stats"):
            return None
        stats = self._module.memory_stats(self._device)
        # blocks of CUDA's allocator are rounded up by as much as is left of what they are cut from
        kind = "requested_bytes" if "requested_bytes.all.allocated" in stats else "allocated_bytes"
        memory = DeviceMemory(*(int(stats.get(f"{kind}.all.{count}", 0)) for count in DeviceMemory._fields))
        return memory if memory.allocated else None  # other allocators leave counts at 0
