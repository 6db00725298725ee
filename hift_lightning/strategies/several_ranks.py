"""What strategies with several ranks have in common: what ranks have to agree on before a checkpoint is written."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from typing_extensions import override

from hift_lightning.engine.errors import ParkedStateError
from hift_lightning.engine.reduction import Ranks
from hift_lightning.strategies.checkpoints import BlockwiseCheckpoints

_PATIENCE = timedelta(seconds=30)
"""How long a rank that has failed waits for the others to come to an error too."""

_OF_RANKS = {"random_state": "random_states_of_ranks", "validated": "validated_of_ranks"}
"""Where a checkpoint's record has each rank's random numbers, by where it has one's own."""


class SeveralRanks(BlockwiseCheckpoints):
    """Mixed into a strategy with several ranks, it lets a checkpoint be of all of them or not be written at all.

    After an error the ranks may be at different places: one that fails alone would wait for ever for the others, which
    wait for it in a collective. So after an error ranks first find out whether all have come to one.
    """

    _ranks: Ranks
    _timeout: timedelta | None
    """Of Lightning's strategy."""
    _alone = False
    """Whether this rank has failed and others have not."""

    @property
    def _needs_all_ranks(self) -> bool:
        """Whether a checkpoint has something of every rank in it."""
        raise NotImplementedError

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if not hasattr(self, "_ranks"):  # called in every `fit` and `test`, and making groups is not for nothing
            self._ranks = Ranks(timeout=self._timeout)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._alone:  # the Trainer waits for the others after it has saved
            super().barrier(*args, **kwargs)

    @override
    def _make_ready(self, checkpoint: dict[str, Any]) -> None:
        self._alone = self._ending and not self._all_come()
        if self._alone:
            if self._needs_all_ranks:
                raise ParkedStateError(
                    "Each rank has a part of it, and not all have come to an error; go on from the last checkpoint."
                )
            super()._make_ready(checkpoint)
            return
        problem: ParkedStateError | None = None
        try:
            super()._make_ready(checkpoint)
        except ParkedStateError as error:
            problem = error
        told: list[str | None] = [None] * self._ranks.size
        dist.all_gather_object(told, problem and str(problem), group=self._ranks.host_group)
        if problem is not None:
            raise problem
        for rank, text in enumerate(told):
            if text is not None:
                raise ParkedStateError(f"On rank {rank}: {text}")
        record = checkpoint["hift"]["resume"]
        for own, all_ranks in _OF_RANKS.items():
            record[all_ranks] = [None] * self._ranks.size
            dist.all_gather_object(record[all_ranks], record[own], group=self._ranks.host_group)

    def _all_come(self) -> bool:
        try:
            dist.monitored_barrier(self._ranks.host_group, _PATIENCE)
        except RuntimeError:
            return False
        return True

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        record = checkpoint.get("hift", {}).get("resume", {})
        for own, all_ranks in _OF_RANKS.items():
            states = record.get(all_ranks, [])
            if len(states) == self._ranks.size:
                record[own] = states[self._ranks.rank]
        super().load_optimizer_state_dict(checkpoint)
