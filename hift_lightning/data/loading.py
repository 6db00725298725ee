"""Training batches whose order is a function of seed and epoch, and whose position in it is a number."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler


class EpochOrder(Sampler[list[int]]):
    """The batches of another sampler, in an order that seed and epoch decide, from any one of them on.

    Where several ranks train together they take turns, so that all together go through the batches as one would; if
    the last round is short, the first batches of the epoch fill it up.

    Args:
        batches: lists of indices; draws its order from `generator` when it is iterated.
        generator: is seeded anew for each epoch.
        seed: that of the first epoch; those of later ones come from it.
    """

    def __init__(self, batches: Sampler[list[int]], generator: torch.Generator, seed: int) -> None:
        self._batches = batches
        self._generator = generator
        self.seed = seed
        self.epoch = 0
        self.first = 0
        """The batch that the next pass begins with."""
        self.given = 0
        """Batches of this epoch that have been handed out, on all ranks together."""
        self.told: int | None = None
        """The Trainer's epoch; this one is ahead of it after more than one pass, beside a loader with more batches."""
        self.over = False
        """Whether a checkpoint was made between two passes of one epoch of the Trainer."""
        self.resumed = False
        """Whether the position is that of a checkpoint, and the Trainer has not told its epoch since."""

    @property
    def sampler(self) -> "EpochOrder":
        """Itself: Lightning tells the epoch to the sampler of a batch sampler."""
        return self

    @property
    def ranks(self) -> int:
        """Ranks that take turns."""
        return dist.get_world_size() if dist.is_initialized() else 1

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch of the Trainer, unless it is the one that is going on."""
        if epoch != (self.told if self.resumed else self.epoch):
            self.epoch, self.first, self.given = epoch, 0, 0
        elif self.resumed and self.over:  # nothing is left of its pass, and a longer loader's goes on
            self.epoch, self.first, self.given = epoch, self.batches_in_epoch, self.batches_in_epoch
        self.told, self.resumed = epoch, False

    def begin(self) -> int:
        """Make ready for a pass, and return the batch that it begins with."""
        self.given, self.first = self.first, 0
        seed = self.seed
        if self.epoch:
            seed = int.from_bytes(hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()[:4], "big")
        self._generator.manual_seed(seed)
        return self.given

    def end(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.first, self.given = self.epoch + 1, 0, 0
        if self.resumed:  # in a plain loop, or by a Trainer that is about to tell of the next epoch
            self.told, self.resumed = None, False

    def go_on(self, epoch: int, batches: int, told: int, begun: bool) -> None:
        """Begin the next pass where a checkpoint was made."""
        self.over = epoch > told and batches == 0 and not begun
        self.epoch, self.first, self.given, self.told, self.resumed = epoch, batches, batches, told, True

    @property
    def batches_in_epoch(self) -> int:
        """On all ranks together."""
        return len(self._batches)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-self.batches_in_epoch // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self._batches)
        rank = dist.get_rank() if dist.is_initialized() else 0
        for turn in range(self.given + rank, len(batches) + rank, self.ranks):
            yield batches[turn % len(batches)]


class TrainingLoader:
    """A DataLoader that goes on where it stopped, under Lightning and in plain loops, on one device and on many.

    Its state is an epoch and a number of batches, which counts what has been handed out and not what workers have
    prepared. Under Lightning the epoch is the Trainer's; elsewhere each complete pass is one. It is no subclass of
    DataLoader, whose sampler Lightning would replace where there are several ranks; the ranks take turns here.

    Args:
        dataset: a map-style data set.
        batches: as in `EpochOrder`.
        shuffling: the generator, as in `EpochOrder`.
        seed: as in `EpochOrder`.
        arguments: of `DataLoader`.
    """

    draws_as_before = True
    """Whether fetching the first batch after a resume draws the random numbers that it would have drawn."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batches: Sampler[list[int]],
        shuffling: torch.Generator,
        seed: int,
        **arguments: Any,
    ) -> None:
        self.batch_sampler = EpochOrder(batches, shuffling, seed)
        self.dataset = dataset
        self._loader = DataLoader(dataset, batch_sampler=self.batch_sampler, **arguments)
        self._fetches_first = False
        self._begun_epoch: int | None = None  # in which a run was stopped while it fetched the first batch

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # As a generator it begins when the first batch is asked for, and by then Lightning has told the epoch.
        order = self.batch_sampler
        resumed, self._begun_epoch = order.begin() > 0 or self._begun_epoch == order.epoch, None
        self._fetches_first = order.given == 0
        for batch in self._pass(resumed):
            self._fetches_first = False
            order.given += order.ranks
            yield batch
        order.end()

    def _pass(self, resumed: bool) -> Iterable[Any]:
        if not resumed:
            return iter(self._loader)
        # torch draws a number for the workers when a pass begins; this pass drew it before it was stopped
        with torch.random.fork_rng(devices=[]):
            return iter(self._loader)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the batches of it that have been handed out, on all ranks together.

        It has `begun` too, where the first of them is being fetched, and torch has drawn its number for the pass; and
        `of`, the batches of a whole epoch; and `seed`, that of the order. After more than one pass in an epoch of the
        Trainer, beside a loader with more batches, it has the Trainer's epoch too (`told`).
        """
        order = self.batch_sampler
        begun = self._fetches_first or self._begun_epoch == order.epoch
        position = {"epoch": order.epoch, "batches": order.given, "of": order.batches_in_epoch, "seed": order.seed}
        if order.told not in (None, order.epoch):
            position["told"] = order.told
        return {**position, "begun": 1} if begun else position

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there with the next pass, on as many ranks as there are now."""
        order = self.batch_sampler
        now = order.batches_in_epoch
        before = state_dict.get("of", now)
        if 0 < state_dict["batches"] < before != now:
            warnings.warn(
                f"The checkpoint is from batch {state_dict['batches']} of an epoch of {before}, and the data make "
                f"{now} now (another `batch_size`, or other data), so some are seen twice in this epoch or not at all; "
                "go on with the same, or from a checkpoint of the end of an epoch.",
                stacklevel=2,
            )
        elif 0 < state_dict["batches"] < before and (seed := state_dict.get("seed", order.seed)) != order.seed:
            warnings.warn(
                f"The checkpoint is from within an epoch whose order was made with seed {seed}, and that of this run "
                f"is {order.seed}, so some of the data are seen twice in this epoch or not at all; go on with the same "
                "seed, or from a checkpoint of the end of an epoch.",
                stacklevel=2,
            )
        epoch, batches = state_dict["epoch"], state_dict["batches"]
        order.go_on(epoch, batches, state_dict.get("told", epoch), "begun" in state_dict)
        self._begun_epoch = order.epoch if "begun" in state_dict else None


def evaluation_loader(dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
    """A DataLoader over whose batches a model is evaluated; arguments as of `DataLoader`.

    A pass over it draws from a generator of its own the number that torch draws for the workers, and not from the one
    that dropout draws from: a run trains to the same weights however often it is evaluated.
    """
    return DataLoader(dataset, generator=torch.Generator(), **arguments)
