"""The ways to train that are compared, each as a loop that tells when a step begins."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from experiments.memory import peers
from experiments.memory.task import LEARNING_RATE, LanguageModel, Task
from hift_lightning import HiFT, HiFTStrategy
from hift_lightning.engine.partition import partition
from tests.reference_loop import reference_loop, turns_of

BeforeStep = Callable[[int], None]
"""Called with the number of the step that is about to begin, and after the last step with the number of steps."""

Contestant = Callable[[Task, int, BeforeStep], None]
"""Trains on a task for so many steps."""


class _TellSteps(Callback):
    def __init__(self, before_step: BeforeStep, steps: int) -> None:
        self.before_step, self.steps = before_step, steps

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.before_step(batch_idx)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.steps:  # before the Trainer takes everything down
            self.before_step(self.steps)


def train(strategy: str | Strategy, task: Task, steps: int, callback: Callback, accelerator: str = "cpu") -> None:
    """Train the task's model under the Trainer, with nothing that is not needed."""
    trainer = L.Trainer(
        strategy=strategy,
        accelerator=accelerator,
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    batches = task.batches(steps)
    trainer.fit(LanguageModel(task), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def full(task: Task, steps: int, before_step: BeforeStep) -> None:
    """Full fine-tuning under Lightning's own strategy."""
    train("auto", task, steps, _TellSteps(before_step, steps))


def hift(task: Task, steps: int, before_step: BeforeStep, update: str = "block") -> None:
    """HiFT under the Trainer, with its default arguments but for `update`."""
    train(HiFTStrategy(update=update), task, steps, _TellSteps(before_step, steps))


def hift_in_plain_loop(task: Task, steps: int, before_step: BeforeStep) -> None:
    """The engine without Trainer and strategy."""
    model = task.model()
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    with HiFT(model, optimizer):
        for step, tokens in enumerate(task.batches(steps)):
            before_step(step)
            _backward(model, tokens)
            optimizer.step()
        before_step(steps)


def by_hand(task: Task, steps: int, before_step: BeforeStep) -> None:
    """The same rotation as a loop without Trainer, strategy or engine."""
    model = task.model()
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    blocks = [[model.get_parameter(name) for name in block.parameters] for block in partition(model).blocks]
    model.requires_grad_(False)
    turns = _forever(blocks[::-1])
    for step, tokens in enumerate(task.batches(steps)):
        before_step(step)
        block = next(turns)
        for parameter in block:
            parameter.requires_grad_(True)
        _backward(model, tokens)
        optimizer.step()
        for parameter in block:
            parameter.grad = None
            parameter.requires_grad_(False)
    before_step(steps)


def _forever(blocks: list[list[nn.Parameter]]) -> Iterator[list[nn.Parameter]]:
    while True:
        yield from blocks


def _backward(model: LlamaForCausalLM, tokens: Tensor) -> None:
    model(input_ids=tokens, labels=tokens).loss.backward()


def published(task: Task, steps: int, before_step: BeforeStep) -> None:
    """The published trainer's arithmetic, which is that of the tests' reference loop bit for bit."""
    model = _WithLoss(task.model())
    blocks = [[f"model.{name}" for name in block.parameters] for block in partition(model.model).blocks]
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE)
    batches = _ToldOf(task.batches(steps), before_step)
    turns = turns_of("top2down", len(blocks))  # type: ignore[no-untyped-call]
    reference_loop(model, optimizer, blocks, turns, batches)  # type: ignore[no-untyped-call]
    before_step(steps)


class _WithLoss(nn.Module):
    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def loss(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss


class _ToldOf(list[Tensor]):
    """Batches of which those of a step are taken when it begins."""

    def __init__(self, batches: list[Tensor], before_step: BeforeStep) -> None:
        super().__init__(batches)
        self.before_step = before_step

    def __getitem__(self, index: Any) -> Any:
        self.before_step(index.start)
        return super().__getitem__(index)


def peer(task: Task, steps: int, before_step: BeforeStep, make: Callable[[LlamaForCausalLM], peers.Peer]) -> None:
    """A method of `experiments.memory.peers`."""
    trained = make(task.model())
    for step, tokens in enumerate(task.batches(steps)):
        before_step(step)
        trained.begin()
        trained.backward(trained.model(input_ids=tokens, labels=tokens).loss)
        trained.update()
    before_step(steps)


FULL, BLOCK, PLAIN, BY_HAND, PUBLISHED = (
    "full AdamW",
    "HiFT block",
    "HiFT block, plain loop",
    "rotation by hand",
    "published HiFT (parity oracle)",
)

CONTESTANTS: dict[str, Contestant] = {
    FULL: full,
    "full AdamW, plain loop": functools.partial(peer, make=peers.full),
    "step inside backward": functools.partial(peer, make=peers.step_in_backward),
    "LISA": functools.partial(peer, make=peers.lisa),
    "BAdam": functools.partial(peer, make=peers.badam),
    "GaLore r32": functools.partial(peer, make=peers.galore),
    "APOLLO-Mini": functools.partial(peer, make=peers.apollo_mini),
    "Adam-mini": functools.partial(peer, make=peers.adam_mini),
    "LOMO": functools.partial(peer, make=peers.lomo),
    "LoRA r16": functools.partial(peer, make=peers.lora),
    BY_HAND: by_hand,
    "rotation by hand, a tensor at a time": functools.partial(peer, make=peers.rotation_by_hand),
    PUBLISHED: published,
    BLOCK: hift,
    "HiFT streamed": functools.partial(hift, update="streamed"),
    "HiFT fused": functools.partial(hift, update="fused"),
    PLAIN: hift_in_plain_loop,
}
