"""The model and the data that every method trains with."""

from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Task:
    """Sizes of a LLaMA with random weights, and of its batches."""

    layers: int = 16
    width: int = 512
    intermediate: int = 1376
    heads: int = 8
    vocabulary: int = 2000
    batch: int = 2
    length: int = 32

    @property
    def cycle(self) -> int:
        """Optimizer steps in which every block has its turn once: embeddings and head are layers too."""
        return self.layers + 2

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
            use_cache=False,
            attn_implementation="eager",  # type: ignore[call-arg]
        )
        return LlamaForCausalLM(config)

    def batches(self, steps: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.length)
        return [torch.randint(self.vocabulary, shape, generator=generator) for _ in range(steps)]

    def __str__(self) -> str:
        return (
            f"LLaMA of {self.layers} layers, width {self.width}, MLP width {self.intermediate}, {self.heads} heads, "
            f"vocabulary {self.vocabulary}, random weights, eager attention, AdamW, batch {self.batch} x {self.length}"
        )


class LanguageModel(L.LightningModule):
    """The task under Lightning."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model()
        self.losses: list[float] = []

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        assert isinstance(loss, Tensor)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)
