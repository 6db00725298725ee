"""Which blocks the loss depends on, as their gradients tell."""

import warnings

from hift_lightning.engine.partition import Block


class Reach:
    """Notes which blocks a gradient has reached, and warns once of each of the others.

    Args:
        blocks: how many there are.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._reached: set[int] = set()
        self._warned_of: set[int] = set()

    def note(self, block: Block, reached: bool) -> None:
        """Take in what the backward passes of a step have shown.

        Args:
            block: the active one.
            reached: whether one of its own parameters had a gradient.

        Raises:
            RuntimeError: if no block has been reached in a whole cycle.
        """
        if reached:
            self._reached.add(block.index)
        elif block.index not in self._reached | self._warned_of:
            self._warned_of.add(block.index)
            if len(self._warned_of) == self._blocks:
                raise RuntimeError(
                    f"No gradient reached any of the {self._blocks} blocks in a whole cycle: the loss does not depend "
                    "on the parameters that are trained; check that it is computed from them and is not detached, and "
                    "checkpoint activations with `use_reentrant=False`."
                )
            warnings.warn(
                f"No gradient reached block {block.index} (`{block.name}`) at its turn: the loss did not depend "
                "on its parameters. If it never does, the block is not trained. If its activations are checkpointed "
                "with `use_reentrant=True`, give `use_reentrant=False`, or `activation_checkpointing=True` to HiFT "
                "instead; otherwise keep it out of the rotation with `frozen=[...]` patterns.",
                stacklevel=3,
            )
