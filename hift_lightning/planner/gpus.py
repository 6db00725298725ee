"""Which GPUs a peak fits."""

from dataclasses import dataclass

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class GPU:
    """A kind of GPU and the memory that its driver tells."""

    name: str
    mebibytes: int

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.mebibytes * MIB


GPUS = (
    GPU("RTX 4060, 8 GB", 8188),
    GPU("RTX 3060, 12 GB", 12288),
    GPU("RTX 4080, 16 GB", 16376),
    GPU("RTX A4500, 20 GB", 20470),
    GPU("RTX 4090, 24 GB", 24564),
    GPU("RTX 3090, 24 GB", 24576),
    GPU("RTX 5090, 32 GB", 32607),
    GPU("A100, 40 GB", 40960),
    GPU("L40S, 48 GB", 46068),
    GPU("RTX A6000, 48 GB", 49140),
    GPU("H100, 80 GB", 81559),
    GPU("A100, 80 GB", 81920),
)
"""From the smallest memory to the largest."""

CONTEXT_BYTES = GIB
"""Allowed for the driver's context and the libraries' kernels and workspaces."""

FRAGMENTATION = 0.03
"""Allowed for what the caching allocator rounds up and cannot use, as a share of the peak."""


def needed_bytes(peak_bytes: int) -> int:
    """Memory that a GPU must have, with the allowance.

    Args:
        peak_bytes: the most bytes of tensors in use.
    """
    return round(peak_bytes * (1 + FRAGMENTATION)) + CONTEXT_BYTES
