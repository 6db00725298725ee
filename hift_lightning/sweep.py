"""What a sweep leaves: one table and one picture of all its runs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from hift_lightning.report import METRICS_FILE, ROWS, written

TABLE_FILE = "sweep.csv"
PICTURE_FILE = "sweep.png"
# what fits a terminal; sweep.csv has the rest
PRINTED = (
    "test/accuracy",
    "val/accuracy",
    "test/perplexity",
    "val/perplexity",
    "time/step_ms_mean",
    "memory/peak_device_bytes",
    "memory/parked_bytes",
    "flops/step_mean",
)
UNITS = {
    "share": "%",
    "perplexity": "less is better",
    "bytes": "MiB",
    "milliseconds": "ms",
    "flops": "TFLOP",
    "count": "number",
}
Row = dict[str, Any]


class SweepTable(Callback):
    """Write `sweep.csv` and `sweep.png` into the folder of a multirun, and print the table.

    The table has one row per finished run: its overrides and the numbers of its `metrics.json`. It is written
    anew after each run, so that a sweep that breaks off leaves what it has.

    Args:
        vertical: names of numbers; the first that was measured is drawn upwards.
        horizontal: name of the number drawn to the right.
    """

    def __init__(self, vertical: Sequence[str], horizontal: str) -> None:
        self.vertical = vertical
        self.horizontal = horizontal

    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        """Bring the table up to date."""
        if config.hydra.mode == RunMode.MULTIRUN:
            folder = Path(config.hydra.sweep.dir)
            write_table(read_runs(folder), folder / TABLE_FILE)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write table and picture, and print the table."""
        folder = Path(config.hydra.sweep.dir)
        runs = read_runs(folder)
        if not runs:
            return
        write_table(runs, folder / TABLE_FILE)
        print_table(runs)
        print(f"table: {folder / TABLE_FILE}")
        try:
            vertical = next((name for name in self.vertical if any(name in run for run in runs)), self.vertical[0])
            draw(runs, vertical, self.horizontal, folder / PICTURE_FILE)
        except ImportError:
            print("No picture, because matplotlib is not installed; run `pip install matplotlib` to have one.")
        else:
            print(f"picture: {folder / PICTURE_FILE}")


def read_runs(folder: Path) -> list[Row]:
    """Return the overrides and numbers of each finished run below `folder`, in the order of the jobs."""
    runs = []
    for path in folder.rglob(METRICS_FILE):
        hydra = OmegaConf.load(path.parent / ".hydra" / "hydra.yaml").hydra
        overrides = dict(override.lstrip("+~").partition("=")[::2] for override in hydra.overrides.task)
        runs.append((hydra.job.num, {**overrides, **json.loads(path.read_text(encoding="utf-8"))}))
    return [row for _, row in sorted(runs, key=lambda run: int(run[0]))]


def write_table(runs: Sequence[Row], path: Path) -> None:
    """Write the runs as comma-separated values, a column for whatever any run has."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(runs))
        writer.writeheader()
        writer.writerows(runs)


def print_table(runs: Sequence[Row]) -> None:
    """Print what differs between the runs and their main numbers."""
    shown = [row for row in ROWS if row[0] in PRINTED and any(row[0] in run for run in runs)]
    table = Table()
    for name in (*map(_last_part, varied(runs)), *(words for _, words, _ in shown)):
        table.add_column(name)
    for run in runs:
        numbers = [written(run[name], kind) if name in run else "" for name, _, kind in shown]
        table.add_row(*(str(run.get(key, "")) for key in varied(runs)), *numbers)
    Console().print(table)


def draw(runs: Sequence[Row], vertical: str, horizontal: str, path: Path) -> None:
    """Draw one point per run, labelled with the overrides that differ between runs.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        if vertical in run and horizontal in run:
            point = (_scaled(horizontal, run[horizontal]), _scaled(vertical, run[vertical]))
            label = ", ".join(f"{_last_part(key)}={run.get(key, '')}" for key in varied(runs))
            axes.plot(*point, marker="o", color="tab:blue")
            axes.annotate(label, point, xytext=(0, 7), textcoords="offset points", ha="center")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel(_axis(horizontal))
    axes.set_ylabel(_axis(vertical))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def varied(runs: Sequence[Row]) -> list[str]:
    """Return the names of the overrides that differ between runs."""
    return [
        name
        for name in _columns(runs)
        if isinstance(next(run[name] for run in runs if name in run), str) and len({run.get(name) for run in runs}) > 1
    ]


def _columns(runs: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run))


def _last_part(key: str) -> str:
    return key.rpartition(".")[2]


def _axis(name: str) -> str:
    return next((f"{words} ({UNITS[kind]})" for known, words, kind in ROWS if known == name), name)


def _scaled(name: str, value: float) -> float:
    kind = next((kind for known, _, kind in ROWS if known == name), None)
    return {"bytes": value / 2**20, "share": 100 * value, "flops": value / 1e12}.get(kind or "", value)
