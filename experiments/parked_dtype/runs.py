"""The runs of the application, and the page on them."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.table import Row, Rows, Table, markdown

HERE = Path(__file__).parent
SETTINGS = {
    "default": ("trainer.max_steps=250",),
    "one block": ("strategy.group_size=8", "learning_rate=1.0e-4", "data.batch_size=8"),
}
"""What differs from `python train.py`.

Moments are rounded at every visit of their block; with one block, which has the learning rate of full fine-tuning,
that is at every step.
"""
SEEDS = (42, 43, 44)
DTYPES = {"fp32": "null", "bf16": "bfloat16"}
BETA2 = 0.999
"""AdamW's in `conf/optimizer/adamw.yaml`."""


class Run(NamedTuple):
    """One run of the application."""

    setting: str
    dtype: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}, {self.dtype}, seed {self.seed}"


RUNS = {run.name: run for run in (Run(s, d, seed) for s in SETTINGS for seed in SEEDS for d in DTYPES)}


def measure(name: str) -> dict[str, object]:
    """Run the application, and read what it leaves."""
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "train.py",
            *SETTINGS[run.setting],
            f"strategy.parked_dtype={DTYPES[run.dtype]}",
            f"seed={run.seed}",
            "trainer.enable_progress_bar=false",
            "callbacks.progress_bar=null",
            "logger=none",
            f"hydra.run.dir={folder}",
        ]
        subprocess.run([sys.executable, *command], cwd=HERE.parents[1], check=True)
        metrics = json.loads(Path(folder, "metrics.json").read_text())
    columns = ("steps", "hift/cycles", "test/accuracy_before", "test/accuracy", "test/loss", "memory/parked_bytes")
    return {**run._asdict(), **{column: metrics[column] for column in columns}}


TABLE = Table(HERE / "results.csv", tuple(RUNS), measure)


def summary(rows: Rows) -> str:
    """The text; its numbers come from the rows and from `where_second_moment_stops`."""
    visits, reached = where_second_moment_stops()
    head = ["run", "steps", "visits of a block", "test accuracy before", "after", "test loss", "parked bytes"]
    parts = [
        "`python train.py` (MiniLM on film reviews, AdamW, HiFT), with the moments parked in fp32, in which they are "
        "computed, and in bf16 (`strategy.parked_dtype=bfloat16`), which rounds them each time that their block is "
        "parked. The settings differ from the default run by "
        + "; by ".join(f"`{' '.join(overrides)}` ({setting})" for setting, overrides in SETTINGS.items())
        + ".",
        markdown(head, [_line(name, row) for name, row in rows.items()]),
        *(_comparison(setting, rows) for setting in SETTINGS),
        f"With a steady gradient, AdamW's second moment (beta2 = {BETA2}), rounded to bf16 at each visit, stops rising "
        f"after {visits} visits of its block, at {reached:.2f} of what it should become: smaller changes are rounded "
        "away. For runs with many more visits leave `parked_dtype` as it is, or use a smaller beta2.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def where_second_moment_stops() -> tuple[int, float]:
    """The visit after which the mean square of a gradient of 1 rises no more if bf16 keeps it, and what it is then."""
    before, visits = torch.zeros((), dtype=torch.bfloat16), 0
    while (after := (before.float() * BETA2 + (1 - BETA2)).bfloat16()) != before:
        before, visits = after, visits + 1
    return visits, before.item()


def _line(name: str, row: Row) -> list[str]:
    return [
        name,
        row["steps"],
        row["hift/cycles"],
        f"{float(row['test/accuracy_before']):.2%}",
        f"{float(row['test/accuracy']):.2%}",
        f"{float(row['test/loss']):.4f}",
        f"{int(row['memory/parked_bytes']):,}",
    ]


def _comparison(setting: str, rows: Rows) -> str:
    """bf16 against fp32 in a setting; empty until all its runs are there."""
    if not all(run.name in rows for run in RUNS.values() if run.setting == setting):
        return ""

    def column(dtype: str, key: str) -> list[float]:
        return [float(rows[Run(setting, dtype, seed).name][key]) for seed in SEEDS]

    def differences(key: str) -> list[float]:
        return [bf16 - fp32 for fp32, bf16 in zip(column("fp32", key), column("bf16", key), strict=True)]

    accuracy = {dtype: column(dtype, "test/accuracy") for dtype in DTYPES}
    points = [100 * difference for difference in differences("test/accuracy")]
    losses = differences("test/loss")
    kept = sum(column("bf16", "memory/parked_bytes")) / sum(column("fp32", "memory/parked_bytes"))
    spread = 100 * (max(accuracy["fp32"]) - min(accuracy["fp32"]))
    return (
        f"- {setting}: with bf16, {kept:.4f} of the bytes are parked. The mean test accuracy of {len(SEEDS)} seeds is "
        f"{statistics.mean(accuracy['bf16']):.2%} against {statistics.mean(accuracy['fp32']):.2%}; of one seed it "
        f"changes by {min(points):+.2f} to {max(points):+.2f} points, and the test loss by {min(losses):+.4f} to "
        f"{max(losses):+.4f}. With fp32, the seeds alone are {spread:.2f} points apart."
    )
