"""Runs that are stopped and resumed, compared with one that never stopped: every difference must be 0."""

import contextlib
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler

from hift_lightning import HiFTStrategy
from hift_lightning.data.loading import TrainingLoader
from tests.comparing import assert_same
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

SCHEDULERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]] | None] = {
    "none": None,
    "step": (lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=30), {"interval": "step"}),
    "epoch": (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7), {"interval": "epoch"}),
    "plateau": (
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5, factor=0.7),
        {"interval": "epoch", "monitor": "val_loss"},
    ),
    "plateau by step": (
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5, factor=0.9),
        {"interval": "step", "monitor": "train_loss"},
    ),
}
DROPOUT = 0.1


@dataclass(frozen=True)
class Case:
    """A configuration of a run."""

    optimizer: str = "AdamW"
    scheduler: str = "step"
    strategy: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    accumulate: int = 1
    val_check_interval: float | int = 1.0
    clip: float | None = None
    epochs: int = 3
    batches: int = 7
    workers: int = 0
    accelerator: str = "cpu"
    by_steps: bool = False
    """Whether `max_steps` rather than `max_epochs` ends the run."""

    @property
    def steps(self) -> int:
        return self.epochs * -(-self.batches // self.accumulate)


class Traced(SmallTransformer):
    """Notes every loss with its place; draws from all generators."""

    def __init__(self, case: Case) -> None:
        super().__init__(OPTIMIZERS[case.optimizer])
        self.case = case
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, nn.Dropout):
                    module.p = DROPOUT
        self.trace: list[tuple[int, int, float]] = []
        self.validated: list[float] = []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if not self.trainer.training:
            return batch
        tokens, labels = batch
        augmented = tokens[torch.randperm(len(tokens))], labels
        for callback in self.trainer.callbacks:  # which have no such hook
            if isinstance(callback, StopsAt) and callback.hook == "on_after_batch_transfer":
                callback._called(self.trainer)
        return augmented

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) * (1 + random.random() + np.random.rand())
        self.trace.append((self.current_epoch, batch_idx, loss.item()))
        self.log("train_loss", loss)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.validated.append(self.trainer.callback_metrics["val_loss"].item())

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if (chosen := SCHEDULERS[self.case.scheduler]) is None:
            return optimizer
        if self.case.scheduler == "step":
            # what schedules with a horizon ask; Lightning makes the training loader for it, before it restores anything
            assert self.trainer.estimated_stepping_batches > 0
        make, settings = chosen
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **settings}}


class Stop(Exception):
    pass


class StopsAt(Callback):
    """Does something in a hook of the Trainer, the n-th time that it is called."""

    def __init__(self, hook: str, n: int, act: Callable[[Any], None]) -> None:
        self.hook, self.n, self.act, self.calls = hook, n, act, 0
        setattr(self, hook, self._called)

    def _called(self, trainer: Any, *args: Any) -> None:
        if trainer.sanity_checking:
            return
        self.calls += 1
        if self.calls == self.n:
            self.act(trainer)


def raise_stop(trainer: Any) -> None:
    raise Stop


def samples(case: Case) -> TrainingLoader:
    tokens, labels = make_batches(1, size=4 * case.batches)[0]
    rows = list(zip(tokens, labels, strict=True))
    generator = torch.Generator()
    batches = BatchSampler(RandomSampler(rows, generator=generator), 4, drop_last=False)
    return TrainingLoader(rows, batches, generator, 3, num_workers=case.workers)


def run(
    case: Case,
    folder: Path,
    *,
    ckpt_path: Any = None,
    callbacks: Any = (),
    max_steps: int | None = None,
    data: Any = None,
) -> tuple[Traced, Any]:
    """Train; what stops the run early is caught."""
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    if ckpt_path is not None:  # as another process would have it
        torch.manual_seed(12)
        random.seed(12)
        np.random.seed(12)
    module = Traced(case)
    by_steps = case.by_steps or max_steps is not None
    trainer_ = trainer(
        HiFTStrategy(**case.strategy),
        max_epochs=-1 if by_steps else case.epochs,
        max_steps=(max_steps or case.steps) if by_steps else -1,
        accelerator=case.accelerator,
        precision=case.precision,
        accumulate_grad_batches=case.accumulate,
        val_check_interval=case.val_check_interval,
        gradient_clip_val=case.clip,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=folder,
    )
    with warnings.catch_warnings(), contextlib.suppress(Stop, SystemExit):
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*callbacks used to create the checkp")
        warnings.filterwarnings("ignore", message=".*exists and is not empty|.*blocks will not be trained")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step", category=UserWarning)
        trainer_.fit(
            module, samples(case) if data is None else data, loader(make_batches(2, seed=5)), ckpt_path=ckpt_path
        )
    return module, trainer_


def newest(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def assert_goes_on(straight: tuple[Traced, Any], resumed: tuple[Traced, Any], *stopped: Traced) -> None:
    """The resumed run is the rest of the straight one, and skips nothing that the stopped ones had not done."""
    (module, trainer_), (whole, whole_trainer) = resumed, straight
    assert module.trace == whole.trace[len(whole.trace) - len(module.trace) :]
    assert len(module.trace) + sum(len(one.trace) for one in stopped) >= len(whole.trace)
    assert module.rates == whole.rates[len(whole.rates) - len(module.rates) :]
    assert module.validated == whole.validated[len(whole.validated) - len(module.validated) :]
    assert len(module.validated) + sum(len(one.validated) for one in stopped) >= len(whole.validated)
    assert trainer_.global_step == whole_trainer.global_step
    assert trainer_.current_epoch == whole_trainer.current_epoch
    assert_same(module.state_dict(), whole.state_dict())
    assert_same(trainer_.optimizers[0].state_dict(), whole_trainer.optimizers[0].state_dict())
    assert_same(trainer_.strategy.hift.state_dict(), whole_trainer.strategy.hift.state_dict())
    for one, other in zip(trainer_.lr_scheduler_configs, whole_trainer.lr_scheduler_configs, strict=True):
        assert_same(one.scheduler.state_dict(), other.scheduler.state_dict())
    logged = [t.fit_loop.epoch_loop._batches_that_stepped for t in (trainer_, whole_trainer)]
    assert logged[0] == logged[1]
