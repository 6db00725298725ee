"""Anonymous memory of a process that saves a checkpoint, and of one that resumes from it.

``python -m tests.strategies.checkpoint_memory save|load MIB OFFLOAD PATH [masters|lightning]`` prints bytes as JSON.
MIB is of AdamW's moments, OFFLOAD is ``cpu`` or a folder, ``masters`` has bf16 weights with fp32 masters, and
``lightning`` takes Lightning's own CheckpointIO.
"""

import ctypes
import gc
import json
import sys
import warnings

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import nn

from hift_lightning import HiFTStrategy
from hift_lightning.process_memory import PeakAnonymousMemory, anonymous_bytes
from tests.small_transformer import loader, trainer

WIDTH = 1024
MIB_OF_LAYER = 8
"""Of the two moments of one layer in fp32."""


class Stack(L.LightningModule):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(layers))
        for p in self.parameters():
            nn.init.eye_(p)

    def training_step(self, batch, batch_idx):
        for layer in self.layers:
            batch = layer(batch)
        return batch.square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


def anonymous_bytes_in_use():
    """What the C library keeps of freed memory goes back to the system first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous_bytes()


class Resumed(Callback):
    """Reads when training begins, and stops it."""

    def setup(self, trainer, pl_module, stage):
        self.before = anonymous_bytes_in_use()
        self.memory = PeakAnonymousMemory()
        self.memory.__enter__()

    def on_train_start(self, trainer, pl_module):
        self.memory.__exit__(None, None, None)
        self.after = anonymous_bytes_in_use()
        trainer.should_stop = True


def main(what, mib, offload, path, kind=None):
    layers = int(mib) // MIB_OF_LAYER
    module = Stack(layers)
    batches = loader([torch.ones(1, WIDTH)] * layers)
    strategy = HiFTStrategy(
        offload=offload,
        master_weights=kind == "masters",
        checkpoint_io=TorchCheckpointIO() if kind == "lightning" else None,
    )
    precision = "bf16-true" if kind == "masters" else "32-true"
    if what == "save":
        trainer_ = trainer(strategy, max_steps=layers, precision=precision)
        trainer_.fit(module, batches)
        before = anonymous_bytes_in_use()
        with PeakAnonymousMemory() as memory:
            trainer_.save_checkpoint(path)
        found = {"before": before, "peak": memory.peak_bytes, "after": anonymous_bytes_in_use()}
    else:
        resumed = Resumed()
        trainer_ = trainer(strategy, max_steps=2 * layers, max_epochs=-1, callbacks=[resumed], precision=precision)
        trainer_.fit(module, batches, ckpt_path=path)
        found = {"before": resumed.before, "peak": resumed.memory.peak_bytes, "after": resumed.after}
    found["parked"] = strategy.hift.residency.parked_bytes
    print(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
