"""Bytes on the simulated accelerator in each phase of a step, bytes moved, and FLOPs."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests import simulated_accelerator as sim


class StepBytes(NamedTuple):
    """What one optimizer step did on the device. Bytes in use count from before the model came there."""

    forward_backward: int
    """Most bytes in use from the beginning of the step to the end of backward."""
    update: int
    """Most bytes in use from there to the end of the step."""
    left: int
    """Bytes in use at the end of the step, without the model's weights and buffers and the batch."""
    to_device: int
    """Bytes copied from the host, without the batch."""
    to_host: int
    """Bytes copied to the host, without scalars that are read."""


class Meter:
    """Told of the phases of each step, it notes the bytes.

    Make it before the model is put on the device.
    """

    def __init__(self) -> None:
        self.steps: list[StepBytes] = []
        self.phase = "before training"
        """Where the step in progress is."""
        self._before = sim.memory_allocated()
        self._resident = 0

    def model_is_on_device(self, model: nn.Module) -> None:
        """From here on the model's tensors count as weights, and everything else as left over."""
        self._resident = nbytes([*model.parameters(), *model.buffers()])

    def begin_step(self, batch: Tensor) -> None:
        """The batch is on the device."""
        self._batch = batch.nbytes
        sim.reset_copy_counters()
        sim.reset_peak_memory_stats()
        self.phase = "forward + backward"

    def end_backward(self) -> None:
        self._forward_backward = sim.max_memory_allocated() - self._before
        sim.reset_peak_memory_stats()
        self.phase = "update"

    def end_step(self) -> None:
        self.steps.append(
            StepBytes(
                forward_backward=self._forward_backward,
                update=sim.max_memory_allocated() - self._before,
                left=sim.memory_allocated() - self._before - self._resident - self._batch,
                to_device=sim.host_to_device_bytes(),
                to_host=sim.device_to_host_bytes(),
            )
        )


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def flop_counter() -> FlopCounterMode:
    """Counts the FLOPs of matrix products, attention's included.

    torch knows no formula for the attention kernel of the CPU, which the simulated accelerator takes. Its backward
    counts as twice the forward, as for any matrix product; what the kernel computes anew inside is left out.
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
        },
    )


def _attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * math.prod(query) * key[-2]  # two products, of two FLOPs for each multiplication


def _attention_backward_flops(gradient: torch.Size, query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * _attention_flops(query, key)
