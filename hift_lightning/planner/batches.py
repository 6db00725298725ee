"""The largest batch that fits."""

import bisect
import itertools
from collections.abc import Callable

from hift_lightning.planner.gpus import needed_bytes
from hift_lightning.planner.result import BlockPlan, Plan


class BatchSizes:
    """What a step needs with a batch of any size, from the plans of a few.

    At any moment of a step the bytes in use grow with the batch on a straight line, so the highest of all moments lies
    below the line between two batches that were planned: what is read off it between them is never too little.

    Args:
        planner: plans a step with a batch of so many rows.
        planned: batch sizes and plans that exist already; at least one.
        largest_memory: bytes of the largest device that will be asked about.
    """

    def __init__(self, planner: Callable[[int], Plan], planned: dict[int, Plan], largest_memory: int) -> None:
        self._plans = dict(planned)
        for batch in (1, 2) if 1 in planned else (1,):
            if batch not in self._plans:
                self._plans[batch] = planner(batch)
        if self._fits(1, largest_memory):
            self._plan_one_that_is_too_large(planner, largest_memory)

    def _plan_one_that_is_too_large(self, planner: Callable[[int], Plan], memory_bytes: int) -> None:
        (low, below), (high, above) = sorted(self._plans.items())[-2:]
        if not self._fits(high, memory_bytes):
            return
        reached = []  # where the line through the peaks of a phase comes to the memory; the true bytes lie above it
        for block, same in zip(below.blocks, above.blocks, strict=True):
            for phase, peak in same.trace.phase_peaks.items():
                growth = (needed_bytes(peak) - needed_bytes(block.trace.phase_peaks[phase])) / (high - low)
                if growth > 0:
                    reached.append(high + (memory_bytes - needed_bytes(peak)) / growth)
        if reached:
            too_large = int(min(reached)) + 1
            self._plans[too_large] = planner(too_large)

    def largest(self, memory_bytes: int) -> int | None:
        """Rows of the largest batch that fits a device's memory; `None` where not even one row does."""
        if not self._fits(1, memory_bytes):
            return None
        sizes = range(1, max(self._plans) + 1)
        return bisect.bisect_left(sizes, True, key=lambda batch: not self._fits(batch, memory_bytes))

    def _fits(self, batch: int, memory_bytes: int) -> bool:
        return needed_bytes(self._peak_bytes(batch)) <= memory_bytes

    def _peak_bytes(self, batch: int) -> int:
        if batch in self._plans:
            return self._plans[batch].peak_bytes
        low, high = next(pair for pair in itertools.pairwise(sorted(self._plans)) if pair[0] < batch < pair[1])
        share = (batch - low) / (high - low)
        blocks = zip(self._plans[low].blocks, self._plans[high].blocks, strict=True)
        return max(_peak_between(below, above, share) for below, above in blocks)


def _peak_between(low: BlockPlan, high: BlockPlan, share: float) -> int:
    below, above = low.trace.phase_peaks, high.trace.phase_peaks
    return max(round(below[phase] + share * (above[phase] - below[phase])) for phase in below)
