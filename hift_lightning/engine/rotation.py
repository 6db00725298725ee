"""Which block is active: a function of the number of updates performed, and of nothing else.

Because the rotation keeps no state, resuming a run is setting a number.
"""

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.registry import Registry

Order = Callable[[int, int, int | None], Sequence[int]]
"""``(number of blocks, cycle, seed) -> block indices in the order of their turns``; index 0 is the bottom block, and
cycles count from 0. A seed is always given to orders that are not built in."""

ORDERS: Registry[Order] = Registry("register_order")
"""The orders by name. Those built in are fixed once before training (HiFT, arXiv 2401.15207)."""

ONCE = "once"
"""``steps_per_block`` with which each block has one turn in the whole run."""

_COMPARED_CYCLES = 16
"""In a checkpoint an order is known by its turns in so many cycles."""


def register_order(name: str) -> Callable[[Order], Order]:
    """A decorator that makes a function an order of the blocks' turns.

    The function is given the number of blocks, the cycle (from 0) and the seed, and returns each of
    ``range(blocks)`` once, 0 being the bottom block. It must return the same whenever it is asked the same, since a
    resumed run asks it again.

    Args:
        name: for ``order=``.

    Raises:
        ConfigurationError: if another order has this name.
    """
    return ORDERS.register(name)


@register_order("bottom2up")
def _bottom2up(blocks: int, cycle: int, seed: int | None) -> Sequence[int]:
    return range(blocks)


@register_order("top2down")
def _top2down(blocks: int, cycle: int, seed: int | None) -> Sequence[int]:
    return range(blocks)[::-1]


@register_order("random")
def _random(blocks: int, cycle: int, seed: int | None) -> Sequence[int]:
    turns = list(range(blocks))
    random.Random(seed).shuffle(turns)
    return turns


def check_order(order: str) -> None:
    """Raise if no order has this name.

    Args:
        order: a key of :data:`ORDERS`.

    Raises:
        ConfigurationError: if it is not one.
    """
    if not isinstance(order, str) or order not in ORDERS:
        raise ConfigurationError(
            f"`order={order!r}` is not an order of the blocks; choose one of {ORDERS.names()}, or register one with "
            "`register_order`."
        )


def check_steps_per_block(steps_per_block: Any) -> None:
    """Raise unless the value is an integer of at least 1, or ``once``.

    Args:
        steps_per_block: optimizer steps before the next block has its turn.

    Raises:
        ConfigurationError: if it is not.
    """
    if steps_per_block != ONCE and not _is_count(steps_per_block):
        raise ConfigurationError(
            f"`steps_per_block={steps_per_block!r}` must be an integer of at least 1, the optimizer steps that a block "
            f"makes before the next one has its turn, or `{ONCE}`."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def length_of_turn(steps_per_block: int | str, blocks: int, total_steps: int | None) -> int:
    """Optimizer steps of a turn.

    Args:
        steps_per_block: a number, which is returned, or ``once``.
        blocks: number of blocks.
        total_steps: optimizer steps of the run, looked at under ``once``: as many turns of equal length are made of
            them as there are blocks, and what is left over begins a second cycle.

    Raises:
        ConfigurationError: under ``once``, if the number of steps is not known.
    """
    if isinstance(steps_per_block, int):
        return steps_per_block
    if total_steps is None or total_steps < 1:
        raise ConfigurationError(
            f"`steps_per_block={steps_per_block!r}` divides the optimizer steps of the run among the blocks, and their "
            f"number is not known here (`total_steps={total_steps}`): give it (`HiFT(..., total_steps=1000)`), or a "
            "number of steps a block."
        )
    return max(1, total_steps // blocks)


@dataclass(frozen=True)
class Rotation:
    """The blocks' turns, cycle after cycle.

    Args:
        blocks: number of blocks (the paper's k), at least 1.
        order: a key of :data:`ORDERS`; blocks are cut from the bottom whatever the order, which only
            permutes their turns.
        steps_per_block: updates that a block makes before the next one has its turn.
        seed: decides the ``random`` order; the others that are built in ignore it.

    Raises:
        ConfigurationError: if a value cannot work, or the order does not give every block one turn a cycle, or gives
            other turns when it is asked again.
    """

    blocks: int
    order: str = "top2down"
    steps_per_block: int = 1
    seed: int | None = 0
    turns: tuple[int, ...] = field(init=False)
    """Block indices in the order of their turns in the first cycle."""
    fingerprint: str = field(init=False)
    """The SHA-256, in hexadecimal, of the turns in the first cycles, which tells equal orders from others."""

    def __post_init__(self) -> None:
        check_order(self.order)
        if not _is_count(self.steps_per_block):
            raise ConfigurationError(
                f"`steps_per_block={self.steps_per_block!r}` must be an integer of at least 1 here; `length_of_turn` "
                f"makes one of `{ONCE}`."
            )
        first, again = ([self._ask(cycle) for cycle in range(_COMPARED_CYCLES)] for _ in range(2))
        if first != again:
            raise ConfigurationError(
                f"`order={self.order!r}` gives other turns when it is asked again, so a resumed run could not go on; "
                "let the function registered under that name depend on its arguments alone, as "
                "`random.Random(f'{seed} {cycle}')` does."
            )
        object.__setattr__(self, "turns", first[0])
        object.__setattr__(self, "fingerprint", hashlib.sha256(json.dumps(first).encode()).hexdigest())

    def _ask(self, cycle: int) -> tuple[int, ...]:
        turns = tuple(ORDERS[self.order](self.blocks, cycle, self.seed))
        if sorted(turns) != list(range(self.blocks)):
            raise ConfigurationError(
                f"`order={self.order!r}` gave the turns {turns} in cycle {cycle}, but each of the {self.blocks} blocks "
                "must have exactly one turn a cycle; mend the function registered under that name."
            )
        return tuple(map(int, turns))  # numpy's integers are not written into a checkpoint

    @property
    def cycle_length(self) -> int:
        """Updates in one cycle, after which every block has had its turn once."""
        return self.blocks * self.steps_per_block

    def turns_in(self, cycle: int) -> tuple[int, ...]:
        """Block indices in the order of their turns in a cycle, the first of which is 0."""
        return _turns_in(self, cycle)

    def block_at(self, updates: int) -> int:
        """Index of the block that is active after ``updates`` updates have been performed."""
        return self.turns_in(self.cycle_at(updates))[updates % self.cycle_length // self.steps_per_block]

    def cycle_at(self, updates: int) -> int:
        """Number of whole cycles contained in ``updates`` updates."""
        return updates // self.cycle_length

    def visits(self, block: int, updates: int) -> int:
        """Number of the first ``updates`` updates that went to ``block`` (an index)."""
        cycles, rest = divmod(updates, self.cycle_length)
        own = rest - self.turns_in(cycles).index(block) * self.steps_per_block
        return cycles * self.steps_per_block + min(max(own, 0), self.steps_per_block)


@functools.lru_cache(maxsize=16)
def _turns_in(rotation: Rotation, cycle: int) -> tuple[int, ...]:
    return rotation._ask(cycle)
