"""Means over seeds and data sets, and differences between methods, of the final runs."""

import itertools
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass

from experiments.quality.cost import bytes_row
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.grid import seeds_of
from experiments.quality.methods import CONTESTANTS, STEPS, equal_steps, equal_time
from experiments.table import Rows


@dataclass(frozen=True)
class Mean:
    """Mean and standard error, in hundredths: points of accuracy, or hundredths of a nat of loss."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.error:.1f}"

    def signed(self) -> str:
        """As a difference."""
        return f"{self.mean:+.1f} ± {self.error:.1f}"


Results = dict[tuple[str, str], list[float]]
"""What all seeds of a method have, in hundredths, by data set and method."""


def accuracies(rows: Rows, steps_of: Callable[[str], int]) -> Results:
    """Test accuracies, in points, of the methods that have all seeds of a data set.

    Args:
        rows: of `final.csv`.
        steps_of: the number of steps that is looked at, by the method's name.
    """
    return _results(rows, steps_of, "test_accuracy")


def losses(rows: Rows, steps_of: Callable[[str], int]) -> Results:
    """Mean cross entropies of the test parts, in hundredths of a nat; for the rest as `accuracies`."""
    return _results(rows, steps_of, "test_loss")


def _results(rows: Rows, steps_of: Callable[[str], int], column: str) -> Results:
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for row in rows.values():
        key = row["data_set"], row["method"], int(row["steps"])
        found.setdefault(key, {})[int(row["seed"])] = 100 * float(row[column])
    results: Results = {}
    for data_set, method in itertools.product(DATA_SETS, CONTESTANTS):
        by_seed = found.get((data_set, method, steps_of(method)), {})
        seeds = seeds_of(method)
        if set(by_seed) == set(seeds):
            results[data_set, method] = [by_seed[seed] for seed in seeds]
    return results


def mean(values: Collection[float]) -> Mean:
    """Of independent values."""
    return Mean(statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5)


def complete_data_sets(found: Results, methods: Collection[str]) -> list[str]:
    """Data sets on which all these methods have been run."""
    return [name for name in DATA_SETS if all((name, method) in found for method in methods)]


def over_data_sets(found: Results, method: str, data_sets: Collection[str]) -> Mean:
    """Each seed's mean over the data sets, and the standard error over seeds."""
    return mean(_by_seed(found, method, data_sets))


def less(found: Results, method: str, other: str, data_sets: Collection[str], seeds: slice = slice(None)) -> Mean:
    """What a method has more than another, paired by seed: both have the same new head and batches.

    Where one has more seeds than the other, those that both have count, which are the first, or some of them (`seeds`).
    """
    pairs = zip(_by_seed(found, method, data_sets), _by_seed(found, other, data_sets), strict=False)
    return mean([own - theirs for own, theirs in pairs][seeds])


def _by_seed(found: Results, method: str, data_sets: Collection[str]) -> list[float]:
    columns = [found[name, method] for name in data_sets]
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def within(peaks: Rows, method: str) -> list[str]:
    """Methods whose peak of bytes is known and not above that of this one."""
    bytes_of = {row["name"]: int(row["peak_bytes"]) for row in peaks.values()}
    most = bytes_of[bytes_row(method)]
    return [name for name in CONTESTANTS if bytes_of.get(bytes_row(name), most + 1) <= most]


def missing_in_time(search: Rows, final: Rows) -> dict[str, list[str]]:
    """For each data set the methods without all final runs in equal time, with a word where some runs are there."""
    there = accuracies(final, equal_time)
    begun = {(row["data_set"], row["method"]) for row in [*search.values(), *final.values()]}
    return {
        data_set: [
            f"{method} (begun)" if (data_set, method) in begun else method
            for method in CONTESTANTS
            if (data_set, method) not in there
        ]
        for data_set in DATA_SETS
    }


def missing_in_steps(final: Rows) -> dict[str, list[str]]:
    """For each data set the methods that have their final runs there in equal time, and not all with equal steps."""
    there = accuracies(final, equal_steps)
    return {
        data_set: [
            method
            for of, method in accuracies(final, equal_time)
            if of == data_set and STEPS in CONTESTANTS[method].lengths and (of, method) not in there
        ]
        for data_set in DATA_SETS
    }


def chosen_exponents(rows: Rows) -> dict[tuple[str, str], int]:
    """Exponents of the rates of the final runs, by data set and method."""
    return {(row["data_set"], row["method"]): int(row["exponent"]) for row in rows.values()}
