"""Pinned host memory, from and to which a device copies while the host goes on."""

import re

import torch

_ROUNDED_MIB = 64
"""Up to which torch may round the size of a pinned tensor: such are batches of data loaders, which take turns in it."""

_pinning: dict[str, bool] = {}


def can_pin(device_type: str) -> bool:
    """Whether host memory can be pinned for this kind of device; asked of the device once, by trying.

    From then on torch pins what is large in its own size, and gives it back when it is freed. By itself it takes the
    next power of two of bytes for every pinned tensor (https://github.com/pytorch/pytorch/issues/150517): 256 MiB for
    each of the 288 moments and masters of LLaMA-7B that have 172 MiB. Were memory of odd sizes kept for others, torch
    2.13 would give it to larger tensors too (https://github.com/pytorch/pytorch/pull/192722).
    """
    if device_type not in _pinning:
        accelerator = torch.accelerator.current_accelerator()
        _pinning[device_type] = accelerator is not None and accelerator.type == device_type and _try_to_pin()
        if _pinning[device_type]:
            _pin_in_own_size()
    return _pinning[device_type]


def _try_to_pin() -> bool:
    try:
        return torch.empty(1, device="cpu", pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):  # backends without pinned memory say so in either way
        return False


def _pin_in_own_size() -> None:
    # what the user has set stays; torch takes some settings back that are not named again
    settings = torch._C._accelerator_getAllocatorSettings()
    if "pinned_max_cached_size_mb" in settings:
        return
    given = re.search(r"pinned_max_round_threshold_mb:(\d+)", settings)
    own = [f"pinned_max_cached_size_mb:{given[1] if given else _ROUNDED_MIB}"]
    if given is None:
        own.append(f"pinned_max_round_threshold_mb:{_ROUNDED_MIB}")
    torch._C._accelerator_setAllocatorSettings(",".join([*([settings] if settings else []), *own]))
