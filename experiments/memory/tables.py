"""What is measured: tables of rows, each row by a process of its own."""

import csv
import functools
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from experiments.memory.cap import CAPPED, measure_cap
from experiments.memory.depth import DEPTHS, measure_depth
from experiments.memory.host import OFFLOADS, measure_offload
from experiments.memory.methods import METHODS, OURS
from experiments.memory.task import Task
from experiments.memory.times import STEP_TIMES, measure_step_times

HERE = Path(__file__).parent

Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """Rows in `file`, by name; a row that is there is not measured again unless that is asked for."""

    file: str
    rows: tuple[str, ...]
    measure: Callable[[str], dict[str, object]]
    """Called in a process of its own, with the name of a row."""

    def load(self) -> dict[str, Row]:
        """The rows measured so far, in the table's order."""
        path = HERE / self.file
        if not path.exists():
            return {}
        with path.open(newline="") as file:
            known = {row["name"]: row for row in csv.DictReader(file)}
        return {name: known[name] for name in self.rows if name in known}

    def complete(self, chosen: Collection[str], again: bool) -> None:
        """Measure the rows that are missing and chosen, or all that are chosen, and write after each."""
        known = self.load()
        for name in self.rows:
            if name not in chosen or (name in known and not again):
                continue
            print(f"{self.file}: {name}", flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                values = pool.submit(self.measure, name).result()
            known[name] = {"name": name, **{key: str(value) for key, value in values.items()}}
            self._write([known[each] for each in self.rows if each in known])

    def _write(self, rows: list[Row]) -> None:
        columns = dict.fromkeys(key for row in rows for key in row)
        with (HERE / self.file).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), restval="")
            writer.writeheader()
            writer.writerows(rows)


def measure_method(name: str) -> dict[str, object]:
    """Bytes, FLOPs and losses of a method; of a peer that cannot run here, the reason."""
    method, task = METHODS[name], Task()
    try:
        run = method.run(task)
    except Exception as error:
        if name in OURS:
            raise
        return {"note": f"does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    settled = run.steps[-task.cycle :]
    return {
        "weights_bytes": run.weights,
        "forward_backward_peak_bytes": max(step.forward_backward for step in run.steps),
        "update_peak_bytes": max(step.update for step in run.steps),
        "left_bytes": max(step.left for step in run.steps),
        "to_device_bytes": sum(step.to_device for step in settled) // len(settled),
        "to_host_bytes": sum(step.to_host for step in settled) // len(settled),
        "gflop": f"{sum(run.flops) / len(run.flops) / 1e9:.4f}" if run.flops else "",
        "first_loss": run.losses[0],
        "loss_of_last_cycle": sum(run.losses[-task.cycle :]) / task.cycle,
        "note": method.remark,
    }


PEAKS = Table("results.csv", tuple(METHODS), measure_method)
CAP = Table("cap.csv", CAPPED, measure_cap)
DEPTH = Table("depth.csv", tuple(DEPTHS), measure_depth)
OFFLOAD = Table("offload.csv", OFFLOADS, measure_offload)


def step_time(cycles: int) -> Table:
    """The table of step times.

    Args:
        cycles: that are measured, of each way to update.
    """
    return Table("step_time.csv", STEP_TIMES, functools.partial(measure_step_times, cycles=cycles))
