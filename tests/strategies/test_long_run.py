"""Nothing grows in a long run with everything on."""

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from hift_lightning import HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.process_memory import anonymous_bytes
from tests.resuming import Case, Traced, samples
from tests.small_transformer import LAYERS, loader, make_batches, trainer

STEPS, SAVE_EVERY, STRETCH = 3000, 50, 300
MIB = 2**20


class Measures(Callback):
    def __init__(self, parked: Path) -> None:
        self.parked = parked
        self.milliseconds: list[float] = []
        self.memory: list[int] = []
        self.handles: list[int] = []
        self.files: list[int] = []
        self._began = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        # before ModelCheckpoint, which comes last
        self.milliseconds.append(1000 * (time.perf_counter() - self._began))
        if len(self.milliseconds) % SAVE_EVERY == 0:
            self.memory.append(anonymous_bytes())
            self.handles.append(len(os.listdir("/proc/self/fd")))
            self.files.append(sum(1 for _ in self.parked.rglob("*.bin")))


@pytest.mark.slow
def test_memory_handles_files_and_step_time_are_flat_over_3000_steps(tmp_path: Path) -> None:
    parked = tmp_path / "parked"
    parked.mkdir()
    measures = Measures(parked)
    strategy = HiFTStrategy(
        update="streamed", window="64KiB", offload=parked, master_weights=True, activation_checkpointing=True
    )
    case = Case(batches=100)
    trainer_ = trainer(
        strategy,
        max_steps=STEPS,
        max_epochs=-1,
        precision="bf16-true",
        gradient_clip_val=1.0,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=SAVE_EVERY,
        enable_checkpointing=True,
        callbacks=[
            measures,
            HiFTMonitor(),
            ModelCheckpoint(tmp_path / "saved", every_n_train_steps=SAVE_EVERY, save_last=True),
        ],
    )
    module = Traced(case)
    module.on_train_batch_end = lambda *_: [notes.clear() for notes in (module.trace, module.losses, module.rates)]
    trainer_.fit(module, samples(case), loader(make_batches(2)))

    warm = STRETCH
    first, last = measures.milliseconds[warm : warm + STRETCH], measures.milliseconds[-STRETCH:]
    after_warm_up = measures.memory[2 * STRETCH // SAVE_EVERY :]
    print(
        f"\nRssAnon {after_warm_up[0] / MIB:.1f} MiB after {2 * STRETCH} steps, most {max(after_warm_up) / MIB:.1f}; "
        f"handles {measures.handles[1]} to {measures.handles[-1]}; files {measures.files[1]} to {measures.files[-1]}; "
        f"median step {statistics.median(first):.2f} ms, then {statistics.median(last):.2f} ms"
    )
    assert trainer_.global_step == len(measures.milliseconds) == STEPS
    assert trainer_.strategy.hift.updates == STEPS
    assert STEPS > 100 * LAYERS
    assert max(after_warm_up) - after_warm_up[0] < 8 * MIB
    assert len(set(measures.handles[1:])) == 1
    assert len(set(measures.files[1:])) == 1
    assert statistics.median(last) < 1.5 * statistics.median(first)
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["global_step"] == STEPS
