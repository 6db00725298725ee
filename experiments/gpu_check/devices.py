"""What the page asks of a device: bytes by its own counters and by its driver's, and marks in time."""

import contextlib
import gc
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hift_lightning.planner.gpus import needed_bytes
from tests import simulated_accelerator as sim


class Bytes(NamedTuple):
    """Memory, in bytes; the first three are the most since :meth:`Device.reset_peaks`."""

    allocated: int
    """Of tensors, as the allocator rounds them."""
    requested: int
    """Of tensors, as they were asked for."""
    reserved: int
    """That the allocator has taken from the driver."""
    driver: int
    """In use on the whole card at this moment, as the driver tells; with the context, and with other processes."""
    pinned: int
    """Of pinned host memory that its allocator holds at this moment; of small tensors it rounds up to powers of two."""
    retries: int
    """No bytes: how often the allocator has given all back that it had free to find what was asked for."""


class Device(ABC):
    """A device that is measured on.

    `type` is torch's name of it and Lightning's.
    """

    type: str

    @abstractmethod
    def missing(self) -> str | None:
        """One sentence on why there is none here and what to do; `None` where there is one."""

    @abstractmethod
    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, the device is measured on."""

    @property
    @abstractmethod
    def total_bytes(self) -> int:
        """Its memory."""

    @property
    @abstractmethod
    def free_bytes(self) -> int:
        """What of its memory nobody has."""

    @property
    @abstractmethod
    def driver_version(self) -> str:
        """As `nvidia-smi` tells it."""

    @abstractmethod
    def needed_bytes(self, peak_bytes: int) -> int:
        """Memory that it must have for a planned peak."""

    @abstractmethod
    def memory(self) -> Bytes:
        """What its counters say."""

    @property
    def name(self) -> str:
        """Of the card."""
        return str(self._module.get_device_name())

    def reset_peaks(self) -> None:
        """Count the most bytes from here on."""
        self._module.reset_peak_memory_stats()

    def synchronize(self) -> None:
        """Wait until it has done everything."""
        self._module.synchronize()

    def mark(self) -> Any:
        """A mark in the stream that computes, after all that was issued to it; see :meth:`milliseconds`."""
        event = self._module.Event(enable_timing=True)
        event.record(self._module.current_stream())
        return event

    def milliseconds(self, begin: Any, end: Any) -> float:
        """Between two marks, once the device has been waited for."""
        return float(begin.elapsed_time(end))

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.type)


class Cuda(Device):
    """The first CUDA device that is visible."""

    type = "cuda"

    def missing(self) -> str | None:
        if torch.cuda.is_available():
            return None
        return (
            f"There is no CUDA device here (torch {torch.__version__}); run this on a machine with one and with a "
            "CUDA build of torch, or try the same code on the simulated accelerator with `--device sim`."
        )

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        yield

    @property
    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info()[1]

    @property
    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    @property
    def driver_version(self) -> str:
        if shutil.which("nvidia-smi") is None:
            return "not told, since there is no nvidia-smi"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True, check=False)
        return told.stdout.splitlines()[0].strip() if told.returncode == 0 else "not told, since nvidia-smi failed"

    def needed_bytes(self, peak_bytes: int) -> int:
        return needed_bytes(peak_bytes)

    def memory(self) -> Bytes:
        counters = torch.cuda.memory_stats()
        free, total = torch.cuda.mem_get_info()
        return Bytes(
            allocated=counters["allocated_bytes.all.peak"],
            requested=counters["requested_bytes.all.peak"],
            reserved=counters["reserved_bytes.all.peak"],
            driver=total - free,
            pinned=torch.cuda.host_memory_stats()["allocated_bytes.current"],
            retries=counters["num_alloc_retries"],
        )


class Simulated(Device):
    """The simulated accelerator of the tests: it counts every byte, has no allocator of its own and no driver.

    Args:
        total_bytes: its memory.
    """

    type = "sim"

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._before = self._pinned_before = 0

    def missing(self) -> str | None:
        reason = sim.compiler_missing()
        return None if reason is None else f"{reason[0].upper()}{reason[1:]}."

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        sim.load()
        gc.collect()
        self._before, self._pinned_before = sim.memory_allocated(), sim.pinned_memory_allocated()
        sim.reset_peak_memory_stats()
        sim.set_memory_cap(self._before + self._total_bytes)
        try:
            yield
        finally:
            sim.set_memory_cap(None)

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    @property
    def free_bytes(self) -> int:
        return self._total_bytes

    @property
    def driver_version(self) -> str:
        return "none"

    def needed_bytes(self, peak_bytes: int) -> int:
        return peak_bytes

    def memory(self) -> Bytes:
        peak = sim.max_memory_allocated() - self._before
        return Bytes(
            allocated=peak,
            requested=peak,
            reserved=peak,
            driver=peak,
            pinned=sim.pinned_memory_allocated() - self._pinned_before,
            retries=0,
        )
