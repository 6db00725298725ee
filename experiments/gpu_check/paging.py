"""How much of paging in and parking is hidden behind the compute: times of steps, marks in the stream, bandwidth."""

import contextlib
import statistics
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from experiments.gpu_check.devices import Device
from experiments.gpu_check.profiles import CONTESTANTS, PAGING, Profile
from experiments.gpu_check.training import RAN, CycleTimes, Watch, outcome_of, train
from hift_lightning.engine.pinned import can_pin
from hift_lightning.engine.prefetch import StatePrefetch
from hift_lightning.engine.residency import Place, Residency
from hift_lightning.engine.state_tensors import state_tensors
from hift_lightning.strategies import HiFTStrategy

_REPEATS, _WARM_UP = 20, 3


class PagingWatch(Callback):
    """Counts the bytes that are moved, and where `update="block"` the time that they keep the compute stream waiting.

    Args:
        device: that trains.
        first: the first step that counts.
        last: the last one.
    """

    def __init__(self, device: Device, first: int, last: int) -> None:
        self._device, self._first, self._last = device, first, last
        self._counting = False
        self._began: Any = None
        self._waits: dict[str, list[tuple[Any, Any]]] = {"page_in": [], "park": []}

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Within it, the engine's paging in and parking are between marks."""
        page_in, join, park = Residency.page_in, StatePrefetch.join, Residency.park

        def marked_page_in(residency: Residency, parameters: Iterable[Tensor], place: Place | None = None) -> None:
            if place is None:  # at the update; prefetching, in backward, gives one
                self._began = self._device.mark()
            page_in(residency, parameters, place)

        def marked_join(prefetch: StatePrefetch) -> None:
            join(prefetch)
            self._end("page_in")

        def marked_park(residency: Residency, parameters: Iterable[Tensor]) -> None:
            self._began = self._device.mark()
            park(residency, parameters)
            self._end("park")

        with (
            mock.patch.object(Residency, "page_in", marked_page_in),
            mock.patch.object(StatePrefetch, "join", marked_join),
            mock.patch.object(Residency, "park", marked_park),
        ):
            yield

    def _end(self, what: str) -> None:
        if self._counting and self._began is not None:
            self._waits[what].append((self._began, self._device.mark()))
        self._began = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._first:
            self._moved_before = _moved(trainer)
            self._counting = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self._last:
            self._counting = False
            self._moved = [now - before for now, before in zip(_moved(trainer), self._moved_before, strict=True)]
            states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
            self._parked = [t for t in state_tensors(states) if t.device.type == "cpu" and t.dim() > 0]

    def figures(self) -> dict[str, object]:
        """Means of a step, once the device has been waited for; milliseconds and bytes."""
        steps = self._last - self._first + 1
        waits = {
            f"{what}_ms": f"{sum(self._device.milliseconds(*marks) for marks in spans) / steps:.3f}" if spans else ""
            for what, spans in self._waits.items()
        }
        return {
            **waits,
            "paged_in": self._moved[0] // steps,
            "parked": self._moved[1] // steps,
            "in_host_memory": sum(tensor.nbytes for tensor in self._parked),
            "of_it_pinned": sum(tensor.nbytes for tensor in self._parked if tensor.is_pinned()),
        }


def _moved(trainer: L.Trainer) -> tuple[int, int]:
    assert isinstance(trainer.strategy, HiFTStrategy)
    assert trainer.strategy.hift is not None
    residency = trainer.strategy.hift.residency
    return residency.bytes_paged_in, residency.bytes_parked


def measure_paging(name: str, profile: Profile, layers: int) -> dict[str, object]:
    """Times of the cycles of a way to page, and what it moved."""
    way = PAGING[name.rpartition(", round ")[0]]
    job = profile.of_depth(CONTESTANTS["HiFT"].job, layers, way.strategy)
    cycle = layers + 2
    watch, times = Watch(profile.device), CycleTimes(profile.device, cycle)
    steps = (times.warm_up_cycles + profile.cycles) * cycle
    paging = PagingWatch(profile.device, first=times.warm_up_cycles * cycle, last=steps - 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(profile.device.in_use())
        if job.strategy.get("update", "block") == "block":
            stack.enter_context(paging.marking())
        if not way.prefetch:
            stack.enter_context(mock.patch.object(StatePrefetch, "page_in", autospec=True, return_value=None))
        outcome = outcome_of(lambda: train(job, profile, steps, [paging, watch, times]), watch)
        if outcome != RAN:
            return {"outcome": outcome}
        return {"outcome": outcome, **times.figures(), **paging.figures()}


def measure_copies(name: str, profile: Profile) -> dict[str, object]:
    """Time of a copy between host and device, from marks around it in the stream; the median of some."""
    direction, memory = name.split(", ")
    device = profile.device
    with device.in_use():
        pin = memory == "pinned"
        if pin and not can_pin(device.type):
            return {"outcome": f"host memory cannot be pinned for `{device.type}`"}
        host = torch.zeros(profile.copied, dtype=torch.uint8, pin_memory=pin)
        on_device = torch.zeros(profile.copied, dtype=torch.uint8, device=device.type)
        source, target = (host, on_device) if direction == "host to device" else (on_device, host)
        taken = []
        for _ in range(_WARM_UP + _REPEATS):
            begin = device.mark()
            target.copy_(source, non_blocking=True)
            end = device.mark()
            device.synchronize()
            taken.append(device.milliseconds(begin, end))
    return {
        "outcome": RAN,
        "bytes": profile.copied,
        "ms": f"{statistics.median(taken[_WARM_UP:]):.6f}",
        "fastest_ms": f"{min(taken[_WARM_UP:]):.6f}",
        "slowest_ms": f"{max(taken[_WARM_UP:]):.6f}",
    }
