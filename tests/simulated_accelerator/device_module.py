"""What `torch.sim` offers, in the shape of `torch.cuda`: one device, which has done everything when a call returns."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tests.simulated_accelerator.backend import native

Stream = torch.Stream
Event = torch.Event


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    _check_index(device)


class device(contextlib.nullcontext[None]):
    def __init__(self, device: Any) -> None:
        super().__init__()
        _check_index(device)


def _check_index(device: Any) -> None:
    index = device if isinstance(device, int) else torch.device(device).index
    if index not in (None, -1, 0):
        raise ValueError(f"there is one simulated device, `sim:0`, not `{device}`")


def get_device_name(device: Any = None) -> str:
    return "simulated accelerator"


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def is_bf16_supported() -> bool:
    return True


def synchronize(device: Any = None) -> None:
    pass


def current_stream(device: Any = None) -> torch.Stream:
    return torch.accelerator.current_stream()


def default_stream(device: Any = None) -> torch.Stream:
    return torch.Stream(stream_id=0, device_index=0, device_type=torch._C._autograd.DeviceType.PrivateUse1.value)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = current_stream()
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


# The device draws its random numbers from the CPU's generator, so its state is the state.
def get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state()]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    for state in new_states:
        set_rng_state(state)


def initial_seed() -> int:
    return torch.default_generator.initial_seed()


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


manual_seed_all = manual_seed


def empty_cache() -> None:
    pass


def memory_allocated(device: Any = None) -> int:
    """Bytes of the device in use: every tensor, and what a running op has allocated for itself."""
    return native().memory_allocated()


def max_memory_allocated(device: Any = None) -> int:
    """The most bytes in use since the process began, or since `reset_peak_memory_stats`."""
    return native().max_memory_allocated()


def reset_peak_memory_stats(device: Any = None) -> None:
    native().reset_peak_memory_stats()


def memory_stats(device: Any = None) -> dict[str, int]:
    return {
        "allocated_bytes.all.current": memory_allocated(),
        "allocated_bytes.all.peak": max_memory_allocated(),
        "allocated_bytes.all.allocated": native().total_memory_allocated(),
    }
