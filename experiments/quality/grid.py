"""Which runs there are: the search for each method's learning rate, and the final runs with it."""

import itertools
import statistics
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from experiments.quality.data_sets import DATA_SETS
from experiments.quality.methods import CONTESTANTS, equal_steps, equal_time, loras_steps, rate_of
from experiments.quality.training import describe, run
from experiments.table import Row, Table

HERE = Path(__file__).parent
EXPONENTS = range(-12, 13)
SEARCH_SEED = 0
RUN_OFF_SEEDS = (SEARCH_SEED, 11, 12)
"""Seeds of the run-off between rates that one seed cannot tell apart, for methods that are compared closely."""
SEEDS = tuple(seed for seed in range(1, 19) if seed not in RUN_OFF_SEEDS)
"""Seeds of the final runs, of which a method has the first, as many as its contestant says."""


class Run(NamedTuple):
    """A run."""

    data_set: str
    method: str
    exponent: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data_set}, {self.method}, rate 2^{self.exponent}, {self.steps} steps, seed {self.seed}"


def _measure(name: str) -> dict[str, object]:
    chosen = RUNS[name]
    contestant = CONTESTANTS[chosen.method]
    rate = rate_of(chosen.exponent)
    values = run(chosen.data_set, contestant.method, rate, chosen.steps, chosen.seed, contestant.batch_size)
    return {**chosen._asdict(), "rate": rate, **values}


def _runs(seeds: Collection[int]) -> dict[str, Run]:
    """All that there could be, in the order of the table."""
    runs = [
        Run(data_set, method, exponent, steps, seed)
        for data_set in DATA_SETS
        for method, contestant in CONTESTANTS.items()
        for exponent in EXPONENTS
        for steps in sorted(set(contestant.lengths))
        for seed in seeds
    ]
    return {each.name: each for each in runs}


_SEARCH, _FINAL = _runs(RUN_OFF_SEEDS), _runs(SEEDS)
RUNS = {**_SEARCH, **_FINAL}
SEARCH = Table(HERE / "search.csv", tuple(_SEARCH), _measure)
FINAL = Table(HERE / "final.csv", tuple(_FINAL), _measure)
DATA = Table(HERE / "data.csv", tuple(DATA_SETS), describe)


def seeds_of(method: str) -> tuple[int, ...]:
    """Seeds of a method's final runs."""
    return SEEDS[: CONTESTANTS[method].seeds]


def best_exponent(data_set: str, method: str, again: bool = False) -> int:
    """The exponent of the best rate of a method.

    It is found with one seed (see `climb`). For a method that is compared closely the rates within one standard error
    of the best, which is that of a share of the texts for validation, are tried with more seeds, and the mean decides.
    """
    method = CONTESTANTS[method].rate_from or method
    contestant = CONTESTANTS[method]
    done: set[str] = set()
    tried: dict[int, tuple[float, float]] = {}

    def result(exponent: int, seed: int) -> tuple[float, float]:
        name = Run(data_set, method, exponent, contestant.steps_in_time, seed).name
        SEARCH.complete([name], again and name not in done)
        done.add(name)
        return on_validation(SEARCH.load()[name])

    def merit(exponent: int) -> tuple[float, float]:
        tried[exponent] = result(exponent, SEARCH_SEED)
        return tried[exponent]

    def mean_merit(exponent: int) -> tuple[float, float]:
        accuracies, losses = zip(*(result(exponent, seed) for seed in RUN_OFF_SEEDS), strict=True)
        return statistics.fmean(accuracies), statistics.fmean(losses)

    best = climb(contestant.guess, merit)
    near = _near(tried, best, int(DATA.load()[data_set]["validation"])) if contestant.closely else [best]
    return max(near, key=mean_merit) if len(near) > 1 else best


def _near(tried: dict[int, tuple[float, float]], best: int, texts: int) -> list[int]:
    """The exponents whose accuracy is within one standard error of that of the best, on so many texts."""
    accuracy = tried[best][0]
    error = (accuracy * (1 - accuracy) / texts) ** 0.5
    return [exponent for exponent, (other, _) in tried.items() if accuracy - other <= error]


def on_validation(row: Row) -> tuple[float, float]:
    """What a run is chosen by: accuracy, and of equal ones the lower loss."""
    return float(row["validation_accuracy"]), -float(row["validation_loss"])


def climb(
    guess: int, merit: Callable[[int], float | tuple[float, float]], exponents: Collection[int] = EXPONENTS
) -> int:
    """The exponent of the rate with the most merit.

    From the guess the grid is climbed until both neighbours of the best rate have been tried.

    Args:
        guess: exponent at which to begin.
        merit: that of a run at the rate of an exponent.
        exponents: the grid.
    """
    best = guess
    while True:
        winner = max((exponent for exponent in (best, best - 1, best + 1) if exponent in exponents), key=merit)
        if winner == best:
            return best
        best = winner


def complete(data_sets: Collection[str], methods: Collection[str], again: bool, jobs: int) -> None:
    """Search, and do the final runs that are missing, so many at one time.

    Those in equal time come first, on all data sets, then those with equal steps, and those with LoRA's.
    """
    DATA.complete(data_sets, again)
    pairs = list(itertools.product(data_sets, methods))
    searches = {pair: (pair[0], CONTESTANTS[pair[1]].rate_from or pair[1]) for pair in pairs}
    searched = list(dict.fromkeys(searches.values()))
    with ThreadPoolExecutor(jobs) as threads:
        found = dict(zip(searched, threads.map(lambda of: best_exponent(of[0], of[1], again), searched), strict=True))
    exponents = {pair: found[of] for pair, of in searches.items()}

    def names(steps_of: Callable[[str], int]) -> set[str]:
        return {
            Run(data_set, method, exponents[data_set, method], steps_of(method), seed).name
            for data_set, method in pairs
            if steps_of(method) in CONTESTANTS[method].lengths
            for seed in seeds_of(method)
        }

    done: set[str] = set()
    for steps_of in (equal_time, equal_steps, loras_steps):
        FINAL.complete(names(steps_of) - done, again, jobs)
        done |= names(steps_of)
