"""The page as a picture."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from experiments.gpu_check.figures import paged, times_of
from experiments.gpu_check.profiles import CONTESTANTS, PAGING, Profile
from experiments.gpu_check.record import Measured
from experiments.gpu_check.training import RAN
from experiments.paper_memory.comparison import GIB
from experiments.table import Rows


def plot(profile: Profile, measured: Measured, path: Path) -> None:
    """Peaks beside the plans, tokens per second, and steps with paging and without.

    Args:
        profile: what was to be measured.
        measured: what has been.
        path: of the PNG.
    """
    figure, axes = pyplot.subplot_mosaic(
        [["memory", "speed"], ["memory", "paging"]], figsize=(16, 4 + max(len(measured.memory), 20) * 0.22)
    )
    _memory(axes["memory"], measured.memory, int(measured.card["total"]))
    _speed(axes["speed"], measured.speed)
    _paging(axes["paging"], measured)
    figure.suptitle(measured.card["card"], y=0.995)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _memory(axis: Any, rows: Rows, total: int) -> None:
    planned = [int(row.get("planned") or 0) / GIB for row in rows.values()]
    axis.barh([place - 0.2 for place in range(len(rows))], planned, 0.38, color="tab:gray", alpha=0.6)
    for place, row in enumerate(rows.values()):
        if row["outcome"] == RAN:
            axis.barh(place + 0.2, int(row["allocated"]) / GIB, 0.38, color="tab:orange")
            axis.plot([int(row["driver"]) / GIB], [place + 0.2], "|", color="black")
        else:
            axis.text(0, place + 0.2, f" {row['outcome'][:60]}", va="center", fontsize=6)
    axis.axvline(total / GIB, color="tab:red", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=7)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel("GiB; the line is the card's memory")
    handles: list[Any] = [
        Patch(color="tab:gray", alpha=0.6, label="planned"),
        Patch(color="tab:orange", label="allocated"),
        Line2D([], [], color="black", marker="|", linestyle="", label="driver"),
    ]
    axis.legend(handles=handles, loc="lower right")
    axis.set_title("Peak of memory")


def _speed(axis: Any, rows: Rows) -> None:
    contestants = [times for times in times_of(CONTESTANTS, rows) if times.outcome == RAN]
    tokens = [1000 * int(times.rows[0]["tokens"]) for times in contestants]
    speeds = [count / times.median for count, times in zip(tokens, contestants, strict=True)]
    slowest = [count / max(times.cycles_ms) for count, times in zip(tokens, contestants, strict=True)]
    fastest = [count / min(times.cycles_ms) for count, times in zip(tokens, contestants, strict=True)]
    colors = ["tab:orange" if times.name.startswith("HiFT") else "tab:gray" for times in contestants]
    _bars(axis, [times.name for times in contestants], speeds, slowest, fastest, colors, "{:,.0f}")
    axis.set_xlabel("tokens per second: median, slowest and fastest cycle")
    axis.set_title("Speed")


def _paging(axis: Any, measured: Measured) -> None:
    ways = [times for times in times_of(PAGING, measured.paging) if times.outcome == RAN]
    medians = [times.median for times in ways]
    slowest, fastest = ([pick(times.cycles_ms) for times in ways] for pick in (max, min))
    colors = ["tab:gray" if PAGING[times.name].compared is None else "tab:orange" for times in ways]
    _bars(axis, [times.name for times in ways], medians, fastest, slowest, colors, "{:,.1f}")
    compared = {each.times.name: each for each in paged(measured.paging, measured.copies)}
    for place, times in enumerate(ways):
        if each := compared.get(times.name):
            alone = each.page_in_ms + each.park_ms
            axis.barh(place, alone, 0.25, left=each.compared.median, fill=False, edgecolor="tab:blue", hatch="///")
    axis.legend(handles=[Patch(fill=False, edgecolor="tab:blue", hatch="///", label="copies, if nothing were hidden")])
    axis.set_xlabel("ms per step: median, fastest and slowest cycle")
    axis.set_title("Paging")


def _bars(
    axis: Any, names: list[str], values: list[float], low: list[float], high: list[float], colors: list[str], fmt: str
) -> None:
    errors = [
        [value - each for value, each in zip(values, low, strict=True)],
        [each - value for value, each in zip(values, high, strict=True)],
    ]
    bars = axis.barh(names, values, color=colors, xerr=errors, ecolor="black", capsize=3)
    axis.bar_label(bars, fmt=fmt, label_type="center", color="white", fontsize=8)
    axis.invert_yaxis()
