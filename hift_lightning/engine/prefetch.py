"""Optimizer state that comes to the device while backward still goes on."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from hift_lightning.engine.residency import Residency
from hift_lightning.engine.streams import SideStream


class StatePrefetch:
    """Pages a parameter's state in as soon as its gradient is there, if that cannot raise the peak of memory.

    It does so only within :meth:`allowed`, which the engine enters for the last backward before a step: state that
    came earlier would lie beside the next micro-batch's activations.

    Args:
        residency: what pages in.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._side: SideStream | None = None
        self._allowed = False

    def applies_to(self, parameter: Tensor) -> bool:
        """Whether the parameter has parked state that would be copied to a device."""
        return parameter.device.type != "cpu" and self._residency.is_parked(parameter)

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Within it, the last backward before a step runs."""
        self._allowed = True
        try:
            yield
        finally:
            self._allowed = False

    def page_in(self, parameter: Tensor, gradients_to_come: int) -> None:
        """Begin to copy the parameter's state to its device, beside what is computed, if the peak stays as it is.

        Args:
            parameter: whose gradient has just been computed.
            gradients_to_come: bytes of the block's gradients that this backward has not made yet.
        """
        if not self._allowed:
            return
        side = self._side = self._side or SideStream(parameter.device)
        if self._residency.device_bytes(parameter) + gradients_to_come > side.spare_bytes():
            return

        def copy_beside_backward(source: Tensor, dtype: torch.dtype) -> Tensor:
            target = torch.empty_like(source, dtype=dtype, device=parameter.device)
            with side.copying():
                return target.copy_(source, non_blocking=True)

        self._residency.page_in([parameter], copy_beside_backward)

    def join(self) -> None:
        """Make what is issued from now on wait for the copies."""
        if self._side is not None:
            self._side.join()
