"""What a step of each method costs: time, FLOPs, and bytes on the simulated accelerator."""

import itertools
import statistics
import time

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.quality.data_sets import BATCH_SIZE, DATA_SETS, MAX_LENGTH
from experiments.quality.methods import CONTESTANTS, Batch, Training
from experiments.quality.training import batches, network_for
from tests import simulated_accelerator as sim

DATA = "film reviews"
CYCLE = 8
"""Steps in which HiFT has all blocks of the model; the mean step of so many is compared."""
RATE = 1e-4
MANY = 10_000
"""Steps that schedules are told."""


def measure_times(rounds: int) -> list[dict[str, object]]:
    """Time the methods in turn, a cycle each on the same batches, on one thread.

    Returns:
        A row for each method: median and quartiles in milliseconds of the mean step of a cycle, the median over
        cycles of its ratio to full fine-tuning, GFLOP of the mean step of a cycle (counted after the timing).
    """
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
    for number in range(rounds + 1):
        cycle = list(itertools.islice(stream, CYCLE))
        for name, training in trainings.items():
            began = time.perf_counter()
            for batch in cycle:
                training.step(batch)
            if number:  # the first cycle builds state
                seconds[name].append((time.perf_counter() - began) / CYCLE)
        print(f"cycle {number} of {rounds}", flush=True)
    cycle = list(itertools.islice(stream, CYCLE))
    rows: list[dict[str, object]] = []
    for name, training in trainings.items():
        with FlopCounterMode(display=False) as counter:
            for batch in cycle:
                training.step(batch)
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds[name], n=4))
        pairs = zip(seconds[name], seconds["full AdamW"], strict=True)
        rows.append(
            {
                "name": name,
                "ms": middle,
                "ms_low": low,
                "ms_high": high,
                "time_of_full": statistics.median(own / full for own, full in pairs),
                "gflop": counter.get_total_flops() / CYCLE / 1e9,
                "cycles": rounds,
            }
        )
    return rows


def measure_bytes(name: str, batch_size: int) -> dict[str, object]:
    """Most bytes in use on the simulated accelerator in the second and third cycle, batches as long as they can be."""
    sim.load()
    torch.manual_seed(0)
    data = DATA_SETS[DATA].module(DATA.replace(" ", "_"), seed=0, batch_size=batch_size)
    before = sim.memory_allocated()
    network = network_for(data).train().to("sim")
    weights = sim.memory_allocated() - before
    training = CONTESTANTS[name].method(network, RATE, MANY, 0)
    peak = 0
    for number in range(3 * CYCLE):
        ids = torch.randint(1000, 20_000, (batch_size, MAX_LENGTH))
        labels = torch.randint(2, (batch_size,))
        batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        batch = {key: value.to("sim") for key, value in batch.items()}
        if number == CYCLE:
            sim.reset_peak_memory_stats()
        training.step(batch)
        del batch
    peak = sim.max_memory_allocated() - before
    return {"method": name, "batch_size": batch_size, "weights_bytes": weights, "peak_bytes": peak}


ROWS = {f"{name}, batch {size}": (name, size) for name in CONTESTANTS for size in (BATCH_SIZE, 8, 4, 2, 1)}


def measure_row(row: str) -> dict[str, object]:
    """`measure_bytes` by the name of a row."""
    return measure_bytes(*ROWS[row])
