"""Which runs there are: the search for each method's learning rate, and the final runs with it."""

import itertools
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from experiments.quality.data_sets import DATA_SETS
from experiments.quality.methods import CONTESTANTS, STEPS, rate_of
from experiments.quality.training import describe, run
from experiments.table import Row, Table

HERE = Path(__file__).parent
EXPONENTS = range(-12, 13)
SEARCH_SEED = 0
SEEDS = (1, 2, 3, 4, 5)


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


_SEARCH, _FINAL = _runs((SEARCH_SEED,)), _runs(SEEDS)
RUNS = {**_SEARCH, **_FINAL}
SEARCH = Table(HERE / "search.csv", tuple(_SEARCH), _measure)
FINAL = Table(HERE / "final.csv", tuple(_FINAL), _measure)
DATA = Table(HERE / "data.csv", tuple(DATA_SETS), describe)


def best_exponent(data_set: str, method: str, again: bool = False) -> int:
    """The exponent of the best rate of a method; see `climb`."""
    method = CONTESTANTS[method].rate_from or method
    contestant = CONTESTANTS[method]

    def merit(exponent: int) -> tuple[float, float]:
        name = Run(data_set, method, exponent, contestant.steps_in_time, SEARCH_SEED).name
        SEARCH.complete([name], again and name not in done)
        done.add(name)
        return on_validation(SEARCH.load()[name])

    done: set[str] = set()
    return climb(contestant.guess, merit)


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
    """Search, and do the final runs that are missing, so many at one time; the first failure ends it.

    Those in equal time come first, on all data sets, and then those with equal steps.
    """
    DATA.complete(data_sets, again)
    failed = threading.Event()
    exponents: dict[tuple[str, str], int] = {}
    searching = {pair: threading.Lock() for pair in itertools.product(data_sets, CONTESTANTS)}
    done: set[str] = set()

    def one(data_set: str, method: str, steps: int) -> None:
        if failed.is_set():
            return
        try:
            with searching[data_set, CONTESTANTS[method].rate_from or method]:
                if (data_set, method) not in exponents:
                    exponents[data_set, method] = best_exponent(data_set, method, again)
            exponent = exponents[data_set, method]
            names = {Run(data_set, method, exponent, steps, seed).name for seed in SEEDS} - done
            FINAL.complete(names, again)
            done.update(names)
        except BaseException:
            failed.set()
            raise

    pairs = list(itertools.product(data_sets, methods))
    in_time = [(*pair, CONTESTANTS[pair[1]].steps_in_time) for pair in pairs]
    in_steps = [(*pair, STEPS) for pair in pairs if STEPS in CONTESTANTS[pair[1]].lengths]
    with ThreadPoolExecutor(jobs) as threads:
        for each in (in_time, in_steps):
            list(threads.map(lambda run: one(*run), each))
