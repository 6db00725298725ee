"""Pictures of a run: which block was updated when, with the loss over it, and the bytes of each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BLOCK_PICTURE = "block_timeline.png"
MEMORY_PICTURE = "memory_timeline.png"
MOST_LABELS, MOST_COLUMNS = 40, 1000
# name in a record, words, color
ROLES = (
    ("weights", "weights", "tab:blue"),
    ("gradients", "gradients", "tab:orange"),
    ("optimizer_state", "optimizer state on the device", "tab:green"),
)
MIB = 2**20


@dataclass(slots=True)
class StepRecord:
    """An optimizer step."""

    step: int
    """Its number, from 1."""
    block: int | None
    """The index of the active block; `None` without HiFT."""
    nbytes: dict[str, int]
    """The most bytes of each role at one of the moments at which they were counted."""
    loss: float = float("nan")
    """The mean over its micro-batches."""


def draw(steps: Sequence[StepRecord], names: Sequence[str], update: str, folder: Path) -> list[Path]:
    """Write `memory_timeline.png` and, for a run under HiFT, `block_timeline.png`; return their paths.

    Args:
        steps: those of a run, at least one.
        names: of the blocks, from the bottom of the model; none without HiFT.
        update: how blocks are stepped; the picture tells what is not counted under "streamed" and "fused".
        folder: an existing one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = {MEMORY_PICTURE: memory_timeline(steps, update)}
    if names:
        figures[BLOCK_PICTURE] = block_timeline(steps, names)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def block_timeline(steps: Sequence[StepRecord], names: Sequence[str]) -> Any:
    """Make a figure of which block was updated when, with the loss over it; arguments as of `draw`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 + 0.22 * min(len(names), MOST_LABELS)), layout="constrained")
    loss, blocks = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1 + 0.22 * min(len(names), MOST_LABELS)))
    loss.plot([one.step for one in steps], [one.loss for one in steps], color="tab:gray", linewidth=0.8, label="a step")
    length = len(names) * max(1, len(steps) // (100 * len(names)))  # whole cycles, in which all blocks count alike
    smooth = _running_means([one.loss for one in steps], length)
    label = f"mean of the last {length} steps"
    loss.plot([one.step for one in steps], smooth, color="tab:red", linewidth=1.8, label=label)
    loss.set_ylabel("training loss")
    loss.grid(alpha=0.3)
    loss.legend(loc="upper right")
    # a bar is a step, or whole cycles where steps would be narrower than a pixel
    width = 1 if len(steps) <= MOST_COLUMNS else len(names) * -(-len(steps) // (MOST_COLUMNS * len(names)))
    updated = {((one.step - 1) // width, one.block) for one in steps}
    for index in range(len(names)):
        bars = [(column * width + 0.5, width) for column, block in sorted(updated) if block == index]
        blocks.broken_barh(bars, (index - 0.45, 0.9), color=f"C{index % 10}", linewidth=0)
    each = "block that was updated in each step" if width == 1 else f"blocks that were updated in each {width} steps"
    loss.set_title(f"The loss, and the {each}")
    every = -(-len(names) // MOST_LABELS)
    blocks.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    blocks.set_ylim(-0.6, len(names) - 0.4)
    _draw_steps(blocks, steps)
    return figure


def memory_timeline(steps: Sequence[StepRecord], update: str) -> Any:
    """Make a figure of the bytes of each step by role; arguments as of `draw`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    # the edges of bars, so that a run of one step has an area too
    edges = [steps[0].step - 0.5, *(one.step + 0.5 for one in steps)]
    shown = [role for role in ROLES if any(one.nbytes[role[0]] for one in steps)]
    rows = [_at_edges([one.nbytes[name] / MIB for one in steps]) for name, _, _ in shown]
    _, labels, colors = zip(*shown, strict=True)
    axes.stackplot(edges, rows, labels=labels, colors=colors, step="post")
    parked = _at_edges([one.nbytes["parked"] / MIB for one in steps])
    if any(parked):
        label = "optimizer state elsewhere (parked)"
        axes.plot(edges, parked, "k--", linewidth=1.2, label=label, drawstyle="steps-post")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    moments = "" if update == "block" else f" and what update={update} has on the device inside a step"
    axes.set_title(f"Bytes of each step by role, without activations{moments}")
    axes.grid(alpha=0.3)
    _draw_steps(axes, steps)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _at_edges(values: list[float]) -> list[float]:
    return [*values, values[-1]]


def _running_means(values: Sequence[float], length: int) -> list[float]:
    losses = torch.tensor(values, dtype=torch.float64)
    known = losses.isfinite()
    sums = torch.stack([losses.where(known, 0.0).cumsum(0), known.cumsum(0)])
    sums[:, length:] -= sums[:, :-length].clone()
    means: list[float] = (sums[0] / sums[1]).tolist()
    return means


def _draw_steps(axes: Any, steps: Sequence[StepRecord]) -> None:
    axes.set_xlim(steps[0].step - 0.5, steps[-1].step + 0.5)
    axes.set_xlabel("optimizer step")
