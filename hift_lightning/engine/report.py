"""What a human reads about the blocks of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockReport:
    """One block of a run; sizes in bytes."""

    index: int
    name: str
    numel: int
    weight_bytes: int
    visits: int
    """Updates that the block has had."""
    parked_bytes: int
    """Its optimizer state that is parked, and its master weights."""
    device_bytes: int
    """Its optimizer state that is on the device."""
    active: bool


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
        return "\n".join([*lines, f"{self.updates} updates, {self.cycle_length} to a cycle"])
