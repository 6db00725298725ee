"""Host memory with parked state in memory and in files."""

import ctypes
import gc
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.memory.task import LanguageModel, Task
from hift_lightning import HiFTStrategy

OFFLOADS = ("cpu", "folder")


def resident_bytes() -> dict[str, int]:
    """Anonymous and mapped pages of this process in memory, from `/proc/self/status`.

    What the C library keeps of freed memory goes back to the system first, so that only what is in use counts.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile", "RssShmem")}


class _ReadAtTheEnd(Callback):
    """Reads after the last step, while the state is parked."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.found: dict[str, object] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.steps:
            assert isinstance(trainer.strategy, HiFTStrategy)
            parked = sum(block.parked_bytes for block in trainer.strategy.report().blocks)
            self.found = {**resident_bytes(), "parked_bytes": parked}


def measure_offload(name: str) -> dict[str, object]:
    """Train on the CPU for two cycles."""
    task = Task()
    read = _ReadAtTheEnd(2 * task.cycle)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=HiFTStrategy(offload="cpu" if name == "cpu" else folder),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[read],
        )
        batches = task.batches(read.steps)
        trainer.fit(LanguageModel(task), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return read.found
