"""Pinned host memory, from and to which a device copies without waiting, and without what torch's allocator wastes.

torch takes a power of two of bytes for each pinned tensor (https://github.com/pytorch/pytorch/issues/150517): 256 MiB
for each of the 288 moments and masters of 172 MiB of LLaMA-7B. So slabs of such sizes are taken, and tensors lie in
them.
"""

import torch
from torch import Tensor, UntypedStorage

_ALIGNMENT = 64
"""Bytes: where tensors may begin."""

SMALLEST_SLAB, LARGEST_SLAB = 2**20, 2**30
"""Bytes. Slabs grow with what has been taken, so that little of the last one is left over."""

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


class PinnedMemory:
    """Hands out pinned tensors, each in the first slab that has room for it.

    What was handed out is not taken back: a slab is freed when this object and all tensors in it are gone.
    """

    def __init__(self) -> None:
        self._rests: list[UntypedStorage] = []
        self._taken = 0

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor without values yet.

        It has a storage of its own, of its size, so whoever saves it saves no other.

        Args:
            like: a tensor of its shape and strides; it may be on "meta".
            dtype: its dtype.
        """
        shape = torch.empty_like(like, dtype=dtype, device="meta")
        tensor = torch.empty(0, dtype=dtype)
        memory = self._take(shape.nbytes) if shape.nbytes else tensor.untyped_storage()
        return tensor.set_(memory, 0, shape.shape, shape.stride())

    def _take(self, nbytes: int) -> UntypedStorage:
        i = next((i for i, rest in enumerate(self._rests) if rest.nbytes() >= nbytes), len(self._rests))
        if i == len(self._rests):
            # a power of two within a 32nd and a 16th of what has been taken, or one that the tensor fits into
            growing = min(1 << self._taken.bit_length() >> 5, LARGEST_SLAB)
            slab = max(1 << (nbytes - 1).bit_length(), growing, SMALLEST_SLAB)
            self._taken += slab
            self._rests.append(torch.empty(slab, dtype=torch.uint8, pin_memory=True).untyped_storage())
        rest = self._rests[i]
        end = min(-(-nbytes // _ALIGNMENT) * _ALIGNMENT, rest.nbytes())
        self._rests[i : i + 1] = [rest[end:]] if end < rest.nbytes() else []
        taken: UntypedStorage = rest[:nbytes]
        return taken
