"""The main table as a picture."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.memory.methods import OURS
from experiments.memory.summary import in_weights, peak
from experiments.table import Rows


def plot(rows: Rows, path: Path) -> None:
    """One bar a method: peak, bytes left, bytes moved and FLOPs."""
    measured = {name: row for name, row in rows.items() if row.get("weights_bytes")}
    names = sorted(measured, key=lambda name: peak(measured[name]), reverse=True)
    colors = ["tab:orange" if name in OURS else "tab:gray" for name in names]
    panels = {
        "peak, P": [peak(measured[name]) for name in names],
        "left between\nsteps, P": [in_weights(measured[name], "left_bytes") for name in names],
        "moved per step,\nboth ways, P": [
            in_weights(measured[name], "to_device_bytes") + in_weights(measured[name], "to_host_bytes")
            for name in names
        ],
        "GFLOP per step": [float(measured[name]["gflop"]) for name in names],
    }
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, figsize=(10.5, 1.5 + 0.25 * len(names)))
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
        axis.set_title(title)
        axis.margins(x=0.35, y=0.01)
    figure.suptitle("Device memory in multiples of the fp32 weights (P); this project in orange")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
