"""The three ways to train that are compared: full fine-tuning, HiFT, and a rotation written by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from hift_lightning import HiFTStrategy
from hift_lightning.engine.partition import partition

LAYERS, WIDTH, VOCABULARY, BATCH, LENGTH = 12, 256, 1024, 8, 64
CYCLE = LAYERS + 2  # embeddings and head are layers too

BeforeStep = Callable[[int], None]
"""Called with the number of the step that is about to begin."""

Contestant = Callable[[int, BeforeStep], None]
"""Trains for so many steps."""


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        intermediate_size=688,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator) for _ in range(min(steps, 32))]


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class _Batches(torch.utils.data.Dataset[Tensor]):
    def __init__(self, steps: int) -> None:
        self.steps, self.batches = steps, make_batches(steps)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index % len(self.batches)]


class _TellSteps(Callback):
    def __init__(self, before_step: BeforeStep) -> None:
        self.before_step = before_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.before_step(batch_idx)


def _train(strategy: str | Strategy, steps: int, before_step: BeforeStep) -> None:
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_TellSteps(before_step)],
    )
    trainer.fit(LanguageModel(), DataLoader(_Batches(steps), batch_size=None))
    before_step(steps)


def full(steps: int, before_step: BeforeStep) -> None:
    """Full fine-tuning under Lightning's own strategy."""
    _train("auto", steps, before_step)


def hift(steps: int, before_step: BeforeStep, **arguments: Any) -> None:
    """HiFT under the Trainer, by default with its default arguments."""
    _train(HiFTStrategy(**arguments), steps, before_step)


def by_hand(steps: int, before_step: BeforeStep) -> None:
    """The same rotation as a loop without Trainer, strategy or engine."""
    model = make_model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    blocks = [[model.get_parameter(name) for name in block.parameters] for block in partition(model).blocks]
    model.requires_grad_(False)
    batches = make_batches(steps)
    for step, block in zip(range(steps), _forever(blocks[::-1]), strict=False):
        before_step(step)
        for parameter in block:
            parameter.requires_grad_(True)
        tokens = batches[step % len(batches)]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        for parameter in block:
            parameter.grad = None
            parameter.requires_grad_(False)
    before_step(steps)


def _forever(blocks: list[list[torch.nn.Parameter]]) -> Iterator[list[torch.nn.Parameter]]:
    while True:
        yield from blocks


CONTESTANTS: dict[str, Contestant] = {"full": full, "hift": hift, "by_hand": by_hand}
