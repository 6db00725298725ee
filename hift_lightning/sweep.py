"""What a sweep leaves: one table and one picture of all its runs."""

import atexit
import csv
import itertools
import json
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.report import METRICS_FILE, ROWS, one_sentence_errors, shown, written

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
    anew after each run, so that a sweep that breaks off leaves what it has. What is wrong with a run that failed is
    told when it ends, and the others go on.

    Args:
        vertical: names of numbers; the objective of the runs is drawn upwards, and where it was not measured or is what
            is drawn to the right, the first of these that was measured.
        horizontal: name of the number drawn to the right.
    """

    def __init__(self, vertical: Sequence[str], horizontal: str) -> None:
        self.vertical = vertical
        self.horizontal = horizontal
        self._folder = Path()
        self._before: dict[Path, int] = {}
        self._failed: list[Row] = []
        self._objectives: list[str] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note which runs are this sweep's, and see to it that they are shown in any case."""
        with one_sentence_errors():
            if config.hydra.output_subdir is None:
                raise ConfigurationError(
                    "`hydra.output_subdir=null` leaves out what the table of a sweep is made from; do not set it."
                )
            _refuse_one_folder_for_all(config)
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._before, self._failed, self._objectives = written_metrics(self._folder), [], []
        atexit.register(self._show)  # Hydra tells nobody of the end where a run has failed

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Bring the table up to date, and tell what is wrong with a run that has failed."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        if job_return.status == JobStatus.FAILED:
            _tell_failure(job_return)
            self._failed.append(_overrides(config.hydra.overrides.task))
        elif (objective := config.get("objective")) is not None:
            self._objectives.append(str(objective))
        write_table(read_runs(self._folder, self._before), self._folder / TABLE_FILE)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write table and picture, and print the table."""
        atexit.unregister(self._show)
        self._show()

    def _show(self) -> None:
        folder, runs = self._folder, read_runs(self._folder, self._before)
        if not runs:
            return
        write_table(runs, folder / TABLE_FILE)
        names = varied([*runs, *self._failed])  # where one run alone has ended well, nothing differs among these
        print_table(runs, names)
        print(f"table: {shown(folder / TABLE_FILE)}")
        try:
            draw(runs, names, self._drawn_upwards(runs), self.horizontal, folder / PICTURE_FILE)
        except ImportError:
            print("No picture, because matplotlib is not installed; run `pip install matplotlib` to have one.")
        else:
            print(f"picture: {shown(folder / PICTURE_FILE)}")

    def _drawn_upwards(self, runs: Sequence[Row]) -> str:
        wanted = [name for name in (*self._objectives, *self.vertical) if name != self.horizontal]
        return next((name for name in wanted if any(name in run for run in runs)), self.vertical[0])


def _refuse_one_folder_for_all(config: DictConfig) -> None:
    unresolved: Any = OmegaConf.to_container(config, resolve=False)
    folder = unresolved.get("output_dir")
    if not isinstance(folder, str) or "${" in folder:  # what is no path is told by the runs
        return
    if not config.hydra.job.chdir or Path(folder).is_absolute():
        raise ConfigurationError(
            f"`output_dir={folder}` is one folder for all runs of a sweep, each of which would write over the one "
            "before; give `hydra.sweep.dir` instead, in which each run has a folder of its own."
        )


def _tell_failure(job_return: JobReturn) -> None:
    try:
        _ = job_return.return_value  # tells the run's overrides, and raises
    except CompactHydraException as error:
        print(error, file=sys.stderr)
    except Exception:
        traceback.print_exc()


def written_metrics(folder: Path) -> dict[Path, int]:
    """Return the `metrics.json` of each finished run below `folder`, and when it was written, in nanoseconds."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(METRICS_FILE)}


def read_runs(folder: Path, before: Mapping[Path, int]) -> list[Row]:
    """Return the overrides and numbers of each finished run below `folder`, in the order of the jobs.

    Args:
        folder: of a sweep.
        before: what `written_metrics` returned at its start, of an earlier sweep in the same folder.
    """
    runs = []
    for path, moment in written_metrics(folder).items():
        if before.get(path) == moment:
            continue
        # the metrics of a run may lie below its folder (`output_dir`)
        parents = itertools.takewhile(folder.parent.__ne__, path.parents)
        settings = next((found for parent in parents for found in parent.glob("*/hydra.yaml")), None)
        if settings is None:
            continue
        hydra = OmegaConf.load(settings).hydra
        overrides = _overrides(hydra.overrides.task)
        measured = json.loads(path.read_text(encoding="utf-8"))
        numbers = {name: value for name, value in measured.items() if value is not None}  # as what is NaN is written
        runs.append((hydra.job.num, {**overrides, **numbers}))
    return [row for _, row in sorted(runs, key=lambda run: int(run[0]))]


def _overrides(task: Iterable[str]) -> Row:
    return dict(override.lstrip("+~").partition("=")[::2] for override in task)


def write_table(runs: Sequence[Row], path: Path) -> None:
    """Write the runs as comma-separated values, a column for whatever any run has."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(runs))
        writer.writeheader()
        writer.writerows(runs)


def print_table(runs: Sequence[Row], names: Sequence[str]) -> None:
    """Print of each run the overrides of these names, and its main numbers."""
    shown = [row for row in ROWS if row[0] in PRINTED and any(row[0] in run for run in runs)]
    table = Table()
    for name in (*map(_last_part, names), *(words for _, words, _ in shown)):
        table.add_column(escape(name))
    for run in runs:
        numbers = [written(run[name], kind) if name in run else "" for name, _, kind in shown]
        table.add_row(*(escape(str(run.get(key, ""))) for key in names), *numbers)
    Console().print(table)


def draw(runs: Sequence[Row], names: Sequence[str], vertical: str, horizontal: str, path: Path) -> None:
    """Draw one point per run, labelled with the overrides of these names.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        if vertical in run and horizontal in run:
            point = (_scaled(horizontal, run[horizontal]), _scaled(vertical, run[vertical]))
            label = ", ".join(f"{_last_part(key)}={run.get(key, '')}" for key in names)
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
