"""The bytes that an update needs beside the weights, for models of different depth."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from experiments.memory.meter import nbytes
from experiments.memory.methods import Method
from experiments.memory.task import Task
from hift_lightning.engine.update import PieceUpdate
from tests import simulated_accelerator as sim

WINDOW = 2**20

DEPTHS = {
    f"{update}, {layers} layers": (update, layers) for update in ("streamed", "fused") for layers in (8, 16, 32, 64)
}


class UpdateBytes(NamedTuple):
    """One call that steps parameters piece by piece."""

    peak: int
    """Most bytes in use during the call."""
    before: int
    """Bytes in use when it began."""
    gradients: int
    """Bytes of the gradients that it uses up."""

    @property
    def own(self) -> int:
        """What the update itself needs: the gradients, the window and what the optimizer allocates."""
        return self.peak - self.before + self.gradients


@contextmanager
def updates_watched() -> Iterator[list[UpdateBytes]]:
    """Within it, every update piece by piece is noted; the device's peak is reset for that."""
    seen: list[UpdateBytes] = []
    step = PieceUpdate.step

    def watched(self: PieceUpdate, parameters: Iterable[nn.Parameter]) -> None:
        chosen = list(parameters)
        gradients = nbytes(p.grad for p in chosen if p.grad is not None)
        before = sim.memory_allocated()
        sim.reset_peak_memory_stats()
        step(self, chosen)
        seen.append(UpdateBytes(sim.max_memory_allocated(), before, gradients))

    PieceUpdate.step = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        PieceUpdate.step = step  # type: ignore[method-assign]


def measure_depth(name: str) -> dict[str, object]:
    """Two cycles of a narrow model; `fused` with activation checkpointing."""
    update, layers = DEPTHS[name]
    task = Task(layers=layers, width=256, intermediate=688, heads=4, vocabulary=1000)
    method = Method({"update": update, "window": WINDOW}, checkpointing=update == "fused")
    with updates_watched() as seen:
        sim.load()
        run = method.run(task, 2 * task.cycle)
    return {
        "weights_bytes": run.weights,
        "peak_minus_weights": max(each.peak for each in seen) - run.weights,
        "own_bytes": max(each.own for each in seen),
        "gradient_bytes": max(each.gradients for each in seen),
        "window_bytes": WINDOW,
    }
