"""A second device on a machine that has none: torch's device type `sim`, whose memory is host memory, counted exactly.

    from tests import simulated_accelerator

    simulated_accelerator.load()
    x = torch.randn(1024, device="sim")
    simulated_accelerator.memory_allocated()  # 4096

Every op is the CPU's own kernel, so results equal those of a CPU run bit for bit, random numbers included. What a
kernel allocates for itself counts as the device's while it runs. Mixing devices in an op raises, as on CUDA.
Where torch itself goes another way on an accelerator, so does this device: optimizers and norm clipping take the
foreach implementation by default, dropout keeps a mask of one byte an element, autocast follows CUDA's lists of ops.
LSTM and GRU modules and sparse tensors are not supported, and gradients of `RNN` differ from the CPU's in the last bit.
Fake tensors of the device work, so one process can use both.
"""

from tests.simulated_accelerator.accelerator import SimulatedAccelerator
from tests.simulated_accelerator.backend import compiler_missing, load, native
from tests.simulated_accelerator.device_module import (
    max_memory_allocated,
    memory_allocated,
    reset_peak_memory_stats,
)

__all__ = [
    "SimulatedAccelerator",
    "compiler_missing",
    "device_to_host_bytes",
    "host_to_device_bytes",
    "load",
    "max_memory_allocated",
    "memory_allocated",
    "pinned_memory_allocated",
    "reset_copy_counters",
    "reset_peak_memory_stats",
    "scalars_read",
    "set_memory_cap",
]


def set_memory_cap(bytes_in_use: int | None) -> None:
    """Makes an allocation that would take the device beyond so many bytes raise `torch.OutOfMemoryError`.

    Args:
        bytes_in_use: The cap in bytes; `None` takes it away.

    """
    native().set_memory_cap(bytes_in_use)


def host_to_device_bytes() -> int:
    """Bytes copied from host to device since `reset_copy_counters`, in the dtype of the destination.

    Index tensors on the CPU that an op moves by itself are counted too; 0-dimensional CPU tensors are not.
    """
    return native().host_to_device_bytes()


def device_to_host_bytes() -> int:
    """Bytes copied from device to host since `reset_copy_counters`, without the scalars that `.item()` reads."""
    return native().device_to_host_bytes()


def scalars_read() -> int:
    """How many scalars were read with `.item()` or the like since `reset_copy_counters`."""
    return native().scalars_read()


def reset_copy_counters() -> None:
    """Sets the bytes copied and the scalars read to 0."""
    native().reset_copy_counters()


def pinned_memory_allocated() -> int:
    """Bytes of pinned host memory in use."""
    return native().pinned_memory_allocated()
