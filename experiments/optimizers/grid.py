"""Which runs there are: the search for each learning rate, and the final runs with it."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from experiments.optimizers.methods import CONTESTANTS
from experiments.quality import grid as quality
from experiments.quality.cost import count_bytes
from experiments.quality.data_sets import BATCH_SIZE
from experiments.quality.grid import SEARCH_SEED, climb, on_validation
from experiments.quality.methods import rate_of
from experiments.quality.training import run
from experiments.table import Table

HERE = Path(__file__).parent
DATA = "film reviews"
SEEDS = (1, 2, 3, 4, 5)
EXPONENTS = range(-12, 17)
"""Up to a rate of 6.6: plain SGD takes larger ones than the methods of `experiments.quality`."""


class Run(NamedTuple):
    """A run."""

    optimizer: str
    way: str
    exponent: int
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {self.way}, rate 2^{self.exponent}, {self.steps} steps, seed {self.seed}"


def measure(name: str) -> dict[str, object]:
    """Train and test; what `experiments.quality` has of the same run is taken from its record."""
    chosen = RUNS[name]
    values = recorded_in_quality(chosen) or run(
        DATA, CONTESTANTS[chosen.optimizer, chosen.way].method, rate_of(chosen.exponent), chosen.steps, chosen.seed
    )
    return {**chosen._asdict(), "rate": rate_of(chosen.exponent), **values}


def recorded_in_quality(chosen: Run) -> dict[str, object] | None:
    """What `run` returned there: a run is a function of its settings and its seed."""
    method = CONTESTANTS[chosen.optimizer, chosen.way].in_quality
    if method is None:
        return None
    there = quality.Run(DATA, method, chosen.exponent, chosen.steps, chosen.seed)
    row = {**quality.SEARCH.load(), **quality.FINAL.load()}.get(there.name)
    return (
        None
        if row is None
        else {key: value for key, value in row.items() if key not in {"name", "rate", *there._fields}}
    )


def _runs(seeds: Collection[int]) -> dict[str, Run]:
    """All that there could be, in the order of the table."""
    runs = [
        Run(optimizer, way, exponent, steps, seed)
        for (optimizer, way), contestant in CONTESTANTS.items()
        for exponent in EXPONENTS
        for steps in contestant.steps
        for seed in seeds
    ]
    return {each.name: each for each in runs}


def measure_bytes(name: str) -> dict[str, object]:
    """Most bytes in use on the simulated accelerator."""
    optimizer, way = name.split(", ")
    return {"optimizer": optimizer, "way": way, **count_bytes(CONTESTANTS[optimizer, way].method, BATCH_SIZE)}


_SEARCH, _FINAL = _runs((SEARCH_SEED,)), _runs(SEEDS)
RUNS = {**_SEARCH, **_FINAL}
SEARCH = Table(HERE / "search.csv", tuple(_SEARCH), measure)
FINAL = Table(HERE / "final.csv", tuple(_FINAL), measure)
BYTES = Table(HERE / "bytes.csv", tuple(map(", ".join, CONTESTANTS)), measure_bytes)


def best_exponent(optimizer: str, way: str) -> int:
    """The exponent of the best rate of a contestant; its search is completed if it is not."""
    contestant = CONTESTANTS[optimizer, way]

    def merit(exponent: int) -> tuple[float, float]:
        name = Run(optimizer, way, exponent, contestant.steps[-1], SEARCH_SEED).name
        SEARCH.complete([name], again=False)
        return on_validation(SEARCH.load()[name])

    return climb(contestant.guess, merit, EXPONENTS)


def complete(optimizers: Collection[str], jobs: int) -> None:
    """Count bytes, search and do the final runs where they are missing, in the order of the optimizers.

    Args:
        optimizers: names among `OPTIMIZERS`.
        jobs: contestants that run at one time.
    """
    pairs = [pair for optimizer in optimizers for pair in CONTESTANTS if pair[0] == optimizer]

    def one(pair: tuple[str, str]) -> None:
        exponent = best_exponent(*pair)
        runs = [Run(*pair, exponent, steps, seed) for steps in CONTESTANTS[pair].steps for seed in SEEDS]
        FINAL.complete([each.name for each in runs], again=False)

    BYTES.complete([", ".join(pair) for pair in pairs], again=False)
    with ThreadPoolExecutor(jobs) as threads:
        running = [threads.submit(one, pair) for pair in pairs]
        try:
            for each in as_completed(running):
                each.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # so that a failure does not wait for all others
            raise
