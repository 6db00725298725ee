"""The device that a test runs on: the CPU, the simulated accelerator, or CUDA where there is one."""

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tests import simulated_accelerator as sim


class Device:
    """What the tests ask of a device.

    ``type`` is torch's name of it and Lightning's. Bytes are those of the device's own counters.
    """

    type = "cpu"
    rounding = 1
    """Every allocation takes a multiple of so many bytes."""
    scalars = 256
    """Most bytes that a loss, a norm and the like may take."""

    def missing(self) -> str | None:
        """Why there is no such device here."""
        return None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        yield

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes that these tensors, or others of their shapes and dtypes, take on the device."""
        return sum(-(-tensor.nbytes // self.rounding) * self.rounding for tensor in tensors)

    def allocated(self) -> int:
        return torch.get_device_module(self.type).memory_allocated()

    def peak(self) -> int:
        return torch.get_device_module(self.type).max_memory_allocated()

    def reset_peak(self) -> None:
        torch.get_device_module(self.type).reset_peak_memory_stats()

    def cap_here(self) -> None:
        """From now on nothing can be allocated but what is freed first; until `no_cap`."""
        raise NotImplementedError

    def no_cap(self) -> None:
        raise NotImplementedError


class Simulated(Device):
    """Counts every byte."""

    type = "sim"

    def missing(self) -> str | None:
        return sim.compiler_missing()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        sim.load()
        try:
            yield
        finally:
            self.no_cap()

    def cap_here(self) -> None:
        gc.collect()
        sim.set_memory_cap(self.allocated())

    def no_cap(self) -> None:
        sim.set_memory_cap(None)


class Cuda(Device):
    """Counts the blocks of its caching allocator.

    Up to 1 MiB, which is more than any tensor of these tests has, a block is the tensor's bytes rounded up to 512.
    """

    type = "cuda"
    rounding = 512
    scalars = 8 * 512

    def __init__(self) -> None:
        self._ballast: list[Tensor] = []

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "there is no CUDA device"

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or the next line makes matrix products raise
        torch.use_deterministic_algorithms(True)
        # each thread's first matrix product allocates a workspace that stays
        torch.nn.Linear(8, 8, device="cuda")(torch.ones(8, 8, device="cuda")).sum().backward()
        try:
            yield
        finally:
            self.no_cap()
            torch.use_deterministic_algorithms(False)

    def cap_here(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
        # The limit is on what the allocator holds, so what it holds and nobody uses is taken too. It keeps blocks
        # of more than 1 MiB apart from smaller ones.
        for size in (
            *(2**power for power in range(30, 20, -1)),
            2**20 + 512,
            *(2**power for power in range(20, 8, -1)),
        ):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    self._ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    def no_cap(self) -> None:
        self._ballast.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)


DEVICES = {device.type: device for device in (Device, Simulated, Cuda)}
