"""What is measured: perplexity after a run, and what a step of each method costs."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.language_model.methods import ROWS, TOKENS, Contestant, loss_of, network, text
from experiments.quality.methods import Batch
from hift_lightning.data.language_modeling import TextDataModule
from tests import simulated_accelerator as sim

RATE = 1e-4


def run(contestant: Contestant, rate: float, seed: int) -> dict[str, object]:
    """Train and test, on one core.

    Returns:
        Perplexities of validation and test, mean loss of the last 20 batches, and seconds of training.
    """
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    data = text(seed)
    model = network()
    training = contestant.method(model, rate, contestant.steps, seed)
    losses = []
    began = time.perf_counter()
    for batch in itertools.islice(batches(data), contestant.steps):
        losses.append(training.step(batch))
    seconds = time.perf_counter() - began
    training.finish()
    return {
        "validation_perplexity": perplexity(model, data.val_dataloader()),
        "test_perplexity": perplexity(model, data.test_dataloader()),
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": seconds,
    }


def untrained() -> dict[str, object]:
    """Perplexities before training, and tokens of each part."""
    data, model = text(seed=0), network()
    loaders = {"validation": data.val_dataloader(), "test": data.test_dataloader()}
    return {
        **{f"{part}_perplexity": perplexity(model, loader) for part, loader in loaders.items()},
        **{f"{part}_tokens": len(rows) * TOKENS for part, rows in data.rows.items()},
    }


def batches(data: TextDataModule) -> Iterator[Batch]:
    """Training batches without end, in an order that the seed decides."""
    return itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))


@torch.inference_mode()
def perplexity(model: nn.Module, loader: Any) -> float:
    """The exponential of the mean cross entropy of all counted tokens."""
    model.eval()
    total = count = 0.0
    for batch in loader:
        counted = int((batch["labels"][:, 1:] >= 0).sum())
        total += loss_of(model, batch).item() * counted
        count += counted
    model.train()
    return math.exp(total / count)


def cost(contestant: Contestant) -> dict[str, object]:
    """FLOPs of the mean step of a cycle, and most bytes on the simulated accelerator in it."""
    sim.load()
    torch.manual_seed(0)
    before = sim.memory_allocated()
    model = network().to("sim")
    training = contestant.method(model, RATE, contestant.steps, 0)
    ids = torch.randint(1000, 20_000, (ROWS, TOKENS))
    batch = {"input_ids": ids.to("sim"), "labels": ids.to("sim")}
    training.step(batch)  # builds state
    sim.reset_peak_memory_stats()
    with FlopCounterMode(display=False) as counter:
        for _ in range(contestant.cycle):
            training.step(batch)
    return {
        "steps_counted": contestant.cycle,
        "gflop": counter.get_total_flops() / contestant.cycle / 1e9,
        "peak_bytes": sim.max_memory_allocated() - before,
    }
