"""What follows from the record: medians over rounds, errors of plans, shares that are hidden."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from experiments.gpu_check.profiles import PAGING
from experiments.gpu_check.training import RAN
from experiments.table import Row, Rows

NOT_YET = "not measured yet"


def that_ran(rows: Rows) -> Rows:
    """Those that have figures."""
    return {name: row for name, row in rows.items() if row["outcome"] == RAN}


@dataclass(frozen=True)
class Times:
    """Milliseconds of the mean step of each measured cycle of all rounds."""

    name: str
    cycles_ms: tuple[float, ...]
    rows: tuple[Row, ...]
    """Of the rounds that ran."""
    outcome: str
    """`ran`; or why there are no times."""

    @property
    def median(self) -> float:
        """Over all cycles."""
        return statistics.median(self.cycles_ms)

    def mean(self, column: str) -> float:
        """Over the rounds."""
        return statistics.mean(float(row[column]) for row in self.rows)


def times_of(names: Mapping[str, object], rows: Rows) -> list[Times]:
    """The times of each name over its rounds, however many of them there are."""
    found = []
    for name in names:
        of_name = [row for key, row in rows.items() if key.rpartition(", round ")[0] == name]
        ran = tuple(row for row in of_name if row["outcome"] == RAN)
        cycles = tuple(float(word) for row in ran for word in row["cycles_ms"].split())
        outcome = RAN if ran else of_name[0]["outcome"] if of_name else NOT_YET
        found.append(Times(name, cycles, ran, outcome))
    return found


def off(row: Row, column: str) -> float:
    """By which part of the planned peak a measured one is larger."""
    return int(row[column]) / int(row["planned"]) - 1


def pairs(rows: Rows) -> dict[str, str]:
    """Cells of HiFT that ran, and the full fine-tuning to compare each with, where that ran too."""
    ran = that_ran(rows)
    found = {}
    for name in ran:
        full = name.replace("Mixed^Hi", "mixed").removesuffix("HiFT") + "full"
        if name.endswith(", HiFT") and full in ran:
            found[name] = full
    return found


def bytes_per_ms(copies: Rows) -> dict[str, float]:
    """Of the copies that were measured."""
    return {name: int(row["bytes"]) / float(row["ms"]) for name, row in that_ran(copies).items()}


@dataclass(frozen=True)
class Paged:
    """A way to page in and park, beside the same with nothing to move. Milliseconds and bytes are of a mean step."""

    times: Times
    compared: Times
    copies: Mapping[str, float]
    """Bytes in a millisecond, by copy."""

    @property
    def extra_ms(self) -> float:
        """By which its step is longer."""
        return self.times.median - self.compared.median

    @property
    def page_in_ms(self) -> float:
        """What the copies to the device would take by themselves."""
        return self.times.mean("paged_in") / self.copies["host to device, pinned"]

    @property
    def park_ms(self) -> float:
        """What the copies to the host would take by themselves."""
        return self.times.mean("parked") / self.copies["device to host, pinned"]

    @property
    def hidden(self) -> float:
        """The part of both by which the step is not longer."""
        return 1 - self.extra_ms / (self.page_in_ms + self.park_ms)

    def hidden_of(self, what: str) -> float | None:
        """The part of one, `page_in` or `park`, for which the stream that computes does not wait, by its marks."""
        if any(not row[f"{what}_ms"] for row in self.times.rows):
            return None
        alone = {"page_in": self.page_in_ms, "park": self.park_ms}[what]
        return 1 - self.times.mean(f"{what}_ms") / alone


def paged(paging: Rows, copies: Rows) -> list[Paged]:
    """The ways for which all is there that a comparison takes."""
    speeds = bytes_per_ms(copies)
    times = {each.name: each for each in times_of(PAGING, paging) if each.outcome == RAN}
    if not {"host to device, pinned", "device to host, pinned"} <= speeds.keys():
        return []
    return [
        Paged(times[name], times[way.compared], speeds)
        for name, way in PAGING.items()
        if way.compared is not None and {name, way.compared} <= times.keys()
    ]
