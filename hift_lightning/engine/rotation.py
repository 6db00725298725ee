"""Which block is active: a function of the number of updates performed, and of nothing else.

Because the rotation keeps no state, resuming a run is setting a number.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hift_lightning.engine.errors import ConfigurationError

Order = Callable[[int, int | None], list[int]]
"""``(number of blocks, seed) -> block indices in the order of their turns``; index 0 is the bottom block."""


def _bottom2up(blocks: int, seed: int | None) -> list[int]:
    return list(range(blocks))


def _top2down(blocks: int, seed: int | None) -> list[int]:
    return list(reversed(range(blocks)))


def _random(blocks: int, seed: int | None) -> list[int]:
    turns = list(range(blocks))
    random.Random(seed).shuffle(turns)
    return turns


ORDERS: dict[str, Order] = {"bottom2up": _bottom2up, "top2down": _top2down, "random": _random}
"""The orders by name. The order is fixed once before training (HiFT, arXiv 2401.15207)."""


def check_order(order: str) -> None:
    """Raise if no order has this name.

    Args:
        order: a key of :data:`ORDERS`.

    Raises:
        ConfigurationError: if it is not one.
    """
    if order not in ORDERS:
        raise ConfigurationError(
            f"`order={order!r}` is not an order of the blocks; choose one of {', '.join(sorted(ORDERS))}."
        )


def check_steps_per_block(steps_per_block: Any) -> None:
    """Raise unless the value is an integer of at least 1.

    Args:
        steps_per_block: optimizer steps before the next block has its turn.

    Raises:
        ConfigurationError: if it is not.
    """
    if not isinstance(steps_per_block, int) or isinstance(steps_per_block, bool) or steps_per_block < 1:
        raise ConfigurationError(
            f"`steps_per_block={steps_per_block!r}` must be an integer of at least 1: "
            "the optimizer steps that a block makes before the next one has its turn."
        )


@dataclass(frozen=True)
class Rotation:
    """The blocks' turns, cycle after cycle.

    Args:
        blocks: number of blocks (the paper's k), at least 1.
        order: a key of :data:`ORDERS`; blocks are cut from the bottom whatever the order, which only
            permutes their turns.
        steps_per_block: updates that a block makes before the next one has its turn.
        seed: decides the ``random`` order; the others ignore it.
    """

    blocks: int
    order: str = "top2down"
    steps_per_block: int = 1
    seed: int | None = 0
    turns: tuple[int, ...] = field(init=False)
    """Block indices in the order of their turns."""

    def __post_init__(self) -> None:
        check_order(self.order)
        check_steps_per_block(self.steps_per_block)
        turns = tuple(ORDERS[self.order](self.blocks, self.seed))
        if sorted(turns) != list(range(self.blocks)):
            raise ConfigurationError(
                f"`order={self.order!r}` gave the turns {turns}, but each of the {self.blocks} blocks must "
                "have exactly one turn a cycle; mend the function registered under that name."
            )
        object.__setattr__(self, "turns", turns)

    @property
    def cycle_length(self) -> int:
        """Updates in one cycle, after which every block has had its turn once."""
        return self.blocks * self.steps_per_block

    def block_at(self, updates: int) -> int:
        """Index of the block that is active after ``updates`` updates have been performed."""
        return self.turns[updates % self.cycle_length // self.steps_per_block]

    def cycle_at(self, updates: int) -> int:
        """Number of whole cycles contained in ``updates`` updates."""
        return updates // self.cycle_length

    def visits(self, block: int, updates: int) -> int:
        """Number of the first ``updates`` updates that went to ``block`` (an index)."""
        cycles, rest = divmod(updates, self.cycle_length)
        own = rest - self.turns.index(block) * self.steps_per_block
        return cycles * self.steps_per_block + min(max(own, 0), self.steps_per_block)
