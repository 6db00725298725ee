"""Which blocks the loss depends on, as their gradients tell."""

import warnings
from collections import Counter
from collections.abc import Mapping

from hift_lightning.engine.partition import Block

_WARNED_AT = (1, 10)
"""Steps of a block's turns without any gradient after which it is named."""

_STEPS_BEFORE_ERROR, _STEPS_PER_BLOCK_BEFORE_ERROR = 16, 4
"""At least so many, and so many times the number of blocks: where each batch uses one of the parts by chance, fewer may
all miss the block whose turn it is."""

_REMEDIES = (
    "Where some batches use other parts of the model than others, make turns so long that each part is used within one "
    "(`steps_per_block`), or train such parts in every step (`always_active=[...]`); what no batch uses keep out of "
    "the rotation with `frozen=[...]` patterns."
)


class Reach:
    """Notes which blocks a gradient has reached, and warns of the others.

    It knows of the steps of one run alone, and not of those before it was resumed.

    Args:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._reached: set[int] = set()
        self._missed: Counter[int] = Counter()

    @property
    def missed(self) -> Mapping[int, int]:
        """Index of a block → in how many steps of its turns no gradient reached it."""
        return self._missed

    def note(self, block: Block, reached: bool) -> None:
        """Take in what the backward passes of a step have shown.

        Args:
            block: the active one.
            reached: whether one of its own parameters had a gradient.

        Raises:
            RuntimeError: if no block has been reached in 16 steps, and as many as four for each block.
        """
        if reached:
            self._reached.add(block.index)
            return
        self._missed[block.index] += 1
        steps = self._missed.total()
        all_missed = not self._reached and len(self._missed) == self._blocks
        if all_missed and steps >= max(_STEPS_BEFORE_ERROR, _STEPS_PER_BLOCK_BEFORE_ERROR * self._blocks):
            raise RuntimeError(
                f"No gradient reached any of the {self._blocks} blocks in {steps} steps: either the loss does not "
                "depend on the parameters that are trained (check that it is computed from them and is not detached, "
                "and checkpoint activations with `use_reentrant=False`), or batches use each block in other steps than "
                "those of its turns (make turns longer, with `steps_per_block`)."
            )
        if self._missed[block.index] in _WARNED_AT and block.index not in self._reached:
            when = "at its turn" if self._missed[block.index] == 1 else f"in {self._missed[block.index]} steps"
            warnings.warn(
                f"No gradient reached block {block.index} (`{block.name}`) {when}: the loss did not depend on its "
                "parameters. If it never does, the block is not trained. If its activations are checkpointed with "
                "`use_reentrant=True`, give `use_reentrant=False`, or `activation_checkpointing=True` to HiFT instead. "
                f"{_REMEDIES}",
                stacklevel=3,
            )

    def warn_of_untrained(self, blocks: tuple[Block, ...]) -> None:
        """Warn of the blocks that no gradient has reached in several steps of their turns, which is all they had.

        Args:
            blocks: all there are.
        """
        untrained = [block for block in blocks if self._missed[block.index] > 1 and block.index not in self._reached]
        if untrained:
            names = (f"block {one.index} (`{one.name}`, {self._missed[one.index]} steps)" for one in untrained)
            warnings.warn(
                f"No gradient reached {', '.join(names)} in this run, so nothing there was trained. {_REMEDIES}",
                stacklevel=3,
            )
