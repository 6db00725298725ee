"""What is measured: contestants that take turns on a model, and the cycles of each as CSV."""

import csv
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.memory.task import Task
from experiments.step_cost.contestants import BLOCK, BY_HAND, CONTESTANTS, FULL
from experiments.step_cost.measure import Cost, costs

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """Contestants that take turns.

    Args:
        task: what they train on.
        contestants: names among `CONTESTANTS`.
        cycles: of each that are measured.
    """

    task: Task
    contestants: tuple[str, ...]
    cycles: int


def _task(layers: int = 6, width: int = 192, length: int = 64, batch: int = 4) -> Task:
    """A LLaMA with heads of 64 and an MLP of 2.6875 times the width."""
    return Task(
        layers=layers,
        width=width,
        intermediate=width * 43 // 16,
        heads=width // 64,
        vocabulary=1000,
        batch=batch,
        length=length,
    )


SIZES = {
    "small": Run(_task(), tuple(CONTESTANTS), 10),
    "medium": Run(_task(layers=8, width=256), tuple(CONTESTANTS), 8),
    "large": Run(_task(layers=8, width=320), tuple(CONTESTANTS), 6),
}
"""Every contestant, on three models."""

BASE = "small"
DIMENSIONS: dict[str, tuple[int, ...]] = {
    "layers": (3, 6, 12),
    "width": (128, 192, 384),
    "length": (32, 64, 128, 256),
    "batch": (2, 4, 8, 16),
}
"""In which the model or the batch of `BASE` is varied, and the values; one of each is that of `BASE`."""

SCALING = {
    f"{dimension} {value}": Run(_task(**{dimension: value}), (FULL, BY_HAND, BLOCK), 5)
    for dimension, values in DIMENSIONS.items()
    for value in values
    if value != getattr(SIZES[BASE].task, dimension)
}
RUNS = {**SIZES, **SCALING}


@dataclass(frozen=True)
class Measured:
    """A run as it was measured."""

    task: Task
    threads: int
    parameters: int
    costs: dict[str, Cost]


class Record:
    """The cycles of all runs, in a file."""

    def __init__(self, path: Path, runs: Mapping[str, Run]) -> None:
        self.path, self.runs = path, runs

    def load(self) -> dict[str, Measured]:
        """The runs measured so far, in the order of `runs`."""
        if not self.path.exists():
            return {}
        found: dict[str, Measured] = {}
        with self.path.open(newline="") as file:
            for row in csv.DictReader(file):
                task = Task(**{name: int(row[name]) for name in _TASK})
                measured = found.setdefault(row["run"], Measured(task, int(row["threads"]), int(row["parameters"]), {}))
                cost = measured.costs.setdefault(row["contestant"], Cost(float(row["step_gflop"])))
                cost.ms.append(float(row["step_ms"]))
        return {name: found[name] for name in self.runs if name in found}

    def complete(self, chosen: Collection[str], threads: int, again: bool) -> None:
        """Measure the runs that are missing and chosen, or all that are chosen, and write after each."""
        for name in self.runs:
            if name in chosen and (again or name not in self.load()):
                print(f"{self.path.name}: {name}", flush=True)
                run = self.runs[name]
                parameters = sum(p.numel() for p in run.task.model().parameters())
                measured = Measured(
                    run.task, threads, parameters, costs(run.contestants, run.task, run.cycles, threads)
                )
                self._write({**self.load(), name: measured})

    def _write(self, runs: Mapping[str, Measured]) -> None:
        whole = self.path.with_suffix(".new")
        with whole.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["run", *_TASK, "parameters", "threads", "contestant", "cycle", "step_gflop", "step_ms"])
            for name in (name for name in self.runs if name in runs):
                run = runs[name]
                head = [name, *(getattr(run.task, each) for each in _TASK), run.parameters, run.threads]
                for contestant, cost in run.costs.items():
                    for cycle, ms in enumerate(cost.ms):
                        writer.writerow([*head, contestant, cycle, f"{cost.gflop:.4f}", f"{ms:.3f}"])
        os.replace(whole, self.path)


_TASK = ("layers", "width", "intermediate", "heads", "vocabulary", "batch", "length")
TIMES = Record(HERE / "results.csv", RUNS)
