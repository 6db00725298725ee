"""Pictures of a run: which block was updated when, with the loss over it, and the bytes of each step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

BLOCK_PICTURE = "block_timeline.png"
MEMORY_PICTURE = "memory_timeline.png"
MOST_RECORDS, MOST_LABELS, MOST_BARS = 2000, 40, 1000
# name in a record, words, color
ROLES = (
    ("weights", "weights", "tab:blue"),
    ("gradients", "gradients", "tab:orange"),
    ("optimizer_state", "optimizer state on the device", "tab:green"),
)
MIB = 2**20


@dataclass(slots=True)
class StepRecord:
    """An optimizer step, or in a long run some that follow each other."""

    before: int
    """The number of the step before; 0 where the run begins."""
    last: int
    """Its own number, or that of the last of the steps."""
    blocks: tuple[int, ...]
    """The indices of the blocks that were active, in the order of their turns; none without HiFT."""
    nbytes: dict[str, int]
    """The most bytes of each role at one of the moments at which they were counted; of several steps those of the one
    with the most on the device."""
    loss_sum: float = 0.0
    """Of the finite losses."""
    losses: int = 0
    """How many those are."""

    @property
    def steps(self) -> int:
        """How many steps it stands for."""
        return self.last - self.before

    @property
    def loss(self) -> float:
        """The mean loss; NaN where none was finite."""
        return self.loss_sum / self.losses if self.losses else math.nan

    def joined(self, later: "StepRecord") -> "StepRecord":
        """One record of this one's steps and those of the one that follows."""
        return StepRecord(
            self.before,
            later.last,
            tuple(dict.fromkeys(self.blocks + later.blocks)),
            max(self.nbytes, later.nbytes, key=_on_device),
            self.loss_sum + later.loss_sum,
            self.losses + later.losses,
        )


class Timeline:
    """The steps of a run, in a number of records that does not grow with the run.

    When there would be more than `most`, each two that follow each other are joined, and from then on a record is
    of twice as many steps.

    Args:
        most: an even number of records.
    """

    def __init__(self, most: int = MOST_RECORDS) -> None:
        self.records: list[StepRecord] = []
        self._most = most
        self._additions_to_each = 1
        self._additions_to_last = 0

    def add(self, record: StepRecord) -> None:
        """Add what follows the last record."""
        if self._additions_to_last % self._additions_to_each:
            self.records[-1] = self.records[-1].joined(record)
            self._additions_to_last += 1
            return
        if len(self.records) == self._most:
            self.records = halved(self.records)
            self._additions_to_each *= 2
        self.records.append(record)
        self._additions_to_last = 1

    def add_loss(self, loss: float) -> None:
        """Add the loss of the last step; NaN and inf are left out."""
        if math.isfinite(loss):
            self.records[-1].loss_sum += loss
            self.records[-1].losses += 1


def halved(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Join each two records that follow each other."""
    pairs = zip_longest(records[::2], records[1::2])
    return [one if other is None else one.joined(other) for one, other in pairs]


def draw(records: Sequence[StepRecord], names: Sequence[str], folder: Path) -> list[Path]:
    """Write `memory_timeline.png` and, for a run under HiFT, `block_timeline.png`; return their paths.

    Args:
        records: those of a run, at least one.
        names: of the blocks, from the bottom of the model; none without HiFT.
        folder: an existing one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figures = {MEMORY_PICTURE: memory_timeline(records)}
    if names:
        figures[BLOCK_PICTURE] = block_timeline(records, names)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def block_timeline(records: Sequence[StepRecord], names: Sequence[str]) -> Any:
    """Make a figure of which block was updated when, with the loss over it; arguments as of `draw`.

    A bar is a step. Where that would be narrower than a pixel, some steps are a column, in which the blocks that were
    updated stand in the order of their first turns in it, and where those are all blocks in that of the run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 + 0.22 * min(len(names), MOST_LABELS)), layout="constrained")
    loss, blocks = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1 + 0.22 * min(len(names), MOST_LABELS)))
    _draw_loss(loss, records, len(names))
    columns = records
    while sum(len(column.blocks) for column in columns) > MOST_BARS and len(columns) > 1:
        columns = halved(columns)
    cycle = tuple(dict.fromkeys(block for one in records for block in one.blocks))
    bars: dict[int, list[tuple[float, float]]] = {}
    for column in columns:
        turns = cycle if len(column.blocks) == len(cycle) else column.blocks
        width = column.steps / max(1, len(turns))
        for turn, block in enumerate(turns):
            bars.setdefault(block, []).append((column.before + 0.5 + turn * width, width))
    for block, of_block in bars.items():
        blocks.broken_barh(of_block, (block - 0.45, 0.9), color=f"C{block % 10}", linewidth=0)
    steps = columns[0].steps
    drawn = "block updated in each step" if steps == 1 else f"blocks updated in each {steps} steps, by first turn"
    loss.set_title(f"The loss, and the {drawn}")
    every = -(-len(names) // MOST_LABELS)
    blocks.set_yticks(range(0, len(names), every), names[::every], fontsize=8)
    blocks.set_ylim(-0.6, len(names) - 0.4)
    _draw_steps(blocks, records)
    return figure


def memory_timeline(records: Sequence[StepRecord]) -> Any:
    """Make a figure of the bytes of each step by role; arguments as of `draw`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots()
    # the edges of bars, so that a run of one step has an area too
    edges = [records[0].before + 0.5, *(one.last + 0.5 for one in records)]
    shown = [role for role in ROLES if any(one.nbytes[role[0]] for one in records)]
    rows = [_at_edges([one.nbytes[name] / MIB for one in records]) for name, _, _ in shown]
    _, labels, colors = zip(*shown, strict=True)
    axes.stackplot(edges, rows, labels=labels, colors=colors, step="post")
    parked = _at_edges([one.nbytes["parked"] / MIB for one in records])
    if any(parked):
        label = "optimizer state elsewhere (parked)"
        axes.plot(edges, parked, "k--", linewidth=1.2, label=label, drawstyle="steps-post")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MiB")
    steps = records[0].steps
    counted = "each step" if steps == 1 else f"the largest of each {steps} steps"
    axes.set_title(f"Bytes of {counted} by role, without activations")
    axes.grid(alpha=0.3)
    _draw_steps(axes, records)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _on_device(nbytes: dict[str, int]) -> int:
    return sum(nbytes[name] for name, _, _ in ROLES)


def _at_edges(values: list[float]) -> list[float]:
    return [*values, values[-1]]


def _draw_loss(axes: Any, records: Sequence[StepRecord], blocks: int) -> None:
    steps = [(one.before + 1 + one.last) / 2 for one in records]
    each = records[0].steps
    label = "a step" if each == 1 else f"mean of {each} steps"
    axes.plot(steps, [one.loss for one in records], color="tab:gray", linewidth=0.8, label=label)
    all_steps = records[-1].last - records[0].before
    whole_cycles = blocks * max(1, all_steps // (100 * blocks))  # in which all blocks count alike
    length = max(1, round(whole_cycles / each))
    label = f"mean of the last {length * each} steps"
    axes.plot(steps, _running_means(records, length), color="tab:red", linewidth=1.8, label=label)
    axes.set_ylabel("training loss")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")


def _running_means(records: Sequence[StepRecord], length: int) -> list[float]:
    sums = torch.tensor([[one.loss_sum, one.losses] for one in records], dtype=torch.float64).cumsum(0)
    sums[length:] -= sums[:-length].clone()
    means: list[float] = (sums[:, 0] / sums[:, 1]).tolist()
    return means


def _draw_steps(axes: Any, records: Sequence[StepRecord]) -> None:
    axes.set_xlim(records[0].before + 0.5, records[-1].last + 0.5)
    axes.set_xlabel("optimizer step")
