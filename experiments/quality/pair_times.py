"""What a step of HiFT takes over one of LoRA in as much memory, on each data set.

    python -m experiments.quality.pair_times [--again]

Batches are padded to the longest of their texts, so one of 16 takes more than 1.6 times as long as one of 10, and how
much more differs between data sets. The two train in turn in one process on one thread, loading of batches included,
so run it alone: some two minutes a data set. Rows that `pair_times.csv` has are not measured again unless `--again` is
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
from experiments.quality.methods import CONTESTANTS, LORA_NO_DROPOUT, MOST_TEXTS
from experiments.quality.training import batches, network_for
from experiments.table import Rows, Table

METHODS = (MOST_TEXTS[LORA_NO_DROPOUT], LORA_NO_DROPOUT)
TURNS = 56
"""Turns of each, of `TURN` steps: so many that each of HiFT's seven blocks has as many."""
TURN = 4


def measure(data_set: str) -> dict[str, object]:
    """Time the two on a data set.

    Returns:
        Milliseconds of the mean step of each over a whole run of `TURNS` times `TURN` steps, in which HiFT's blocks
        have one turn each, and their ratio.
    """
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    steps = TURNS * TURN
    trainings, streams = {}, {}
    for method in METHODS:
        contestant = CONTESTANTS[method]
        data = DATA_SETS[data_set].module(data_set.replace(" ", "_"), seed=0, batch_size=contestant.batch_size)
        data.setup("fit")
        trainings[method] = contestant.method(network_for(data).train(), RATE, steps, 0)
        streams[method] = batches(data)
    seconds = dict.fromkeys(METHODS, 0.0)
    for _ in range(TURNS):
        for method in METHODS:
            began = time.perf_counter()
            for batch in itertools.islice(streams[method], TURN):
                trainings[method].step(batch)
            seconds[method] += time.perf_counter() - began
    hift, lora = (1000 * seconds[method] / steps for method in METHODS)
    return {"hift_ms": hift, "lora_ms": lora, "ratio": hift / lora}


TABLE = Table(Path(__file__).parent / "pair_times.csv", tuple(DATA_SETS), measure)


def steps_in_loras_time(rows: Rows) -> int:
    """Steps of HiFT that take as long as LoRA's, by the mean of the ratios over data sets."""
    ratio = statistics.fmean(float(row["ratio"]) for row in rows.values())
    return int(CONTESTANTS[LORA_NO_DROPOUT].steps_in_time / ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure also what is in the record")
    TABLE.complete(TABLE.rows, parser.parse_args().again)
    rows = TABLE.load()
    for row in rows.values():
        print(f"{row['name']}: {float(row['ratio']):.3f}")
    print(f"steps in LoRA's time: {steps_in_loras_time(rows)}")


if __name__ == "__main__":
    main()
