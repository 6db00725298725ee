"""What a step of each method costs: time, FLOPs, and bytes on the simulated accelerator.

    python -m experiments.quality.cost [--rounds 20] [--again]

Times are taken in one process on one thread, the methods in turn, so run it alone: some twelve minutes, and as
long again to count FLOPs. Writes `cost.csv` (time and FLOPs, always anew) and the rows that `bytes.csv` lacks.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.quality.data_sets import BATCH_SIZE, DATA_SETS, MAX_LENGTH
from experiments.quality.methods import CONTESTANTS, Batch, Method, Training
from experiments.quality.training import batches, network_for
from experiments.table import Rows, Table, read_rows, write_rows
from tests import simulated_accelerator as sim

HERE = Path(__file__).parent
TIMES = HERE / "cost.csv"
DATA = "film reviews"
TURN = 8
"""Steps that a method has before the next one's turn: those in which HiFT has all blocks of the model."""
RATE = 1e-4
MANY = 10_000
"""Steps that schedules are told."""


def measure_times(rounds: int) -> list[dict[str, object]]:
    """Time the methods in turn, `TURN` steps each on the same batches, on one thread.

    Where a cycle of a method is longer than a turn, it is put together from turns.

    Args:
        rounds: turns of each method that are measured; at least as many as the longest cycle needs.

    Returns:
        A row for each method: median, least and most milliseconds of the mean step of a cycle; the median over cycles
        of its ratio to full fine-tuning in the same rounds; GFLOP of the mean step.

    Raises:
        ValueError: the rounds are too few for a cycle.
    """
    longest = max(_turns(contestant.cycle) for contestant in CONTESTANTS.values())
    if rounds < longest:
        raise ValueError(f"`rounds` is {rounds}, and the longest cycle takes {longest} turns; give at least so many.")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    data = DATA_SETS[DATA].module(DATA.replace(" ", "_"), seed=0)
    data.setup("fit")
    trainings: dict[str, Training] = {}
    for name, contestant in CONTESTANTS.items():
        network = network_for(data).train()
        trainings[name] = contestant.method(network, RATE, MANY, 0)
    stream = batches(data)
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    flops = dict.fromkeys(trainings, 0)
    for number in range(rounds + 1):
        turn = list(itertools.islice(stream, TURN))
        for name, training in trainings.items():
            began = time.perf_counter()
            for batch in turn:
                training.step(batch)
            if number:  # the first turn builds state
                seconds[name].append((time.perf_counter() - began) / TURN)
        print(f"round {number} of {rounds}", flush=True)
    for number in range(longest):
        turn = list(itertools.islice(stream, TURN))
        for name, training in trainings.items():
            with FlopCounterMode(display=False) as counter:
                for batch in turn:
                    training.step(batch)
            flops[name] += counter.get_total_flops()
        print(f"FLOPs {number + 1} of {longest}", flush=True)
    rows: list[dict[str, object]] = []
    for name, contestant in CONTESTANTS.items():
        turns = _turns(contestant.cycle)
        own, full = (_means(seconds[each], turns) for each in (name, "full AdamW"))
        rows.append(
            {
                "name": name,
                "ms": 1000 * statistics.median(own),
                "ms_least": 1000 * min(own),
                "ms_most": 1000 * max(own),
                "time_of_full": statistics.median(a / b for a, b in zip(own, full, strict=True)),
                "cycles": len(own),
                "gflop": flops[name] / longest / TURN / 1e9,
            }
        )
    return rows


def times() -> Rows:
    """The rows measured last."""
    return read_rows(TIMES)


def _turns(cycle: int) -> int:
    return -(-cycle // TURN)


def _means(values: list[float], count: int) -> list[float]:
    """Means of so many successive values each; what is left at the end is not used."""
    return [statistics.fmean(values[i : i + count]) for i in range(0, len(values) - count + 1, count)]


def measure_bytes(row: str) -> dict[str, object]:
    """Most bytes in use on the simulated accelerator, by a method and a batch size."""
    name, batch_size = ROWS[row]
    return {"method": name, "batch_size": batch_size, **count_bytes(CONTESTANTS[name].method, batch_size)}


def count_bytes(method: Method, batch_size: int) -> dict[str, object]:
    """Most bytes in use on the simulated accelerator in the second and third turn, batches as long as they can be."""
    sim.load()
    torch.manual_seed(0)
    data = DATA_SETS[DATA].module(DATA.replace(" ", "_"), seed=0, batch_size=batch_size)
    before = sim.memory_allocated()
    network = network_for(data).train().to("sim")
    weights = sim.memory_allocated() - before
    training = method(network, RATE, MANY, 0)
    for number in range(3 * TURN):
        ids = torch.randint(1000, 20_000, (batch_size, MAX_LENGTH))
        labels = torch.randint(2, (batch_size,))
        batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        batch = {key: value.to("sim") for key, value in batch.items()}
        if number == TURN:
            sim.reset_peak_memory_stats()
        training.step(batch)
        del batch
    peak = sim.max_memory_allocated() - before
    return {"weights_bytes": weights, "peak_bytes": peak}


ROWS = {f"{name}, batch {BATCH_SIZE}": (name, BATCH_SIZE) for name in CONTESTANTS}
BYTES = Table(HERE / "bytes.csv", tuple(ROWS), measure_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each method that are timed")
    parser.add_argument("--again", action="store_true", help="count also the bytes that are in the record")
    arguments = parser.parse_args()
    rows = measure_times(arguments.rounds)
    write_rows(TIMES, rows)
    BYTES.complete(BYTES.rows, arguments.again)
    for row in rows:
        print(f"{row['name']}: {row['ms']:.0f} ms, {row['time_of_full']:.3f} of full, {row['gflop']:.2f} GFLOP")


if __name__ == "__main__":
    main()
