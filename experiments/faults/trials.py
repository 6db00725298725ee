"""One run that meets a fault, and what is left of it."""

import dataclasses
import logging
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests.comparing import assert_same
from tests.resuming import Case, newest, run

CASE = Case(
    precision="bf16-true",
    strategy={"update": "streamed", "window": "16KiB", "master_weights": True, "order": "random"},
    epochs=6,
)
"""A transformer of four layers with dropout, in 16 bits with fp32 masters; all that is parked lies in files."""

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["experiments.faults.trials"])  # otherwise each run spends seconds on imports

Fault = Callable[[Path], list[Callback]]
"""Called in the process of the run with its folder; gives callbacks that make the fault."""


def no_fault(folder: Path) -> list[Callback]:
    return []


@dataclass(frozen=True)
class Trial:
    """A folder in which a run is begun, meets faults, and goes on."""

    folder: Path
    case: Case = CASE

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def training(self) -> Path:
        """A file that is there while a run trains."""
        return self.folder / "training"

    def start(self, fault: Fault = no_fault, max_steps: int | None = None) -> ForkServerProcess:
        """Train in a process of its own, from the newest checkpoint on, with a checkpoint after every step.

        Args:
            fault: that it meets.
            max_steps: after which it ends.
        """
        process = _FORKS.Process(target=_train, args=(self, fault, max_steps))
        process.start()
        return process

    def complete(self, fault: Fault = no_fault, max_steps: int | None = None) -> int | None:
        """Likewise, and wait for its end.

        Returns:
            The exit code.
        """
        process = self.start(fault, max_steps)
        process.join()
        return process.exitcode

    @property
    def error(self) -> str:
        """What the last run ended with; empty if it came to its end."""
        path = self.folder / "error.txt"
        return path.read_text() if path.exists() else ""

    def losses(self) -> set[str]:
        """Place and value of each loss that any run has had."""
        path = self.folder / "losses.txt"
        return set(path.read_text().splitlines()) if path.exists() else set()

    def result(self) -> Any:
        """Weights, optimizer state, masters and position at the end of the run."""
        return torch.load(self.folder / "end.pt", weights_only=True)

    def is_exact(self, straight: "Trial") -> bool:
        """Whether all losses, and where the run has ended, are those of a run that never stopped."""
        return self.losses() == straight.losses() and same(self.result(), straight.result())


class _Noted(Callback):
    """Writes each loss down before the step is taken, in hexadecimal digits, which lose nothing.

    Args:
        path: of the losses.
        training: a file that is there while the run trains.
    """

    def __init__(self, path: Path, training: Path) -> None:
        self._path, self._training = path, training

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._training.touch()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._training.unlink()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        epoch, batch, loss = pl_module.trace[-1]
        with self._path.open("a") as file:
            file.write(f"{epoch} {batch} {loss.hex()}\n")


def _train(trial: Trial, fault: Fault, max_steps: int | None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = trial.folder
    case = dataclasses.replace(trial.case, strategy={**trial.case.strategy, "offload": str(folder)})
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_on_exception=True)
    (folder / "error.txt").unlink(missing_ok=True)
    trial.training.unlink(missing_ok=True)
    found = list((folder / "checkpoints").glob("*.ckpt"))
    try:
        callbacks = [*fault(folder), _Noted(folder / "losses.txt", trial.training), saving]
        module, trainer = run(
            case,
            folder,
            ckpt_path=newest(folder / "checkpoints") if found else None,
            callbacks=callbacks,
            max_steps=max_steps,
        )
    except BaseException as error:
        notes = getattr(error, "__notes__", [])
        (folder / "error.txt").write_text(" ".join([f"{type(error).__name__}: {error}", *notes]))
        raise SystemExit(1) from None
    if trainer.interrupted:
        raise SystemExit(1)
    end = {
        "weights": dict(module.state_dict()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "hift": trainer.strategy.hift.state_dict(),
    }
    torch.save(end, folder / "end.pt")


def straight_run(folder: Path, case: Case = CASE) -> Trial:
    """A run that meets no fault."""
    folder.mkdir()
    trial = Trial(folder, case)
    if trial.complete() != 0:
        raise RuntimeError(f"the run without a fault failed: {trial.error}")
    return trial


def begun(folder: Path, draw: random.Random, case: Case = CASE) -> Trial:
    """A run that has come to a random step and left a checkpoint of it."""
    folder.mkdir()
    trial = Trial(folder, case)
    trial.complete(max_steps=draw.randint(2, case.steps - 6))
    return trial


def same(left: Any, right: Any) -> bool:
    """Whether two trees of tensors and primitives are equal bit for bit."""
    try:
        assert_same(left, right)
    except (AssertionError, ValueError):
        return False
    return True
