"""Bytes on the simulated accelerator in each phase of a step, and bytes moved."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

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
