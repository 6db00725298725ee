"""Which block is active: a function of the number of updates performed, and of nothing else.

Because the rotation keeps no state, resuming a run is setting a number.
"""

import bisect
import functools
import hashlib
import itertools
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

ONCE, TAPERED = "once", "tapered"
"""``steps_per_block`` with which each block has one turn in the whole run: of equal lengths, or of falling ones."""

ONE_TURN = (ONCE, TAPERED)
"""The values of ``steps_per_block`` that want to know the steps of the run."""

_FIRST_TO_LAST = 4
"""How many times as long as the last turn the first one is under ``tapered``; the lengths fall linearly."""

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
    if order not in ORDERS:
        raise ConfigurationError(
            f"`order={order!r}` is not an order of the blocks; choose one of {ORDERS.names()}, or register one with "
            "`register_order`."
        )


def check_steps_per_block(steps_per_block: Any) -> None:
    """Raise unless the value is an integer of at least 1, ``once`` or ``tapered``.

    Args:
        steps_per_block: optimizer steps before the next block has its turn.

    Raises:
        ConfigurationError: if it is not.
    """
    if steps_per_block in ONE_TURN:
        return
    if not isinstance(steps_per_block, int) or isinstance(steps_per_block, bool) or steps_per_block < 1:
        raise ConfigurationError(
            f"`steps_per_block={steps_per_block!r}` must be an integer of at least 1, the optimizer steps that a block "
            f"makes before the next one has its turn, or `{ONCE}` or `{TAPERED}`."
        )


def length_of_turn(steps_per_block: int | str, blocks: int, total_steps: int | None) -> int | tuple[int, ...]:
    """Optimizer steps of a turn; where they differ, those of each turn in a cycle.

    Args:
        steps_per_block: a number, which is returned; ``once`` or ``tapered``.
        blocks: number of blocks.
        total_steps: optimizer steps of the run. Under ``once`` as many turns of equal length are made of them as there
            are blocks, and what is left over begins a second cycle. Under ``tapered`` nothing is left over: each turn
            has a step, and the others are dealt out in shares that fall linearly to a quarter of the first.

    Raises:
        ConfigurationError: under ``once`` and ``tapered``, if the number of steps is not known.
    """
    if isinstance(steps_per_block, int):
        return steps_per_block
    if total_steps is None or total_steps < 1:
        raise ConfigurationError(
            f"`steps_per_block={steps_per_block!r}` divides the optimizer steps of the run among the blocks, and their "
            f"number is not known here (`total_steps={total_steps}`): give it (`HiFT(..., total_steps=1000)`), or a "
            "number of steps a block."
        )
    if steps_per_block == ONCE:
        return max(1, total_steps // blocks)
    shares = [_FIRST_TO_LAST * (blocks - 1 - place) + place for place in range(blocks)] if blocks > 1 else [1]
    whole, others = sum(shares), max(0, total_steps - blocks)
    ends = [others * until // whole for until in itertools.accumulate(shares)]
    return tuple(1 + end - begin for begin, end in itertools.pairwise([0, *ends]))


@dataclass(frozen=True)
class Rotation:
    """The blocks' turns, cycle after cycle.

    Args:
        blocks: number of blocks (the paper's k), at least 1.
        order: a key of :data:`ORDERS`; blocks are cut from the bottom whatever the order, which only
            permutes their turns.
        steps_per_block: updates that a block makes before the next one has its turn; or those of each turn in a
            cycle, as many numbers as there are blocks.
        seed: decides the ``random`` order; the others that are built in ignore it.

    Raises:
        ConfigurationError: if a value cannot work, or the order does not give every block one turn a cycle, or gives
            other turns when it is asked again.
    """

    blocks: int
    order: str = "top2down"
    steps_per_block: int | tuple[int, ...] = 1
    seed: int | None = 0
    turns: tuple[int, ...] = field(init=False)
    """Block indices in the order of their turns in the first cycle."""
    fingerprint: str = field(init=False)
    """The SHA-256, in hexadecimal, of the turns in the first cycles, which tells equal orders from others."""

    def __post_init__(self) -> None:
        check_order(self.order)
        for steps in self._lengths:
            check_steps_per_block(steps)
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
        return turns

    @functools.cached_property
    def _lengths(self) -> tuple[int, ...]:
        steps = self.steps_per_block
        return steps if isinstance(steps, tuple) else (steps,) * self.blocks

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        """Updates of a cycle until the end of each turn."""
        return tuple(itertools.accumulate(self._lengths))

    @property
    def cycle_length(self) -> int:
        """Updates in one cycle, after which every block has had its turn once."""
        return self._ends[-1]

    def turns_in(self, cycle: int) -> tuple[int, ...]:
        """Block indices in the order of their turns in a cycle, the first of which is 0."""
        return _turns_in(self, cycle)

    def block_at(self, updates: int) -> int:
        """Index of the block that is active after ``updates`` updates have been performed."""
        cycle, rest = divmod(updates, self.cycle_length)
        return self.turns_in(cycle)[bisect.bisect_right(self._ends, rest)]

    def cycle_at(self, updates: int) -> int:
        """Number of whole cycles contained in ``updates`` updates."""
        return updates // self.cycle_length

    def visits(self, block: int, updates: int) -> int:
        """Number of the first ``updates`` updates that went to ``block`` (an index)."""
        cycles, rest = divmod(updates, self.cycle_length)
        if isinstance(self.steps_per_block, int):
            before = cycles * self.steps_per_block
        else:
            before = sum(self._lengths[self.turns_in(cycle).index(block)] for cycle in range(cycles))
        place = self.turns_in(cycles).index(block)
        length = self._lengths[place]
        return before + min(max(rest - self._ends[place] + length, 0), length)


@functools.lru_cache(maxsize=16)
def _turns_in(rotation: Rotation, cycle: int) -> tuple[int, ...]:
    return rotation._ask(cycle)
