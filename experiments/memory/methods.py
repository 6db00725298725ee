"""The methods that are compared, and one run of each: its bytes, its FLOPs and its losses."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from experiments.memory import peers
from experiments.memory.meter import Meter, StepBytes, nbytes
from experiments.memory.task import LanguageModel, Task
from hift_lightning import HiFTStrategy
from tests import simulated_accelerator as sim

MEASURED_CYCLES = 2
"""The state of a block exists from its second visit on."""


@dataclass
class Run:
    """What a run has shown."""

    weights: int
    """P: bytes of the fp32 weights."""
    steps: list[StepBytes]
    losses: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    """Of each step that came after those measured."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Either `strategy` (arguments of `HiFTStrategy`, under the Trainer) or `peer` is given.
    """

    strategy: dict[str, Any] | None = None
    peer: Callable[[LlamaForCausalLM], peers.Peer] | None = None
    bf16: bool = False
    checkpointing: bool = False
    rotates: bool = False
    """Whether steps differ, so that FLOPs are counted over a whole cycle instead of over one step."""
    remark: str = ""

    def run(self, task: Task, steps: int | None = None, cap: float | None = None, meter: Meter | None = None) -> Run:
        """Train on the simulated accelerator.

        Args:
            task: what.
            steps: that are measured; by default those of `MEASURED_CYCLES` cycles, and FLOPs are counted after them.
            cap: the device's memory in multiples of P, above what is in use before.
            meter: to look at when an exception is raised; made by default.
        """
        sim.load()
        gc.collect()
        meter = meter or Meter()
        measured = MEASURED_CYCLES * task.cycle if steps is None else steps
        counted = 0 if steps is not None else task.cycle if self.rotates else 1
        with _memory_cap(cap, task):
            if self.strategy is not None:
                return _under_trainer(self, task, measured, counted, meter)
            return _in_plain_loop(self, task, measured, counted, meter)


@contextmanager
def _memory_cap(cap: float | None, task: Task) -> Iterator[None]:
    if cap is not None:
        sim.set_memory_cap(sim.memory_allocated() + int(cap * nbytes(task.model().parameters())))
    try:
        yield
    finally:
        sim.set_memory_cap(None)


class _TellMeter(Callback):
    def __init__(self, meter: Meter, measured: int) -> None:
        self.meter, self.measured = meter, measured
        self.flops: list[int] = []
        self._counter: FlopCounterMode | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.meter.model_is_on_device(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        if batch_idx < self.measured:
            self.meter.begin_step(batch)
        else:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.meter.end_backward()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        if self._counter is None:
            self.meter.end_step()
        else:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.flops.append(self._counter.get_total_flops())


def _under_trainer(method: Method, task: Task, measured: int, counted: int, meter: Meter) -> Run:
    assert method.strategy is not None
    module = LanguageModel(task)
    weights = nbytes(module.parameters())
    tell = _TellMeter(meter, measured)
    trainer = L.Trainer(
        accelerator="sim",
        devices=1,
        strategy=HiFTStrategy(activation_checkpointing=method.checkpointing, **method.strategy),
        precision="bf16-true" if method.bf16 else "32-true",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[tell],
    )
    trainer.fit(module, DataLoader(task.batches(measured + counted), batch_size=None))  # type: ignore[arg-type]
    return Run(weights, meter.steps, module.losses[:measured], tell.flops)


def _in_plain_loop(method: Method, task: Task, measured: int, counted: int, meter: Meter) -> Run:
    assert method.peer is not None
    model = task.model()
    run = Run(nbytes(model.parameters()), meter.steps)
    model.to(dtype=torch.bfloat16 if method.bf16 else torch.float32, device="sim")  # type: ignore[call-arg]
    meter.model_is_on_device(model)
    if method.checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    peer = method.peer(model)
    batches = task.batches(measured + counted)
    for batch in batches[:measured]:
        tokens = batch.to("sim")
        meter.begin_step(tokens)
        peer.begin()
        loss: Tensor = peer.model(input_ids=tokens, labels=tokens).loss
        run.losses.append(loss.item())
        peer.backward(loss)
        meter.end_backward()
        peer.update()
        meter.end_step()
    for batch in batches[measured:]:
        tokens = batch.to("sim")
        with FlopCounterMode(display=False) as counter:
            peer.begin()
            peer.backward(peer.model(input_ids=tokens, labels=tokens).loss)
            peer.update()
        run.flops.append(counter.get_total_flops())
    return run


_WINDOW = {"window": "1MiB"}
_MASTERS = {"update": "streamed", "master_weights": True, **_WINDOW}

OURS = {
    "block": Method({"update": "block"}, rotates=True),
    "streamed": Method({"update": "streamed", **_WINDOW}, rotates=True),
    "streamed, checkpointing": Method({"update": "streamed", **_WINDOW}, checkpointing=True, rotates=True),
    "fused": Method({"update": "fused", **_WINDOW}, rotates=True),
    "fused, checkpointing": Method({"update": "fused", **_WINDOW}, checkpointing=True, rotates=True),
    "masters, streamed": Method(_MASTERS, bf16=True, rotates=True),
    "masters, streamed, checkpointing": Method(_MASTERS, bf16=True, checkpointing=True, rotates=True),
}
"""This project; `window` is 1 MiB, and "masters" is bf16 weights with fp32 masters."""

_BY_ITSELF = {
    "full AdamW": Method(peer=peers.full),
    "step inside backward": Method(peer=peers.step_in_backward),
    "LISA": Method(peer=peers.lisa, rotates=True, remark="keeps the moments of every layer that it has drawn"),
    "BAdam": Method(peer=peers.badam, rotates=True, remark="drops a block's moments when it leaves it"),
    "GaLore r32": Method(peer=peers.galore),
    "APOLLO-Mini": Method(peer=peers.apollo_mini),
    "Adam-mini": Method(peer=peers.adam_mini),
    "LOMO": Method(peer=peers.lomo, remark="plain SGD: no state"),
    "LoRA r16": Method(peer=peers.lora, remark="trains adapters, not the weights"),
    "rotation by hand": Method(peer=peers.rotation_by_hand, rotates=True, remark="one tensor's state at a time"),
}

PEERS = {
    **_BY_ITSELF,
    **{
        f"{name}, checkpointing": Method(
            peer=method.peer, checkpointing=True, rotates=method.rotates, remark=method.remark
        )
        for name, method in _BY_ITSELF.items()
    },
    **{
        f"{name}, bf16{suffix}": Method(
            peer=_BY_ITSELF[name].peer,
            bf16=True,
            checkpointing=bool(suffix),
            rotates=_BY_ITSELF[name].rotates,
            remark=_BY_ITSELF[name].remark,
        )
        for name in ("step inside backward", "BAdam", "LOMO", "LoRA r16")
        for suffix in ("", ", checkpointing")
    },
}

METHODS = {**OURS, **PEERS}
