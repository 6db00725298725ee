"""What a human reads about the blocks of a run."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hift_lightning.engine.partition import Block, Plan
from hift_lightning.engine.residency import Residency
from hift_lightning.engine.rotation import Rotation
from hift_lightning.engine.shards import local


@dataclass(frozen=True)
class BlockReport:
    """One block of a run; sizes in bytes."""

    index: int
    name: str
    numel: int
    weight_bytes: int
    visits: int
    """Updates in which it had its turn."""
    parked_bytes: int
    """Its optimizer state that is parked, and its master weights."""
    device_bytes: int
    """Its optimizer state that is on the device."""
    active: bool
    without_gradient: int = 0
    """Those of its visits in this run, since it began or was resumed, in which no gradient reached it."""


@dataclass(frozen=True)
class Report:
    """All blocks of a run, from the bottom; ``print`` gives a table."""

    blocks: tuple[BlockReport, ...]
    cycle_length: int
    """Updates in one cycle."""
    updates: int
    """Updates performed."""
    always_active: BlockReport | None = None
    """What is trained in every step."""

    @property
    def parts(self) -> tuple[BlockReport, ...]:
        """The blocks, and what is trained in every step."""
        return self.blocks if self.always_active is None else (*self.blocks, self.always_active)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence on each block that had visits without a gradient."""
        return tuple(
            f"No gradient reached block {block.index} (`{block.name}`) in {block.without_gradient} visits of this run."
            for block in self.blocks
            if block.without_gradient
        )

    def __str__(self) -> str:
        head = (
            "block",
            "layers",
            "parameters",
            "weights MiB",
            "visits",
            "state on device MiB",
            "parked MiB",
            "",
        )
        rows = [head] + [
            (
                "" if b is self.always_active else str(b.index),
                b.name,
                f"{b.numel:,}",
                f"{b.weight_bytes / 2**20:.2f}",
                str(b.visits),
                f"{b.device_bytes / 2**20:.2f}",
                f"{b.parked_bytes / 2**20:.2f}",
                "active" if b.active else "",
            )
            for b in self.parts
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (1, 7) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, f"{self.updates} updates, {self.cycle_length} to a cycle", *self.notes])


def report_of(
    plan: Plan,
    rotation: Rotation,
    updates: int,
    missed: Mapping[int, int],
    parameters: Mapping[str, nn.Parameter],
    residency: Residency,
) -> Report:
    """Report on a run.

    Args:
        plan: its blocks.
        rotation: their turns.
        updates: performed so far.
        missed: index of a block → visits in which no gradient reached it, as far as known.
        parameters: of the model, by name.
        residency: where their state is.
    """
    turn = rotation.block_at(updates)

    def part(block: Block, visits: int, active: bool) -> BlockReport:
        own = [parameters[name] for name in block.own_parameters]
        parked = sum(residency.state_bytes(p) for p in own if residency.is_parked(p))
        masters = sum(0 if (master := residency.master(p)) is None else master.nbytes for p in own)
        return BlockReport(
            index=block.index,
            name=block.name,
            numel=block.numel,
            weight_bytes=sum(local(p).nbytes for p in own),
            visits=visits,
            parked_bytes=parked + masters,
            device_bytes=sum(map(residency.state_bytes, own)) - parked,
            active=active,
            without_gradient=missed.get(block.index, 0),
        )

    blocks = tuple(part(block, rotation.visits(block.index, updates), block.index == turn) for block in plan.blocks)
    always = plan.always_active
    return Report(blocks, rotation.cycle_length, updates, None if always is None else part(always, updates, True))
