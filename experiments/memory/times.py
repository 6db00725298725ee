"""Step time on the CPU of the three ways to update a block, interleaved as in `experiments.step_cost`."""

import functools
import statistics

import torch

from experiments.step_cost.contestants import Contestant, hift
from experiments.step_cost.measure import times_of_all

STEP_TIMES = ("interleaved",)

CONTESTANTS: dict[str, Contestant] = {
    update: functools.partial(hift, update=update) for update in ("block", "streamed", "fused")
}


def measure_step_times(name: str, cycles: int) -> dict[str, object]:
    """Milliseconds of a step, as the median over cycles of a cycle's mean; `window` is the default."""
    threads = torch.get_num_threads()
    times = times_of_all(CONTESTANTS, cycles, threads)
    medians = {update: statistics.median(values) for update, values in times.items()}
    return {
        "cycles": cycles,
        "threads": threads,
        **{f"{update}_ms": f"{median:.2f}" for update, median in medians.items()},
        **{f"{update}_fastest_ms": f"{min(values):.2f}" for update, values in times.items()},
        **{f"{update}_slowest_ms": f"{max(values):.2f}" for update, values in times.items()},
    }
