"""What has been measured, and what measures it."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from experiments.gpu_check.card import measure_card
from experiments.gpu_check.memory import measure_memory
from experiments.gpu_check.paging import measure_copies, measure_paging
from experiments.gpu_check.profiles import CONTESTANTS, COPIES, PAGING, Profile
from experiments.gpu_check.speed import measure_speed
from experiments.gpu_check.training import FAILED, KILLED, failed
from experiments.table import Row, Rows, Table

Measure = Callable[[str], dict[str, object]]
"""Called with the name of a row."""


@dataclass(frozen=True)
class Measured:
    """The rows of each table, as far as they are there.

    Attributes:
        card: the card, what runs on it, and the layers of the model whose times are measured.
        copies: bandwidth between host and device.
        paging: times with and without paging, in rounds.
        speed: times of the contestants, in rounds.
        memory: the cells of the memory table.
    """

    card: Row
    copies: Rows
    paging: Rows
    speed: Rows
    memory: Rows

    @property
    def failed(self) -> list[str]:
        """Names of the rows that an error has ended."""
        tables = (self.copies, self.paging, self.speed, self.memory)
        return [name for rows in tables for name, row in rows.items() if row["outcome"].startswith(FAILED)]


def measured_or_failed(measure: Measure, name: str) -> dict[str, object]:
    """A row, or what has gone wrong outside of its run; the rows after it are measured all the same."""
    try:
        return measure(name)
    except Exception as error:
        return {"outcome": failed(error)}


def in_rounds(names: Mapping[str, object], rounds: int) -> tuple[str, ...]:
    """Names of rows, in the order in which they take turns."""
    return tuple(f"{name}, round {turn + 1}" for turn in range(rounds) for name in names)


@dataclass(frozen=True)
class Record:
    """The files of a profile in a folder."""

    profile: Profile
    folder: Path

    @property
    def card(self) -> Table:
        """The card has one row."""
        return Table(self.folder / "card.csv", ("card",), functools.partial(measure_card, profile=self.profile))

    def tables(self, layers: int) -> tuple[Table, ...]:
        """All others, in the order in which they are measured: what is quick comes first.

        Args:
            layers: of the model whose times are measured.
        """
        profile = self.profile
        copies = functools.partial(measure_copies, profile=profile)
        paging = functools.partial(measure_paging, profile=profile, layers=layers)
        speed = functools.partial(measure_speed, profile=profile, layers=layers)
        memory = functools.partial(measure_memory, profile=profile)
        return (
            self._table("copies.csv", COPIES, copies),
            self._table("paging.csv", in_rounds(PAGING, profile.rounds), paging),
            self._table("speed.csv", in_rounds(CONTESTANTS, profile.rounds), speed),
            self._table("memory.csv", tuple(profile.cells), memory),
        )

    def _table(self, file: str, rows: tuple[str, ...], measure: Measure) -> Table:
        return Table(self.folder / file, rows, functools.partial(measured_or_failed, measure), KILLED)

    def load(self) -> Measured:
        """What has been measured so far."""
        copies, paging, speed, memory = (table.load() for table in self.tables(layers=0))
        return Measured(self.card.load().get("card", {}), copies, paging, speed, memory)


def waiting_for_packages(rows: tuple[str, ...]) -> dict[str, list[str]]:
    """Rows of contestants whose package is not installed, by package."""
    waiting: dict[str, list[str]] = {}
    for row in rows:
        contestant = CONTESTANTS.get(row.rpartition(", round ")[0])
        package = contestant and contestant.package
        if package and importlib.util.find_spec(package) is None:
            waiting.setdefault(package, []).append(row)
    return waiting
