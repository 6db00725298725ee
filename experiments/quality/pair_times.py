"""What a step of HiFT takes over one of LoRA in as much memory, on each data set.

    python -m experiments.quality.pair_times [--again]

Batches are padded to the longest of their texts, so one of 16 takes more than 1.6 times as long as one of 10, and how
much more differs between data sets. The two train in turn in one process on one thread, loading of batches included,
so run it alone: some two minutes a row. Rows that `pair_times.csv` has are not measured again unless `--again` is
given.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import lightning as L
import torch

from experiments.quality.cost import RATE
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.methods import (
    CONTESTANTS,
    LORA_NO_DROPOUT,
    TOP_IN_LORAS_TIME,
    TWO_IN_LORAS_TIME,
)
from experiments.quality.training import batches, network_for
from experiments.table import Rows, Table

IN_LORAS_TIME = (TOP_IN_LORAS_TIME, TWO_IN_LORAS_TIME)
"""Those of HiFT that have as many steps as take as long as LoRA's."""
ROWS = {f"{data_set}, {method}": (data_set, method) for method in IN_LORAS_TIME for data_set in DATA_SETS}
TURNS = 56
"""Turns of each, of `TURN` steps: so many that all of HiFT's blocks, seven or four, have as many."""
TURN = 4


def measure(row: str) -> dict[str, object]:
    """Time a method and LoRA on a data set.

    Returns:
        Milliseconds of the mean step of each over a whole run of `TURNS` times `TURN` steps, in which HiFT's blocks
        have one turn each, and their ratio.
    """
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    steps = TURNS * TURN
    data_set, hift = ROWS[row]
    trainings, streams = {}, {}
    for method in (hift, LORA_NO_DROPOUT):
        contestant = CONTESTANTS[method]
        data = DATA_SETS[data_set].module(data_set.replace(" ", "_"), seed=0, batch_size=contestant.batch_size)
        data.setup("fit")
        trainings[method] = contestant.method(network_for(data).train(), RATE, steps, 0)
        streams[method] = batches(data)
    seconds = dict.fromkeys(trainings, 0.0)
    for _ in range(TURNS):
        for method in trainings:
            began = time.perf_counter()
            for batch in itertools.islice(streams[method], TURN):
                trainings[method].step(batch)
            seconds[method] += time.perf_counter() - began
    own, loras = (1000 * each / steps for each in seconds.values())
    return {"data_set": data_set, "method": hift, "hift_ms": own, "lora_ms": loras, "ratio": own / loras}


TABLE = Table(Path(__file__).parent / "pair_times.csv", tuple(ROWS), measure)


def ratios(rows: Rows, method: str) -> list[float]:
    """What a step of the method takes over one of LoRA, on each data set."""
    return [float(row["ratio"]) for row in rows.values() if row["method"] == method]


def steps_in_loras_time(rows: Rows, method: str) -> int:
    """Steps of the method that take as long as LoRA's, by the mean of the ratios over data sets."""
    return int(CONTESTANTS[LORA_NO_DROPOUT].steps_in_time / statistics.fmean(ratios(rows, method)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure also what is in the record")
    TABLE.complete(TABLE.rows, parser.parse_args().again)
    rows = TABLE.load()
    for row in rows.values():
        print(f"{row['name']}: {float(row['ratio']):.3f}")
    for method in IN_LORAS_TIME:
        print(f"steps in LoRA's time: {method}: {steps_in_loras_time(rows, method)}")


if __name__ == "__main__":
    main()
