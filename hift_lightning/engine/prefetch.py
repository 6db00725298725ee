"""Optimizer state that comes to the device while backward still goes on."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hift_lightning.engine.residency import Residency
from hift_lightning.engine.streams import SideStream

_DRIFT = 4096
"""Bytes by which memory in use may differ from step to step, as by what a metric keeps."""


class _Moment(NamedTuple):
    """When a parameter's gradient is there; bytes are those on the device without state that has come early."""

    parameter: Tensor
    in_use: int
    allocated: int
    """In the process so far."""


class _Known(NamedTuple):
    """What has been seen of the steps so far, from a parameter's gradient to the update."""

    at_gradient: int
    """Most bytes in use when the gradient was there."""
    at_most: int
    """Bytes that were in use at most afterwards."""


class StatePrefetch:
    """Pages a parameter's state in as soon as its gradient is there, if that cannot raise the peak of memory.

    What else will be allocated before the update is known from earlier visits of the block: between two gradients no
    more is in use than at the first of them and all that is allocated until the second.

    It does so only within :meth:`allowed`, which the engine enters for the last backward before a step: state that
    came earlier would lie beside the next micro-batch's activations.

    Args:
        residency: what pages in.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._side: SideStream | None = None
        self._allowed = False
        self._moments: list[_Moment] = []  # of the step in progress
        self._early = 0  # bytes of state that has come early in it
        self._known: dict[Tensor, _Known] = {}

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

    def page_in(self, parameter: Tensor) -> None:
        """Begin to copy the parameter's state to its device, beside what is computed, if the peak stays as it is.

        Args:
            parameter: whose gradient has just been computed.
        """
        if not self._allowed:
            return
        side = self._side = self._side or SideStream(parameter.device)
        if (memory := side.memory()) is None:
            return
        moment = _Moment(parameter, memory.current - self._early, memory.allocated - self._early)
        self._moments.append(moment)
        if (known := self._known.get(parameter)) is None:
            return
        more = max(0, moment.in_use - known.at_gradient)
        state = self._residency.device_bytes(parameter) + self._residency.conversion_bytes(parameter)
        if more > _DRIFT or known.at_most + more + self._early + state > memory.peak:
            return

        def copy_beside_backward(source: Tensor, dtype: torch.dtype) -> Tensor:
            target = torch.empty_like(source, dtype=dtype, device=parameter.device)
            with side.copying():
                return target.copy_(source, non_blocking=True)

        try:
            self._residency.page_in([parameter], copy_beside_backward)
        except torch.OutOfMemoryError:  # memory is in pieces, and at the update more of it is free
            side.join()
            self._known[parameter] = known._replace(at_most=sys.maxsize)  # so that it is not tried again
            return
        after = side.memory()
        assert after is not None
        self._early += after.current - memory.current

    def update_begins(self) -> None:
        """Learn from the backward pass that has ended what there is room for in the next one of this block."""
        if not self._moments:
            return
        assert self._side is not None
        if (memory := self._side.memory()) is None:  # its counts have been set back since
            self._moments, self._early = [], 0
            return
        end = _Moment(self._moments[-1].parameter, memory.current - self._early, memory.allocated - self._early)
        at_most = end.in_use
        for moment, following in reversed(list(itertools.pairwise([*self._moments, end]))):
            at_most = max(at_most, moment.in_use + following.allocated - moment.allocated)
            before = self._known.get(moment.parameter, _Known(0, 0))
            self._known[moment.parameter] = _Known(max(before.at_gradient, moment.in_use), max(before.at_most, at_most))
        self._moments, self._early = [], 0

    def join(self) -> None:
        """Make what is issued from now on wait for the copies."""
        if self._side is not None:
            self._side.join()

    def give_up(self) -> None:
        """Forget the step in progress, once its copies have been waited for."""
        self.join()
        self._moments, self._early = [], 0
