"""The page as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

from experiments.paper_memory.comparison import GIB, UNITS, Cell, cells, figure
from experiments.paper_memory.jobs import FULL_CHECKPOINTING, OPTIMIZERS, PAPER_CELLS, WAYS
from experiments.table import Rows

PARTS = {"parameters": "tab:blue", "gradients": "tab:green", "states": "tab:purple", "residual": "tab:orange"}
PAPER = {"alpha": 0.45, "hatch": "///", "edgecolor": "white"}
"""How the paper's bars look; ours are plain."""


def plot(paper_rows: Rows, llama: Rows, others: Rows, beyond: Rows, path: Path) -> None:
    """LLaMA-7B by part and by optimizer, the other models, and what the paper does not have.

    Args:
        paper_rows: the paper's figures.
        llama: LLaMA-7B as in the paper's table.
        others: the other models.
        beyond: LLaMA-7B in ways that the paper does not have.
        path: of the PNG.
    """
    figure_, axes = pyplot.subplots(4, 1, figsize=(10.5, 28), height_ratios=(5, 11, 15, 5), layout="constrained")
    compared = cells(paper_rows, llama)
    _parts(axes[0], compared)
    _totals(axes[1], compared)
    _pgs(axes[2], cells(paper_rows, others))
    _beyond(axes[3], llama, beyond)
    figure_.suptitle("Device memory, GiB: the paper's figures (hatched) and the planner's (plain)")
    figure_.savefig(path, dpi=110)
    pyplot.close(figure_)


def _parts(axis: Any, compared: list[Cell]) -> None:
    rows = [f"{precision}, {method}" for precision, method in PAPER_CELLS]
    for i, row in enumerate(rows):
        chosen = {cell.column: cell for cell in compared if cell.name == f"LLaMA-7B, AdamW, {row}"}
        for place, ours in ((i - 0.2, False), (i + 0.2, True)):
            left = 0.0
            for part, color in PARTS.items():
                width = (chosen[part].ours if ours else chosen[part].paper) * UNITS[part] / GIB
                axis.barh(place, width, 0.38, left=left, color=color, **({} if ours else PAPER))
                left += width
            axis.text(left + 1, place, f"{left:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), rows)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.legend(handles=[Patch(color=color, label=part) for part, color in PARTS.items()], loc="lower right")
    axis.set_title("LLaMA-7B, AdamW")


def _totals(axis: Any, compared: list[Cell]) -> None:
    totals = [cell for cell in compared if cell.column == "total"]
    chosen = [cell for optimizer in OPTIMIZERS for cell in totals if cell.words[1] == optimizer]
    labels = [", ".join(cell.words[1:]) for cell in chosen]
    _pairs(axis, labels, [cell.paper for cell in chosen], [cell.ours for cell in chosen])
    axis.set_title("LLaMA-7B, total")


def _pgs(axis: Any, compared: list[Cell]) -> None:
    labels = [f"{cell.words[0]}, {cell.words[2]}, {cell.words[3]}" for cell in compared]
    _pairs(axis, labels, [cell.paper for cell in compared], [cell.ours for cell in compared])
    axis.set_xscale("log")
    axis.set_title("Other models, AdamW: parameters, gradients and states")


def _pairs(axis: Any, labels: list[str], paper: list[float], ours: list[float]) -> None:
    places = range(len(labels))
    axis.barh([place - 0.2 for place in places], paper, 0.38, color="tab:gray", **PAPER)
    bars = axis.barh([place + 0.2 for place in places], ours, 0.38, color="tab:orange")
    axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.margins(x=0.1, y=0.01)


def _beyond(axis: Any, llama: Rows, beyond: Rows) -> None:
    rows = {}
    for precision, compared in (("fp32", "fp32"), ("Mixed^Hi", "mixed")):
        rows[f"{compared}, full"] = llama[f"LLaMA-7B, AdamW, {compared}, full"]
        for name in (f"{compared}, {FULL_CHECKPOINTING}", *(f"{precision}, {way}" for way in WAYS)):
            rows[name] = beyond[name]
    totals = [figure(row, "total") for row in rows.values()]
    weights = [int(row["at_peak_weights"]) / GIB for row in rows.values()]
    colors = ["tab:gray" if "full" in name else "tab:orange" for name in rows]
    bars = axis.barh(list(rows), totals, color=colors)
    axis.barh(list(rows), weights, 0.25, color="tab:blue")
    axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.1, y=0.01)
    axis.legend(handles=[Patch(color="tab:blue", label="weights at the peak")], loc="lower right")
    axis.set_title("LLaMA-7B, AdamW: beyond the paper")
