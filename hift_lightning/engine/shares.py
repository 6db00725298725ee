"""Parked state split over the ranks of a machine: each keeps and updates its share, and gives away the new weights.

As in ZeRO-1 (Rajbhandari et al., https://arxiv.org/abs/1910.02054), but within the active block, whose parameters are
dealt out whole: the machine's memory holds all parked state and masters once, and not once for each rank.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from hift_lightning.engine.elementwise import probe
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.reduction import Ranks
from hift_lightning.engine.state_dicts import saved_ids

_Value = TypeVar("_Value")


class Shares:
    """Which rank keeps the state of which parameter.

    The largest parameters are dealt out first, each to the rank that has the least so far, block by block: so a
    block's state is spread as evenly as its parameters' sizes let it, and the sum over blocks more so.

    Args:
        ranks: of one machine; all have the same blocks. ``None``: nothing is split, and this process keeps all.
        blocks: the parameters of each.
    """

    def __init__(self, ranks: Ranks | None, blocks: Iterable[Sequence[nn.Parameter]]) -> None:
        self._ranks = ranks
        self._rank, self._size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._keeper: dict[nn.Parameter, int] = {}
        kept = [0] * self._size
        for parameters in blocks:
            in_block = [0] * self._size
            for parameter in sorted(parameters, key=lambda p: -p.numel()):
                keeper = min(range(self._size), key=lambda rank: (in_block[rank], kept[rank]))
                self._keeper[parameter] = keeper
                in_block[keeper] += parameter.numel()
                kept[keeper] += parameter.numel()

    def keeps(self, parameter: nn.Parameter) -> bool:
        """Whether the state of a parameter is kept, and the parameter updated, by this rank."""
        return self._keeper[parameter] == self._rank

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise unless the optimizer comes to the same when ranks step a share of the parameters each.

        It is tried on parameters that this rank keeps: of the others an optimizer may lack the state that it needs.

        Raises:
            ConfigurationError: if it does not treat parameters one by one.
        """
        if self._size == 1:
            return
        for group in optimizer.param_groups:
            kept = next((p for p in group["params"] if p in self._keeper and self.keeps(p)), None)
            if kept is not None and not probe(optimizer, kept, kept.dtype).separate:
                raise ConfigurationError(
                    f"The optimizer `{type(optimizer).__name__}` could not be shown to treat parameters one by one, "
                    "and ranks that each update a share of them might change the result; use "
                    "`shard_parked_state=False`."
                )

    def spread(self, parameters: Collection[nn.Parameter]) -> None:
        """Give all ranks the weights of the ranks that have updated them; called by all of them together."""
        if self._size == 1:
            return
        assert self._ranks is not None
        for rank in range(self._size):
            self._ranks.send_from(rank, [p.detach() for p in parameters if self._keeper[p] == rank])

    def gather(
        self, parameters: Iterable[nn.Parameter], value_of: Callable[[nn.Parameter], _Value]
    ) -> Iterator[tuple[nn.Parameter, _Value]]:
        """Bring together on the first rank what each rank keeps, one parameter at a time; called by all together.

        Args:
            parameters: in the same order on all ranks.
            value_of: gives what this rank keeps of one of its own; tensors in host memory, primitives and containers.

        Yields:
            On the first rank every parameter with its value; on the others those of their own share.
        """
        rank, group = self._rank, None if self._ranks is None else self._ranks.host_group
        for parameter in parameters:
            keeper = self._keeper[parameter]
            if keeper == rank:
                value = value_of(parameter)
                if rank != 0:
                    dist.send_object_list([value], group=group, group_dst=0)
                yield parameter, value
            elif rank == 0:
                received: list[Any] = [None]
                dist.recv_object_list(received, group=group, group_src=keeper)
                yield parameter, received[0]

    def gather_state(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Make an optimizer's state dict whole on the first rank; called by all together.

        Args:
            optimizer: of this rank.
            state_dict: what its ``state_dict()`` gave.
        """
        state, ids = dict(state_dict["state"]), saved_ids(optimizer, state_dict)
        for parameter, value in self.gather(self._keeper, lambda p: state.get(ids[p])):
            if value is not None:
                state[ids[parameter]] = value
        return {**state_dict, "state": state}

    def own_part(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A whole state dict without the state that other ranks keep; arguments as of :meth:`gather_state`."""
        ids = saved_ids(optimizer, state_dict)
        kept_elsewhere = {ids[parameter] for parameter in self._keeper if not self.keeps(parameter)}
        state = {key: value for key, value in state_dict["state"].items() if key not in kept_elsewhere}
        return {**state_dict, "state": state}
