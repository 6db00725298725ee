"""Accuracy and peak memory of each optimizer, as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.optimizers.methods import CONTESTANTS, OPTIMIZERS
from experiments.optimizers.summary import MIB, WAYS, accuracies, peak_bytes
from experiments.quality.comparison import mean
from experiments.table import Rows

COLORS = {"full": "tab:gray", "HiFT": "tab:orange"}


def plot(final: Rows, peaks: Rows, path: Path) -> None:
    """What there is of all optimizers.

    Args:
        final: of the final runs.
        peaks: of bytes.
        path: of the PNG.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    _accuracies(left, final)
    _peaks(right, peaks)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _accuracies(axis: Any, final: Rows) -> None:
    series = [(way, steps) for way in WAYS for steps in CONTESTANTS["AdamW", way].steps]
    for number, (way, steps) in enumerate(series):
        found = {place: accuracies(final, name, way, steps) for place, name in enumerate(OPTIMIZERS)}
        shown = {place + 0.2 * (number - 1): values for place, values in found.items() if values}
        means = [mean(values) for values in shown.values()]
        axis.errorbar(
            list(shown),
            [each.mean for each in means],
            yerr=[each.error for each in means],
            fmt="o",
            color=COLORS[way],
            markerfacecolor="white" if way == "HiFT" and steps != series[-1][1] else COLORS[way],
            capsize=4,
            label=f"{way}, {steps} steps",
        )
    axis.set_xticks(range(len(OPTIMIZERS)), OPTIMIZERS)
    axis.set_xlim(-0.5, len(OPTIMIZERS) - 0.5)
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    axis.set_title("Test accuracy, points (bars: standard error over seeds)")


def _peaks(axis: Any, peaks: Rows) -> None:
    for number, way in enumerate(WAYS):
        found = {place: peak_bytes(peaks, name, way) for place, name in enumerate(OPTIMIZERS)}
        counted = {place: peak / MIB for place, peak in found.items() if peak is not None}
        places = [place + 0.38 * (number - 0.5) for place in counted]
        bars = axis.bar(places, list(counted.values()), 0.36, color=COLORS[way], label=way)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(OPTIMIZERS)), OPTIMIZERS)
    axis.legend()
    axis.set_title("Peak bytes on the device, MiB")
