"""A callback that tells which parameters a step has changed, from checksums."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.partition import Block
from hift_lightning.engine.shards import local
from hift_lightning.strategies.blockwise import BlockwiseTraining

_CHUNK_BYTES = 2**26


class ChangedParameters(L.Callback):
    """Write into a file, for each optimizer step, its loss and the parameters that are not what they were before.

    All weights are read anew after every step, a second or two per gigabyte: for short runs that are to prove
    something. Checksums are made of pieces of 64 MiB, so no copy of the model is made.

    With fp32 masters a step may move a 16-bit weight by less than the next number it can hold: norm scales, which
    are near 1, wait for several steps. A parameter is `changed_in_its_master_only` where its master is no longer the
    weight. Of weights that are sharded, the file tells of the rows of the first rank.

    Args:
        path: the file, JSON: a list of steps with `step`, `loss`, and under HiFT `block`, the name of the block that
            was active (of several, where optimizers are stepped by hand, their names), and lists of names: `changed`,
            `changed_in_its_master_only`, `changed_outside_the_block` and `unchanged_in_the_block`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.steps: list[dict[str, Any]] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._checksums: dict[str, int] = {}
        self._blocks: dict[HiFT, list[Block]] = {}
        self._global_step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.steps = []
        self._blocks = {}
        self._parameters = dict(pl_module.named_parameters())  # pruning gives them other names
        self._checksums = checksums(self._parameters)
        self._global_step = trainer.global_step

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parameters = {}

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if isinstance(trainer.strategy, BlockwiseTraining):
            engine = trainer.strategy.engine_of(optimizer)
            self._blocks.setdefault(engine, []).append(engine.block)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._global_step:
            return  # gradients are still being accumulated
        self._global_step = trainer.global_step
        before, self._checksums = self._checksums, checksums(self._parameters)
        changed = [name for name, checksum in self._checksums.items() if checksum != before[name]]
        step: dict[str, Any] = {
            "step": trainer.global_step,
            "loss": None if (loss := trainer.callback_metrics.get("train/loss")) is None else float(loss),
            "changed": changed,
        }
        if self._blocks:
            engine_of = {
                name: engine for engine, blocks in self._blocks.items() for block in blocks for name in block.parameters
            }
            in_block = [name for name in engine_of if name not in changed]
            in_master = [name for name in in_block if _master_differs(engine_of[name], self._parameters[name])]
            step["block"] = ", ".join(block.name for blocks in self._blocks.values() for block in blocks)
            step["changed_in_its_master_only"] = in_master
            step["changed_outside_the_block"] = [name for name in changed if name not in engine_of]
            step["unchanged_in_the_block"] = [name for name in in_block if name not in in_master]
            self._blocks = {}
        self.steps.append(step)
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.steps, indent=2) + "\n", encoding="utf-8")


def checksums(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return a checksum of each parameter's bytes, by name."""
    return {name: _checksum(local(parameter).detach()) for name, parameter in parameters.items()}


def _checksum(tensor: Tensor) -> int:
    # bytes, since NumPy knows no bf16; on the CPU none of this copies
    content = tensor.contiguous().view(-1).view(torch.uint8)
    checksum = 0
    for chunk in content.split(_CHUNK_BYTES):  # type: ignore[no-untyped-call]
        checksum = zlib.crc32(chunk.cpu().numpy(), checksum)
    return checksum


def _master_differs(engine: HiFT, parameter: nn.Parameter) -> bool:
    master = engine.residency.master(parameter)
    return master is not None and not torch.equal(master, local(parameter).detach().float().cpu())
