"""Training batches whose order is a function of seed and epoch, and whose position in it is a number."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochOrder(Sampler[list[int]]):
    """The batches of another sampler, in an order that seed and epoch decide, from any one of them on.

    Args:
        batches: lists of indices; draws its order from `generator` when it is iterated.
        generator: is seeded anew for each epoch.
        seed: that of the first epoch; those of later ones come from it.
    """

    def __init__(self, batches: Sampler[list[int]], generator: torch.Generator, seed: int) -> None:
        self._batches = batches
        self._generator = generator
        self._seed = seed
        self.epoch = 0
        self.first = 0
        """The batch that the next pass begins with."""
        self.given = 0
        """Batches of this epoch that have been handed out."""

    @property
    def sampler(self) -> "EpochOrder":
        """Itself: Lightning tells the epoch to the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, unless it is the one that is going on."""
        if epoch != self.epoch:
            self.epoch, self.first, self.given = epoch, 0, 0

    def begin(self) -> int:
        """Make ready for a pass, and return the batch that it begins with."""
        self.given, self.first = self.first, 0
        seed = self._seed
        if self.epoch:
            seed = int.from_bytes(hashlib.sha256(f"{self._seed} {self.epoch}".encode()).digest()[:4], "big")
        self._generator.manual_seed(seed)
        return self.given

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        return itertools.islice(self._batches, self.given, None)


class TrainingLoader(DataLoader[Any]):
    """A DataLoader that goes on where it stopped, under Lightning and in plain loops.

    Its state is an epoch and a number of batches, which counts what has been handed out and not what workers have
    prepared. Under Lightning the epoch is the Trainer's; elsewhere each complete pass is one.

    Args:
        dataset: a map-style data set.
        batches: as in `EpochOrder`.
        shuffling: the generator, as in `EpochOrder`.
        seed: as in `EpochOrder`.
        arguments: of `DataLoader`.
    """

    batch_sampler: EpochOrder

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Sampler[list[int]],
        shuffling: torch.Generator,
        seed: int,
        **arguments: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=EpochOrder(batches, shuffling, seed), **arguments)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # As a generator it begins when the first batch is asked for, and by then Lightning has told the epoch.
        order = self.batch_sampler
        for batch in self._pass(resumed=order.begin() > 0):
            order.given += 1
            yield batch
        order.set_epoch(order.epoch + 1)

    def _pass(self, resumed: bool) -> Iterable[Any]:
        if not resumed:
            return super().__iter__()
        # torch draws a number for the workers when a pass begins; this pass drew it before it was stopped
        with torch.random.fork_rng(devices=[]):
            return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the batches of it that have been handed out."""
        return {"epoch": self.batch_sampler.epoch, "batches": self.batch_sampler.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there with the next pass."""
        order = self.batch_sampler
        order.epoch, order.first, order.given = state_dict["epoch"], state_dict["batches"], state_dict["batches"]
