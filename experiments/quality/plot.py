"""Two pictures of the methods: accuracy on each data set, and the mean over all of them against peak memory."""

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.quality.comparison import Results, complete_data_sets, less, mean, over_data_sets
from experiments.quality.cost import bytes_row
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.methods import (
    CONTESTANTS,
    FULL,
    FULL_NO_DROPOUT,
    HIFT,
    IN_LESS,
    LONG,
    LORA_NO_DROPOUT,
    ONE_TURN,
    STEPS,
    TWO_IN_LORAS_TIME,
)
from experiments.table import Rows

LOWEST = -10.5
"""Points below full fine-tuning that the axis ends with; what is below stands there as a number."""
COLUMNS = 3
"""Data sets side by side."""
LABEL = 52
"""Characters in a line of a method's name."""
MIB = 2**20
SHOWN = {
    FULL: (FULL, (7, -4)),
    FULL_NO_DROPOUT: (FULL_NO_DROPOUT, (7, -1)),
    HIFT: ("HiFT, as in the paper", (7, -4)),
    LONG: ("HiFT, 20 steps a block", (7, -4)),
    ONE_TURN: ("HiFT, one turn a block", (7, 3)),
    TWO_IN_LORAS_TIME: ("HiFT, one turn, two layers a block, no dropout", (7, 0)),
    "LISA": ("LISA", (-7, -4)),
    "BAdam": ("BAdam", (-7, -4)),
    "LoRA": ("LoRA", (7, -6)),
    IN_LESS: ("LoRA, fewer texts", (-7, -4)),
    LORA_NO_DROPOUT: ("LoRA, fewer texts, no dropout", (-7, -4)),
    "GaLore": ("GaLore", (7, -4)),
    "DoRA": ("DoRA", (7, -4)),
    "BitFit": ("BitFit", (7, -4)),
    "head only": ("head only", (7, -4)),
}
"""What stands beside a method's point in the picture of memory, and how many points of print right and up of it."""


def against_memory(in_time: Results, peaks: Rows, path: Path) -> None:
    """Mean accuracy over the data sets against peak bytes, a point for each method that has been run on all of them.

    Args:
        in_time: accuracies at equal time.
        peaks: of bytes (`bytes.csv`).
        path: of the PNG.
    """
    figure, axis = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    data_sets = complete_data_sets(in_time, [FULL])
    shown = [name for name in SHOWN if all((data_set, name) in in_time for data_set in data_sets)]
    for method in shown:
        words, beside = SHOWN[method]
        place, height = int(peaks[bytes_row(method)]["peak_bytes"]) / MIB, over_data_sets(in_time, method, data_sets)
        color = _color(method)
        axis.errorbar(place, height.mean, yerr=height.error, fmt="o", capsize=4, color=color)
        side = "right" if beside[0] < 0 else "left" if beside[0] > 0 else "center"
        axis.annotate(words, (place, height.mean), beside, textcoords="offset points", color=color, ha=side, fontsize=9)
    axis.set_xlim(0, 1.25 * max(int(peaks[bytes_row(method)]["peak_bytes"]) for method in shown) / MIB)
    axis.set_xlabel("peak bytes on the device, MiB")
    axis.set_ylabel("test accuracy, points")
    axis.set_title(
        f"Mean over {len(data_sets)} data sets, in the time of {STEPS} steps of full fine-tuning "
        "(bars: standard error over seeds)",
        fontsize=10,
    )
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _color(method: str) -> str:
    return "tab:blue" if method.startswith("HiFT") else "black" if method == FULL else "tab:gray"


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
            color = _color(method)
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
