"""Which runs there are: the search for each method's learning rate, and the final runs with it."""

import dataclasses
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from experiments.language_model.measuring import cost, run, untrained
from experiments.language_model.methods import CONTESTANTS, FULL, HIFT, LORA, STILL, TOP
from experiments.quality.grid import EXPONENTS, SEARCH_SEED, climb
from experiments.quality.methods import rate_of
from experiments.table import Rows, Table

HERE = Path(__file__).parent
SEEDS = (1, 2, 3, 4, 5)
UNTRAINED = "untrained"
LONGER = 3
"""So many times the steps have the runs that tell whether differences stay, at the best rate and half of it."""


class Run(NamedTuple):
    """A run."""

    method: str
    exponent: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, rate 2^{self.exponent}, {self.steps} steps, seed {self.seed}"


def _runs(seeds: Collection[int]) -> dict[str, Run]:
    """All that there could be, in the order of the table."""
    runs = [
        Run(method, exponent, contestant.steps, seed)
        for method, contestant in CONTESTANTS.items()
        for exponent in EXPONENTS
        for seed in seeds
    ]
    return {each.name: each for each in runs}


def _measure(name: str) -> dict[str, object]:
    chosen = RUNS[name]
    rate = rate_of(chosen.exponent)
    return {**chosen._asdict(), "rate": rate, **run(CONTESTANTS[chosen.method], rate, chosen.seed)}


def _measure_cost(name: str) -> dict[str, object]:
    return cost(CONTESTANTS[name])


def _measure_longer(name: str) -> dict[str, object]:
    chosen = _LONGER[name]
    contestant = dataclasses.replace(CONTESTANTS[chosen.method], steps=chosen.steps)
    rate = rate_of(chosen.exponent)
    return {**chosen._asdict(), "rate": rate, **run(contestant, rate, chosen.seed)}


def _measure_untrained(name: str) -> dict[str, object]:
    return untrained()


_SEARCH, _FINAL = _runs((SEARCH_SEED,)), _runs(SEEDS)
RUNS = {**_SEARCH, **_FINAL}
SEARCH = Table(HERE / "search.csv", tuple(_SEARCH), _measure)
FINAL = Table(HERE / "final.csv", tuple(_FINAL), _measure)
BEFORE = Table(HERE / "untrained.csv", (UNTRAINED,), _measure_untrained)
_LONGER = {
    each.name: each
    for method, exponents in ((FULL, (-1, 0)), (HIFT, (2,)), (STILL, (1, 2)), (TOP, (1, 2)), (LORA, (3, 4)))
    for each in (Run(method, exponent, LONGER * CONTESTANTS[method].steps, SEARCH_SEED) for exponent in exponents)
}
IN_LONGER = Table(HERE / "longer.csv", tuple(_LONGER), _measure_longer)
COST = Table(HERE / "cost.csv", tuple(CONTESTANTS), _measure_cost)


def best_exponent(search: Rows, method: str) -> int | None:
    """The exponent of the rate with the lowest validation perplexity; `None` if its search has not ended."""
    try:
        return climb(CONTESTANTS[method].guess, lambda exponent: _merit(search, _tried(method, exponent)))
    except KeyError:
        return None


def _tried(method: str, exponent: int) -> str:
    return Run(method, exponent, CONTESTANTS[method].steps, SEARCH_SEED).name


def _merit(search: Rows, name: str) -> float:
    return -float(search[name]["validation_perplexity"])


def complete(methods: Collection[str], jobs: int) -> None:
    """Search, and do the final runs that are missing, so many methods at one time."""

    def one(method: str) -> None:
        def merit(exponent: int) -> float:
            name = _tried(method, exponent)
            SEARCH.complete([name], again=False)
            return _merit(SEARCH.load(), name)

        steps, exponent = CONTESTANTS[method].steps, climb(CONTESTANTS[method].guess, merit)
        FINAL.complete([Run(method, exponent, steps, seed).name for seed in SEEDS], again=False)

    BEFORE.complete(BEFORE.rows, again=False)
    COST.complete(methods, again=False)
    with ThreadPoolExecutor(jobs) as threads:
        for _ in threads.map(one, methods):
            pass
    IN_LONGER.complete([name for name, run in _LONGER.items() if run.method in methods], again=False, jobs=jobs)
