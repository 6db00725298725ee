"""What an experiment has measured, kept as CSV."""

import csv
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

Row = dict[str, str]
Rows = dict[str, Row]


def read_rows(path: Path) -> Rows:
    """The rows of a CSV file by their column `name`, in its order; none if there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Collection[Mapping[str, object]]) -> None:
    """Write rows with the columns that any of them has; until all is written, what was there stays."""
    whole = path.with_suffix(".new")
    with whole.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(whole, path)


@dataclass(frozen=True)
class Table:
    """Rows in a file, by name; a row that is there is not measured again unless that is asked for."""

    path: Path
    rows: tuple[str, ...]
    measure: Callable[[str], dict[str, object]]
    """Called in a process of its own, with the name of a row."""
    if_killed: Mapping[str, object] | None = None
    """What is written of a row whose process was killed (by the system, for want of memory); `None`: it is an error."""

    def load(self) -> Rows:
        """The rows measured so far, in the table's order."""
        known = read_rows(self.path)
        return {name: known[name] for name in self.rows if name in known}

    def complete(self, chosen: Collection[str], again: bool, jobs: int = 1) -> None:
        """Measure the rows that are missing and chosen, or all that are chosen, and write after each.

        Threads may call it at one time.

        Args:
            chosen: names of rows.
            again: measure also those that are there.
            jobs: rows that are measured at one time.
        """
        known = self.load()
        missing = [name for name in self.rows if name in chosen and (again or name not in known)]
        with ThreadPoolExecutor(jobs) as threads:
            for _ in threads.map(self._complete_row, missing):
                pass

    def _complete_row(self, name: str) -> None:
        print(f"{self.path.name}: {name}", flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                values = pool.submit(self.measure, name).result()
            except BrokenProcessPool:
                if self.if_killed is None:
                    raise
                values = dict(self.if_killed)
        with _WRITING:
            rows = {**self.load(), name: {"name": name, **{key: str(value) for key, value in values.items()}}}
            write_rows(self.path, [rows[each] for each in self.rows if each in rows])


_WRITING = threading.Lock()


def markdown(head: Collection[str], rows: Collection[Collection[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
