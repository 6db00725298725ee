"""What a plan says."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from hift_lightning.planner.trace import StepTrace

_Key = TypeVar("_Key", bound=str)


@dataclass(frozen=True)
class BlockPlan:
    """The step of one block."""

    name: str
    numel: int
    trace: StepTrace
    to_device_bytes: int = 0
    """State and masters paged in, and weights that are in host memory."""
    to_host_bytes: int = 0
    """State and masters parked, and gradients of weights that are in host memory."""
    parked_bytes: int = 0
    """The block's state and masters in host memory or files, once it has been updated."""

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that each of so many ranks sends in the step (see `ring_bytes`)."""
        return ring_bytes(self.trace.collectives, ranks)


def ring_bytes(collectives: Mapping[str, int], ranks: int) -> float:
    """Bytes that each rank sends, if collectives go round a ring.

    Of a tensor with S bytes that is S (n-1)/n for an all-gather and a reduce-scatter, twice as much for an all-reduce,
    and at most S for a broadcast (Patarasuk and Yuan, https://doi.org/10.1016/j.jpdc.2008.09.002).

    Args:
        collectives: bytes of whole tensors by the kind of the collective, as a `StepTrace` has them.
        ranks: n.
    """
    share = (ranks - 1) / ranks
    factors = {"all-reduce": 2 * share, "all-gather": share, "reduce-scatter": share, "broadcast": 1.0}
    return sum(factors[kind] * nbytes for kind, nbytes in collectives.items())


@dataclass(frozen=True)
class Plan:
    """What a training step of one configuration needs; bytes, unless said otherwise."""

    numel: int
    """Parameters of the model."""
    trained_numel: int
    blocks: tuple[BlockPlan, ...]
    """In the order of their turns; a single one, the model, under full fine-tuning."""
    always_active_parked_bytes: int = 0
    """State and masters of what is trained in every step, in host memory or files."""
    ranks: int = 1
    """Devices that train together; all other numbers are those of one, the first."""
    ranks_of_machine: int = 1

    def __str__(self) -> str:
        from hift_lightning.planner.tables import written  # which knows this class

        return written(self)

    @property
    def peak(self) -> BlockPlan:
        """The block whose step has the peak."""
        return max(self.blocks, key=lambda block: block.trace.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most bytes in use on the device."""
        return self.peak.trace.peak_bytes

    @property
    def parked_bytes(self) -> int:
        """Optimizer state and masters in host memory or files, once every block has been updated."""
        return sum(block.parked_bytes for block in self.blocks) + self.always_active_parked_bytes

    @property
    def flops(self) -> float:
        """FLOPs of a step (matrix products and attention), mean over a cycle."""
        return sum(block.trace.flops for block in self.blocks) / len(self.blocks)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends to others in a step, mean over a cycle (see `BlockPlan.sent_bytes`)."""
        return sum(block.sent_bytes(self.ranks) for block in self.blocks) / len(self.blocks)

    @property
    def moved_bytes(self) -> float:
        """Bytes moved in a step, both ways together, mean over a cycle: state and masters, or where weights are in
        host memory, these and gradients."""
        return sum(block.to_device_bytes + block.to_host_bytes for block in self.blocks) / len(self.blocks)


@dataclass(frozen=True)
class Stretch:
    """Blocks of the same tensors, one above the other, such as all middle layers of a transformer.

    What a step needs grows by the same amount from each of them to the one below, with a bend where another moment of a
    phase becomes its highest. So of a long stretch the ends and the middle are run, and where the middle is more than
    0.1 % off the line between the ends, the middle of each half, and so on; the others are taken to be on the lines.
    """

    indices: list[int]

    def to_run(self, seen: Mapping[int, BlockPlan]) -> list[int]:
        """Blocks to run yet, given those that have been run."""
        first, last = self.indices[0], self.indices[-1]
        if len(self.indices) < 5:
            return [index for index in self.indices if index not in seen]
        if first not in seen or last not in seen:
            return [first, (first + last) // 2, last]
        return self._between_ends(seen, first, last)

    def _between_ends(self, seen: Mapping[int, BlockPlan], first: int, last: int) -> list[int]:
        middle = (first + last) // 2
        if middle == first:
            return []
        if middle not in seen:
            return [middle]
        guess, found = self._between(seen, first, last, middle).trace, seen[middle].trace
        if all(abs(a - b) <= 1e-3 * b for a, b in ((guess.peak_bytes, found.peak_bytes), (guess.flops, found.flops))):
            return []
        return self._between_ends(seen, first, middle) + self._between_ends(seen, middle, last)

    def fill(self, seen: Mapping[int, BlockPlan]) -> dict[int, BlockPlan]:
        """All blocks of the stretch."""
        plans = {index: seen[index] for index in self.indices if index in seen}
        known = sorted(plans)
        for below, above in itertools.pairwise(known):
            for index in range(below + 1, above):
                plans[index] = self._between(seen, below, above, index)
        return plans

    def _between(self, seen: Mapping[int, BlockPlan], below: int, above: int, index: int) -> BlockPlan:
        low, high = seen[below], seen[above]
        share = (index - below) / (above - below)

        def mix(a: int, b: int) -> int:
            return round(a + share * (b - a))

        def mix_all(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> dict[_Key, int]:
            return {key: mix(a.get(key, 0), b.get(key, 0)) for key in dict.fromkeys((*a, *b))}

        near = (low if share < 0.5 else high).trace
        peaks = mix_all(low.trace.phase_peaks, high.trace.phase_peaks)
        same_shape = len(low.trace.timeline) == len(high.trace.timeline)
        trace = StepTrace(
            peak_bytes=max(peaks.values()),
            peak_phase=max(peaks, key=peaks.__getitem__),
            roles_at_peak=mix_all(low.trace.roles_at_peak, high.trace.roles_at_peak),
            phase_peaks=peaks,
            role_peaks=mix_all(low.trace.role_peaks, high.trace.role_peaks),
            timeline=[
                (phase, mix_all(a, b))
                for (phase, a), (_, b) in zip(low.trace.timeline, high.trace.timeline, strict=True)
            ]
            if same_shape
            else near.timeline,
            bytes_after=mix(low.trace.bytes_after, high.trace.bytes_after),
            flops=mix(low.trace.flops, high.trace.flops),
            collectives=mix_all(low.trace.collectives, high.trace.collectives),
            to_device_bytes=mix(low.trace.to_device_bytes, high.trace.to_device_bytes),
            to_host_bytes=mix(low.trace.to_host_bytes, high.trace.to_host_bytes),
        )
        return dataclasses.replace(low, trace=trace)
