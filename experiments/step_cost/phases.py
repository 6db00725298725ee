"""Where the time of a step goes, on the simulated accelerator: on a CPU nothing would be copied."""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from experiments.memory.task import Task
from experiments.step_cost.contestants import train
from experiments.step_cost.runs import HERE, SIZES
from experiments.table import Table
from hift_lightning import HiFTStrategy
from hift_lightning.engine.residency import Residency
from hift_lightning.engine.update import PieceUpdate
from tests import simulated_accelerator as sim

PHASES = ("forward", "backward", "page in", "update", "park", "rest")
"""`update` is all that the optimizer's step does but copying; `rest` is what the Trainer does between."""

WAYS = {"full AdamW": None, "HiFT block": "block", "HiFT streamed": "streamed", "HiFT fused": "fused"}
SIZE = "medium"
CYCLES = 6
WARM_UP_CYCLES = 2
"""A block has state to page in from its second visit on."""


class Phases(Callback):
    """Milliseconds and bytes copied, told by the Trainer where a phase begins and by `within` what is inside it."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.steps = warm_up, 0
        self.to_device_bytes = self.to_host_bytes = 0
        self.ms = dict.fromkeys(PHASES, 0.0)
        self._phase = "rest"
        self._since = time.perf_counter()

    def begin(self, phase: str) -> None:
        """What comes now belongs to this phase."""
        now = time.perf_counter()
        self.ms[self._phase] += (now - self._since) * 1000
        self._phase, self._since = phase, now

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """What is in it belongs to this phase, and what comes after it to the one before."""
        before = self._phase
        self.begin(phase)
        try:
            yield
        finally:
            self.begin(before)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.begin("forward")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.begin("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin("rest")

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.begin("update")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.begin("rest")
        self.steps = batch_idx + 1 - self.warm_up
        if self.steps == 0:
            self.ms = dict.fromkeys(PHASES, 0.0)
            sim.reset_copy_counters()
        self.to_device_bytes, self.to_host_bytes = sim.host_to_device_bytes(), sim.device_to_host_bytes()


def _timed(stack: ExitStack, phases: Phases, owner: type, method: str, phase: str) -> None:
    original: Callable[..., Any] = getattr(owner, method)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with phases.within(phase):
            return original(*args, **kwargs)

    stack.enter_context(mock.patch.object(owner, method, wrapper))


def measure_phases(way: str, task: Task | None = None, cycles: int = CYCLES) -> dict[str, object]:
    """Milliseconds of each phase of the mean step, and bytes copied in it."""
    sim.load()
    task = task or SIZES[SIZE].task
    phases = Phases(WARM_UP_CYCLES * task.cycle)
    update = WAYS[way]
    with ExitStack() as stack:
        _timed(stack, phases, Residency, "load", "page in")
        _timed(stack, phases, Residency, "store", "park")
        _timed(stack, phases, PieceUpdate, "step", "update")
        train(
            SingleDeviceStrategy("sim") if update is None else HiFTStrategy(update=update),
            task,
            (WARM_UP_CYCLES + cycles) * task.cycle,
            phases,
            accelerator="sim",
        )
    return {
        "threads": torch.get_num_threads(),
        "steps": phases.steps,
        **{f"{phase}_ms": f"{milliseconds / phases.steps:.3f}" for phase, milliseconds in phases.ms.items()},
        "to_device_bytes": phases.to_device_bytes // phases.steps,
        "to_host_bytes": phases.to_host_bytes // phases.steps,
    }


SHARES = Table(HERE / "phases.csv", tuple(WAYS), measure_phases)
