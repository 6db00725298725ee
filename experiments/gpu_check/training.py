"""One run under the Trainer on the device, and what watches it."""

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from experiments.gpu_check.devices import Bytes, Device
from experiments.gpu_check.profiles import Profile
from experiments.paper_memory.jobs import PRECISIONS, Job, Module
from hift_lightning.engine.conversion import parameters_stay_themselves

RAN, FAILED = "ran", "failed"
"""The outcome of a row that has figures, and how that of one begins which an error has ended."""

KILLED = {"outcome": f"{FAILED}: its process was ended, which is what the system does where host memory is short"}


class Watch(Callback):
    """Knows where training is, and reads the device's counters at its end.

    Then the Trainer would carry all to host memory; the module is made to stay, and the optimizer's state is dropped.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.place = "while the model was built"
        self.memory: Bytes | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.place = "before the first step"

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = batch_idx + 1
        self.place = f"in step {self._step}, forward"

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.place = f"in step {self._step}, backward"

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.place = f"in step {self._step}, update"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._device.synchronize()
        self.memory = self._device.memory()
        self._leave(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave(trainer, pl_module)

    def _leave(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        module._apply = lambda fn, recurse=True: module  # type: ignore[method-assign]


class CycleTimes(Callback):
    """Seconds of each whole cycle after two, which warm up; the device is waited for at a cycle's two ends only.

    Args:
        device: that trains.
        cycle: steps of a cycle; full fine-tuning is measured over as many.
    """

    warm_up_cycles = 2
    """A block's state exists from its second visit on."""

    def __init__(self, device: Device, cycle: int) -> None:
        self._device, self._cycle = device, cycle
        self._began = 0.0
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self._cycle == 0:
            self._device.synchronize()
            self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self._cycle == 0:
            self._device.synchronize()
            if batch_idx >= self.warm_up_cycles * self._cycle:
                self.seconds.append(time.perf_counter() - self._began)

    def figures(self) -> dict[str, object]:
        """Milliseconds of the mean step of each cycle, and their median."""
        steps = [1000 * seconds / self._cycle for seconds in self.seconds]
        return {"step_ms": f"{statistics.median(steps):.3f}", "cycles_ms": " ".join(f"{step:.3f}" for step in steps)}


def train(
    job: Job,
    profile: Profile,
    steps: int,
    callbacks: Sequence[Callback],
    adapt: Callable[[nn.Module], nn.Module] | None = None,
) -> None:
    """Train for so many steps on one batch of made-up data, with random weights that are made on the device.

    Args:
        job: what.
        profile: on which device and with which batch.
        steps: optimizer steps.
        callbacks: of the Trainer.
        adapt: called with the network before anything else.
    """
    device = profile.device
    trainer = L.Trainer(
        accelerator=device.type,
        devices=1,
        strategy=job.hift() or SingleDeviceStrategy(device=f"{device.type}:0"),
        precision=PRECISIONS[job.precision],  # type: ignore[arg-type]
        max_epochs=1,
        limit_val_batches=0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with parameters_stay_themselves(trainer.strategy.root_device):
        with trainer.init_module():
            module = job.module(trainer.strategy.root_device)
            if adapt is not None:
                module.network = adapt(module.network)
        device.reset_peaks()
        batches = [made_up_batch(module, profile.batch, profile.length)] * steps
        # none are validated, but who says nothing about it is warned
        trainer.fit(module, DataLoader(batches, batch_size=None), [])  # type: ignore[arg-type]


def outcome_of(run: Callable[[], None], watch: Watch) -> str:
    """Run it, and tell that it ran, or where it ran out of memory or failed; an error is printed.

    Args:
        run: trains, watched by `watch`.
        watch: knows where it is.
    """
    try:
        run()
    except Exception as error:  # the rows after this one are measured all the same
        if is_out_of_memory(error):
            return f"out of memory {watch.place}"
        return failed(error, f" {watch.place}")
    return RAN


def failed(error: Exception, where: str = "") -> str:
    """The outcome of a row that an error has ended, which is printed."""
    traceback.print_exception(error)
    return f"{FAILED}{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: the device's, also where cuBLAS tells it, or what can be pinned of the host's."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "status_alloc_failed" in text)


def made_up_batch(module: Module, rows: int, tokens: int) -> dict[str, Tensor]:
    """A batch on the CPU, of the tensors that the module's blank one has."""
    batch = {name: torch.ones_like(blank, device="cpu") for name, blank in module.blank_batch(rows, tokens).items()}
    generator = torch.Generator().manual_seed(0)
    vocabulary = max(part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding))
    # the first few tokens of a vocabulary have meanings of their own, such as padding
    batch["input_ids"] = torch.randint(4, vocabulary, (rows, tokens), generator=generator)
    if batch["labels"].shape == batch["input_ids"].shape:
        batch["labels"] = batch["input_ids"]
    return batch
