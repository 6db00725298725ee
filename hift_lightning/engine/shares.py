"""Parked state split over the ranks of a machine: each keeps and updates its share, and gives away the new weights.

As in ZeRO-1 (Rajbhandari et al., https://arxiv.org/abs/1910.02054), but within the active block, whose parameters are
dealt out whole: the machine's memory holds all parked state and masters once, and not once for each rank.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from hift_lightning.engine.reduction import Ranks

_Value = TypeVar("_Value")


class Shares:
    """Which rank keeps the state of which parameter.

    The largest parameters are dealt out first, each to the rank that has the least so far, block by block: so a
    block's state is spread as evenly as its parameters' sizes let it, and the sum over blocks more so.

    Args:
        ranks: of one machine; all have the same blocks.
        blocks: the parameters of each.
    """

    def __init__(self, ranks: Ranks, blocks: Iterable[Sequence[nn.Parameter]]) -> None:
        self._ranks = ranks
        self._keeper: dict[nn.Parameter, int] = {}
        kept = [0] * ranks.size
        for parameters in blocks:
            in_block = [0] * ranks.size
            for parameter in sorted(parameters, key=lambda p: -p.numel()):
                keeper = min(range(ranks.size), key=lambda rank: (in_block[rank], kept[rank]))
                self._keeper[parameter] = keeper
                in_block[keeper] += parameter.numel()
                kept[keeper] += parameter.numel()

    def keeps(self, parameter: nn.Parameter) -> bool:
        """Whether the state of a parameter is kept, and the parameter updated, by this rank."""
        return self._keeper[parameter] == self._ranks.rank

    def spread(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all ranks the weights of the ranks that have updated them; called by all of them together."""
        for rank, kept in self._by_keeper(parameters).items():
            self._ranks.send_from(rank, [parameter.detach() for parameter in kept])

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
        group, rank = self._ranks.telling, self._ranks.rank
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

    def _by_keeper(self, parameters: Iterable[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
        kept: dict[int, list[nn.Parameter]] = {rank: [] for rank in range(self._ranks.size)}
        for parameter in parameters:
            kept[self._keeper[parameter]].append(parameter)
        return kept
