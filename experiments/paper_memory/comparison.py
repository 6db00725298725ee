"""The paper's figures and ours, cell by cell."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.table import Row, Rows, read_rows

MIB, GIB = 2**20, 2**30
UNITS = {"parameters": MIB, "gradients": MIB, "states": MIB, "pgs": GIB, "residual": GIB, "total": GIB}
"""Columns of the paper's table, in its order, and the bytes of their units."""

COUNTED = ("parameters", "gradients", "states", "pgs")
"""Columns that follow from counting tensors; the others come from a run."""

TOLERANCE = 0.01


@dataclass(frozen=True)
class Cell:
    """One cell of the paper's tables.

    Attributes:
        name: of the row: model, optimizer, precision, method.
        column: a key of `UNITS`.
        paper: the paper's figure, in the column's unit.
        ours: the planner's, rounded as the paper's.
        converted: the paper's, counted as torch has it under mixed precision and with 16-bit weights.
    """

    name: str
    column: str
    paper: float
    ours: float
    converted: float

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Model, optimizer, precision and method."""
        model, optimizer, precision, method = self.name.split(", ")
        return model, optimizer, precision, method

    @property
    def off(self) -> float:
        """By which part of the paper's figure ours is larger."""
        return _off(self.ours, self.paper)

    @property
    def agrees(self) -> bool:
        """Whether ours is the paper's, within the tolerance."""
        return abs(self.off) <= TOLERANCE

    @property
    def explained(self) -> bool:
        """Whether it is once both count the same."""
        return abs(_off(self.ours, self.converted)) <= TOLERANCE


def paper() -> Rows:
    """The paper's figures, by the names of rows."""
    return read_rows(Path(__file__).with_name("paper.csv"))


def pgs(row: Row) -> int:
    """Bytes of parameters, gradients and states."""
    return sum(int(row[column]) for column in ("parameters", "gradients", "states"))


def figure(row: Row, column: str) -> float:
    """A figure of ours in the unit of the paper's column."""
    nbytes = {"pgs": pgs(row), "total": int(row["peak"]), "residual": int(row["peak"]) - pgs(row)}
    return (nbytes[column] if column in nbytes else int(row[column])) / UNITS[column]


def cells(paper_rows: Rows, rows: Rows) -> list[Cell]:
    """Every cell of these rows that the paper has."""
    found = []
    for name, row in rows.items():
        for column, unit in UNITS.items():
            if text := paper_rows[name][f"{column}_{'mib' if unit == MIB else 'gib'}"]:
                counted_twice = _counted_differently(name.split(", ")[2], column, row)
                found.append(
                    Cell(name, column, float(text), round(figure(row, column), 2), float(text) - counted_twice / unit)
                )
    return found


def _counted_differently(precision: str, column: str, row: Row) -> int:
    """Bytes that the paper counts and that torch does not have.

    Under mixed precision a second, 16-bit copy of the weights among the parameters: torch's autocast makes it in the
    forward pass, where it counts as activations. And fp32 gradients of 16-bit weights, which torch keeps in 16 bits.
    """
    if precision == "mixed" and column in ("parameters", "pgs"):
        return 2 * int(row["numel"])
    if precision == "Mixed^Hi" and column in ("gradients", "pgs"):
        return 2 * int(row["largest_block_numel"])
    return 0


def groups(off: Iterable[Cell], by: tuple[str, ...]) -> dict[tuple[str, ...], list[Cell]]:
    """Cells by some of `model`, `optimizer`, `precision`, `method` and `column`."""
    found: dict[tuple[str, ...], list[Cell]] = {}
    for cell in off:
        words = dict(zip(("model", "optimizer", "precision", "method"), cell.words, strict=True))
        found.setdefault(tuple({**words, "column": cell.column}[key] for key in by), []).append(cell)
    return found


def saved(full: float, ours: float) -> float:
    """The part of the memory of full fine-tuning that is saved."""
    return 1 - ours / full


def with_early_zeroing(row: Row) -> int:
    """Peak of full fine-tuning whose gradients are freed right after the update.

    Lightning frees them after the next forward pass, so that all of them are there beside its activations.
    """
    return max(int(row["forward"]) - int(row["gradients"]), int(row["backward"]), int(row["update"]))


def _off(ours: float, expected: float) -> float:
    return 0.0 if ours == expected else ours / expected - 1 if expected else float("inf")
