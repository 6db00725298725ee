"""What an experiment has measured, kept as CSV."""

import csv
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

Row = dict[str, str]
Rows = dict[str, Row]


@dataclass(frozen=True)
class Table:
    """Rows in a file, by name; a row that is there is not measured again unless that is asked for."""

    path: Path
    rows: tuple[str, ...]
    measure: Callable[[str], dict[str, object]]
    """Called in a process of its own, with the name of a row."""

    def load(self) -> Rows:
        """The rows measured so far, in the table's order."""
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            known = {row["name"]: row for row in csv.DictReader(file)}
        return {name: known[name] for name in self.rows if name in known}

    def complete(self, chosen: Collection[str], again: bool) -> None:
        """Measure the rows that are missing and chosen, or all that are chosen, and write after each."""
        known = self.load()
        for name in self.rows:
            if name not in chosen or (name in known and not again):
                continue
            print(f"{self.path.name}: {name}", flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                values = pool.submit(self.measure, name).result()
            known[name] = {"name": name, **{key: str(value) for key, value in values.items()}}
            self._write([known[each] for each in self.rows if each in known])

    def _write(self, rows: list[Row]) -> None:
        columns = dict.fromkeys(key for row in rows for key in row)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), restval="")
            writer.writeheader()
            writer.writerows(rows)


def markdown(head: Collection[str], rows: Collection[Collection[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
