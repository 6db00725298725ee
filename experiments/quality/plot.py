"""Accuracy of the methods on each data set, as a picture."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.quality.comparison import Results, less, mean
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.methods import CONTESTANTS, FULL

LOWEST = -10.5
"""Points below full fine-tuning that the axis ends with; what is below stands there as a number."""
COLUMNS = 3
"""Data sets side by side."""
LABEL = 52
"""Characters in a line of a method's name."""


def plot(in_time: Results, in_steps: Results, path: Path) -> None:
    """Points over full fine-tuning, with standard errors: filled in its time, hollow in its steps.

    Args:
        in_time: accuracies at equal time.
        in_steps: accuracies at equal steps.
        path: of the PNG.
    """
    data_sets = [name for name in DATA_SETS if (name, FULL) in in_time]
    methods = [name for name in CONTESTANTS if any((data_set, name) in in_time for data_set in data_sets)]
    columns = min(COLUMNS, len(data_sets))
    rows = -(-len(data_sets) // columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(4 * columns + 2, rows * (1.2 + 0.36 * len(methods))),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis in axes.flat[len(data_sets) :]:
        axis.set_visible(False)
    for axis, data_set in zip(axes.flat, data_sets, strict=False):
        for place, method in enumerate(methods):
            color = "tab:blue" if method.startswith("HiFT") else "black" if method == FULL else "tab:gray"
            for found, offset, marker in ((in_time, -0.12, {}), (in_steps, 0.12, {"markerfacecolor": "white"})):
                if (data_set, method) in found and (found is in_time or method != FULL):
                    difference = less(found, method, FULL, [data_set])
                    if difference.mean < LOWEST:
                        where = {"va": "center", "fontsize": 8}
                        axis.text(LOWEST, place + 3 * offset, f" ← {difference.signed()}", color=color, **where)
                        continue
                    axis.errorbar(
                        difference.mean,
                        place + offset,
                        xerr=difference.error,
                        fmt="o",
                        color=color,
                        capsize=3,
                        **marker,
                    )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{data_set}\n({FULL}: {mean(in_time[data_set, FULL])} %)", fontsize=10)
        if data_set in data_sets[-columns:]:
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("test accuracy over full AdamW, points")
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(methods)), [textwrap.fill(method, LABEL) for method in methods])
    axes[0][0].set_ylim(len(methods) - 0.4, -0.6)
    axes[0][0].set_xlim(left=LOWEST)
    figure.suptitle("Filled: in equal time. Hollow: in equal steps. Bars: standard error over seeds.", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
