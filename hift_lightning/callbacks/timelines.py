"""Pictures of a run: which block was updated when, with the loss over it, and the bytes of each step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

BLOCK_PICTURE = "block_timeline.png"
MEMORY_PICTURE = "memory_timeline.png"
MOST_LABELS = 40
ROLES = (("weights", "weights"), ("gradients", "gradients"), ("optimizer_state", "optimizer state on the device"))
MIB = 2**20


@dataclass
class StepRecord:
    """An optimizer step."""

    step: int
    """Its number, from 1."""
    block: int | None
    """The index of the active block; `None` without HiFT."""
    nbytes: dict[str, int] = field(default_factory=dict)
    """The most bytes of each role at one of the moments at which they were counted."""
    loss: float = float("nan")
    """The mean over its micro-batches."""


def draw_blocks(steps: Sequence[StepRecord], names: Sequence[str], folder: Path) -> Path:
    """Write `block_timeline.png` into the folder and return its path.

    Args:
        steps: those of a run under HiFT.
        names: of the blocks, from the bottom of the model.
        folder: an existing one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 + 0.22 * min(len(names), MOST_LABELS)), layout="constrained")
    loss, blocks = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1 + 0.22 * min(len(names), MOST_LABELS)))
    loss.plot([one.step for one in steps], [one.loss for one in steps], color="tab:gray", linewidth=0.8, label="a step")
    smooth = _running_means([one.loss for one in steps], len(names))
    label = f"mean of the last {len(names)} steps"
    loss.plot([one.step for one in steps], smooth, color="tab:red", linewidth=1.8, label=label)
    loss.set_ylabel("training loss")
    loss.grid(alpha=0.3)
    loss.legend(loc="upper right")
    loss.set_title("The loss, and the block that was updated in each step")
    begins = [(one.step - 1, 1) for one in steps]
    for index in range(len(names)):
        bars = [bar for bar, one in zip(begins, steps, strict=True) if one.block == index]
        blocks.broken_barh(bars, (index - 0.45, 0.9), color=f"C{index % 10}", linewidth=0)
    every = -(-len(names) // MOST_LABELS)
    blocks.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    blocks.set_ylim(-0.6, len(names) - 0.4)
    _draw_steps(blocks, steps)
    return _written(figure, folder / BLOCK_PICTURE)


def draw_memory(steps: Sequence[StepRecord], folder: Path) -> Path:
    """Write `memory_timeline.png` into the folder and return its path.

    Args:
        steps: those of a run.
        folder: an existing one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    rows = [[one.nbytes[role] / MIB for one in steps] for role, _ in ROLES]
    axes.stackplot(
        [one.step for one in steps],
        rows,
        labels=[words for _, words in ROLES],
        colors=["tab:blue", "tab:orange", "tab:green"],
        step="mid",
    )
    parked = [one.nbytes["parked"] / MIB for one in steps]
    if any(parked):
        axes.plot([one.step for one in steps], parked, "k--", linewidth=1.2, label="optimizer state elsewhere (parked)")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    axes.set_title("Bytes of each step by role, without activations")
    axes.grid(alpha=0.3)
    _draw_steps(axes, steps)
    figure.legend(loc="outside lower center", ncols=4)
    return _written(figure, folder / MEMORY_PICTURE)


def _running_means(values: Sequence[float], length: int) -> list[float]:
    return [fmean(values[max(0, end - length) : end]) for end in range(1, len(values) + 1)]


def _draw_steps(axes: Any, steps: Sequence[StepRecord]) -> None:
    axes.set_xlim(steps[0].step - 1, steps[-1].step)
    axes.set_xlabel("optimizer step")


def _written(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
