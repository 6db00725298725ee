"""What a step of each method costs: time, FLOPs, and bytes on the simulated accelerator.

    python -m experiments.quality.cost [--rounds N] [--only METHOD ...] [--again]

Times are taken in one process on one thread, the methods in turn and full fine-tuning with them, so run it alone: for
all of them some twenty-five minutes, and as long again to count FLOPs. Writes the rows that `cost.csv` (time and FLOPs;
with `--only` of these methods) and `bytes.csv` lack, with `--again` all.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import lightning as L
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.quality.data_sets import DATA_SETS, MAX_LENGTH
from experiments.quality.methods import CONTESTANTS, FULL, LISA, MOST_TEXTS, TOP_IN_LORAS_TIME, Batch, Method, Training
from experiments.quality.training import batches, network_for
from experiments.table import Rows, Table, read_rows, write_rows
from tests import simulated_accelerator as sim

HERE = Path(__file__).parent
TIMES = HERE / "cost.csv"
DATA = "film reviews"
TURN = 8
"""Steps that a method has before the next one's turn: those in which HiFT has all blocks of the model."""
RATE = 1e-4
TIMED = tuple(name for name in CONTESTANTS if name != TOP_IN_LORAS_TIME)
"""All methods but one, whose steps are those of another."""


def measure_times(rounds: int | None, chosen: Collection[str]) -> Rows:
    """Time the methods in turn, `TURN` steps each on the same batches, on one thread.

    Where a cycle of a method is longer than a turn, it is put together from turns.

    Args:
        rounds: turns of each method that are measured; at least as many as the longest cycle needs, and if `None` at
            least 20.
        chosen: the methods; full fine-tuning is timed with them.

    Returns:
        A row for each chosen method: median, least and most milliseconds of the mean step of a cycle; the median over
        cycles of its ratio to full fine-tuning in the same rounds; FLOPs of the mean step over those of full
        fine-tuning in rounds after those.

    Raises:
        ValueError: the rounds are too few for a cycle.
    """
    contestants = {name: CONTESTANTS[name] for name in CONTESTANTS if name in chosen or name == FULL}
    longest = max(_turns(contestant.cycle) for contestant in contestants.values())
    rounds = max(20, longest) if rounds is None else rounds
    if rounds < longest:
        raise ValueError(f"`rounds` is {rounds}, and the longest cycle takes {longest} turns; give at least so many.")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    trainings: dict[str, Training] = {}
    streams: dict[int, Iterator[Batch]] = {}
    for name, contestant in contestants.items():
        data = DATA_SETS[DATA].module(DATA.replace(" ", "_"), seed=0, batch_size=contestant.batch_size)
        data.setup("fit")
        network = network_for(data).train()
        trainings[name] = contestant.method(network, RATE, contestant.steps_in_time, 0)
        streams.setdefault(contestant.batch_size, batches(data))
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    flops = dict.fromkeys(trainings, 0)
    for number in range(rounds + 1):
        turn = {size: list(itertools.islice(stream, TURN)) for size, stream in streams.items()}
        for name, training in trainings.items():
            began = time.perf_counter()
            for batch in turn[contestants[name].batch_size]:
                training.step(batch)
            if number:  # the first turn builds state
                seconds[name].append((time.perf_counter() - began) / TURN)
        print(f"round {number} of {rounds}", flush=True)
    for number in range(longest):
        turn = {size: list(itertools.islice(stream, TURN)) for size, stream in streams.items()}
        for name, training in trainings.items():
            # of torch's fused attention on a CPU, which runs where there is no dropout, no products are counted
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                for batch in turn[contestants[name].batch_size]:
                    training.step(batch)
            flops[name] += counter.get_total_flops()
        print(f"FLOPs {number + 1} of {longest}", flush=True)
    rows: Rows = {}
    for name in chosen:
        turns = _turns(contestants[name].cycle)
        own, full = (_means(seconds[each], turns) for each in (name, FULL))
        values = {
            "name": name,
            "ms": 1000 * statistics.median(own),
            "ms_least": 1000 * min(own),
            "ms_most": 1000 * max(own),
            "time_of_full": statistics.median(a / b for a, b in zip(own, full, strict=True)),
            "cycles": len(own),
            "flops_of_full": flops[name] / flops[FULL],
        }
        rows[name] = {key: str(value) for key, value in values.items()}
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
    contestant = CONTESTANTS[name]
    # of a method that draws layers, all have moments only late in a run
    steps = contestant.steps_in_time if name == LISA else max(2 * TURN, contestant.cycle)
    return {"method": name, "batch_size": batch_size, **count_bytes(contestant.method, batch_size, steps)}


def count_bytes(method: Method, batch_size: int, steps: int = 2 * TURN) -> dict[str, object]:
    """Most bytes in use on the simulated accelerator, batches as long as they can be.

    Args:
        method: the method.
        batch_size: texts in a batch.
        steps: that are looked at, after a first turn; a cycle of the method at least.
    """
    sim.load()
    torch.manual_seed(0)
    data = DATA_SETS[DATA].module(DATA.replace(" ", "_"), seed=0, batch_size=batch_size)
    before = sim.memory_allocated()
    network = network_for(data).train().to("sim")
    weights = sim.memory_allocated() - before
    training = method(network, RATE, steps, 0)
    for number in range(TURN + steps):
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


def bytes_row(method: str) -> str:
    """Name of the row of a method with the batches that it is run with."""
    return f"{method}, batch {CONTESTANTS[method].batch_size}"


def one_more(method: str) -> str:
    """Name of the row of a method with a text more than it is run with."""
    return f"{method}, batch {CONTESTANTS[method].batch_size + 1}"


ROWS = {
    **{bytes_row(name): (name, contestant.batch_size) for name, contestant in CONTESTANTS.items()},
    **{one_more(name): (name, CONTESTANTS[name].batch_size + 1) for name in MOST_TEXTS},
}
BYTES = Table(HERE / "bytes.csv", tuple(ROWS), measure_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="turns of each method that are timed (default: 20, or a cycle)")
    parser.add_argument("--again", action="store_true", help="measure also what is in the record")
    parser.add_argument("--only", nargs="+", choices=TIMED, default=list(TIMED), metavar="METHOD")
    arguments = parser.parse_args()
    rows = times()
    if untimed := [name for name in arguments.only if arguments.again or name not in rows]:
        rows |= measure_times(arguments.rounds, untimed)
        write_rows(TIMES, [rows[name] for name in CONTESTANTS if name in rows])
    BYTES.complete(BYTES.rows, arguments.again)
    for row in rows.values():
        ms, of_time, of_flops = (float(row[key]) for key in ("ms", "time_of_full", "flops_of_full"))
        print(f"{row['name']}: {ms:.0f} ms, {of_time:.3f} of the time of full fine-tuning, {of_flops:.3f} of its FLOPs")


if __name__ == "__main__":
    main()
