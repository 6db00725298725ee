"""The page as a picture."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogLocator

from experiments.step_cost.contestants import BLOCK, BY_HAND, FULL
from experiments.step_cost.phases import PHASES, SIZE
from experiments.step_cost.runs import BASE, DIMENSIONS, SIZES, Measured
from experiments.step_cost.summary import TARGET, milliseconds, ratios, varied
from experiments.table import Rows

COLORS = {FULL: "black", BY_HAND: "tab:gray", BLOCK: "tab:orange"}


def plot(times: Mapping[str, Measured], shares: Rows, path: Path) -> None:
    """Above: how much of full fine-tuning's time each contestant takes, least to most. Below: scaling, and phases.

    Args:
        times: runs by name, those of all sizes and dimensions among them.
        shares: phases by contestant.
        path: of the PNG.
    """
    figure = pyplot.figure(figsize=(18, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(6, 4))  # type: ignore[misc]
    spans = above.subplots(1, len(SIZES), sharey=True)
    for axis, name in zip(spans, SIZES, strict=True):
        _spans(axis, name, times[name])
    spans[0].invert_yaxis()
    left, right = below.subfigures(1, 2, width_ratios=(3, 2))
    lines = left.subplots(1, len(DIMENSIONS), sharey=True)
    for axis, dimension in zip(lines, DIMENSIONS, strict=True):
        _lines(axis, dimension, varied(times, dimension))
    lines[0].set_ylabel(f"ms per step ({BASE} model, one thing changed)")
    lines[0].legend()
    _stack(right.subplots(), shares)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _spans(axis: Any, name: str, measured: Measured) -> None:
    full = measured.costs[FULL]
    for contestant, cost in measured.costs.items():
        of_full = ratios(cost, full)
        color = "tab:orange" if contestant.startswith("HiFT") else COLORS.get(contestant, "tab:gray")
        axis.plot([min(of_full), max(of_full)], [contestant] * 2, color=color, linewidth=2)
        axis.plot(statistics.median(of_full), contestant, "o", color=color)
        axis.annotate(
            f"{statistics.median(of_full):.2f}",
            (max(of_full), contestant),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.axvline(TARGET, color="tab:red", linewidth=0.8, linestyle="--")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.12)
    axis.grid(axis="x", alpha=0.3)
    axis.set_title(f"{name}, {measured.parameters / 1e6:.1f}M parameters: time of full fine-tuning", fontsize=10)


def _lines(axis: Any, dimension: str, runs: Mapping[int, Measured]) -> None:
    for contestant, color in COLORS.items():
        medians = [statistics.median(run.costs[contestant].ms) for run in runs.values()]
        axis.loglog(list(runs), medians, "o-", color=color, label=contestant, markersize=4)
    axis.set_xticks(list(runs), [str(value) for value in runs])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_xlabel(dimension)


def _stack(axis: Any, shares: Rows) -> None:
    left = dict.fromkeys(shares, 0.0)
    for number, phase in enumerate(PHASES):
        widths = [milliseconds(row)[phase] for row in shares.values()]
        axis.barh(list(shares), widths, left=list(left.values()), label=phase, color=f"C{number}")
        left = {name: left[name] + width for name, width in zip(shares, widths, strict=True)}
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(PHASES), fontsize=8)
    axis.set_xlabel(f"ms per step ({SIZE} model, simulated accelerator)")
