"""Several processes that train one model together: what they agree on, and how gradients are averaged.

Every process (a *rank*) has the whole model and its own batches. In a backward pass whose gradients are to be averaged
each rank makes the same collectives in the same order, whatever its loss depends on:

1. the *opening*, begun with the first gradient: each rank tells which update it is at, and of which plan. A rank that
   is elsewhere is an error on all ranks, before a bucket of another size could hang them;
2. one all-reduce per *bucket* of the active block's gradients, each begun as soon as its last gradient is there and the
   bucket before it has begun. The order is that in which rank 0 had the gradients at the block's last visit; at the
   first one, the reverse of the parameters';
3. the *closing*: each rank tells in which order its parameters had a gradient, and whether its loss was finite.

What ranks tell are a few integers in host memory, so no rank waits for its device to read them. Gradients that a rank
does not have count as zero; a parameter that had none on any rank gets none.

Follows the order of buckets in Li et al., "PyTorch Distributed", https://arxiv.org/abs/2006.15704, section 3.2.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hift_lightning.engine.errors import ConfigurationError

_KINDS = (None, "NaN", "inf")


class Ranks:
    """The processes that train together.

    Args:
        group: a process group of torch; ``None`` for the default one. All its ranks build this object together.
        timeout: how long a rank waits for the others in what is sent from host memory; ``None`` for torch's default.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: timedelta | None = None) -> None:
        group = group or dist.group.WORLD
        assert group is not None
        self.group = group
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        # where gloo is one of several backends of a group, `monitored_barrier` does not take it
        config = dist.get_backend_config(self.group)
        in_host_memory = "cpu:" in config and ("cpu:gloo" not in config or dist.get_backend(self.group) == "gloo")
        members = dist.get_process_group_ranks(self.group)
        self.host_group = (
            self.group
            if in_host_memory
            else dist.new_group(members, timeout, backend="gloo", use_local_synchronization=True)
        )
        """The same ranks, for what lies in host memory."""

    def tell(self, *numbers: int) -> "Told":
        """Tell all other ranks a few integers, and begin to hear theirs.

        Args:
            numbers: as many on every rank.
        """
        own = torch.tensor(numbers, dtype=torch.int64)
        heard = [own.clone() for _ in range(self.size)]
        work = dist.all_gather(heard, own, group=self.host_group, async_op=True)
        assert work is not None
        return Told(work, heard)

    def send_from(self, rank: int, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors on all ranks with those of one; in place.

        Args:
            rank: within the group, whose tensors count.
            tensors: of the same shapes and dtypes on every rank.
        """
        under_way = []
        for tensor in tensors:
            dense = tensor.contiguous()  # backends send nothing else
            group = self.host_group if tensor.device.type == "cpu" else self.group
            under_way.append((tensor, dense, dist.broadcast(dense, group=group, group_src=rank, async_op=True)))
        for tensor, dense, work in under_way:
            assert work is not None
            work.wait()
            if dense is not tensor:
                tensor.copy_(dense)


class Told:
    """What every rank has told.

    Args:
        work: the collective that is under way.
        heard: where it puts the numbers of each rank.
    """

    def __init__(self, work: dist.Work, heard: list[Tensor]) -> None:
        self._work = work
        self._heard = heard

    def by_rank(self) -> list[list[int]]:
        """Wait for the numbers of each rank, and return them in the order of the ranks."""
        self._work.wait()
        return [numbers.tolist() for numbers in self._heard]


@dataclass
class _Bucket:
    parameters: list[nn.Parameter] = field(default_factory=list)
    waiting: set[nn.Parameter] = field(default_factory=set)
    """Those whose gradient this backward has not made yet."""
    flat: Tensor | None = None
    """What is being averaged, from the moment when it began."""
    work: dist.Work | None = None


@dataclass(frozen=True)
class Closing:
    """What all ranks know at the end of a backward pass."""

    backward_ran: bool
    """Whether any rank has gone back through a loss since the last update."""
    nonfinite_loss: tuple[int, str] | None
    """The first rank whose loss has NaN or inf, with ``"NaN"`` or ``"inf"``."""


class GradientReduction:
    """Averages the active block's gradients over the ranks, beside the backward pass that makes them.

    No buffer is larger than ``bucket_bytes``; a gradient of at least that size is averaged where it lies.

    Args:
        ranks: which average.
        bucket_bytes: gradients of so many bytes are sent together.
        deliver: for an update inside backward, else ``None``: called with each parameter when its gradient is the
            average, in the same order on every rank. Then every parameter is a bucket of its own, which is waited for
            when the next one has begun, or at the end.
    """

    def __init__(self, ranks: Ranks, bucket_bytes: int, deliver: Callable[[nn.Parameter], None] | None) -> None:
        self._ranks = ranks
        self._bucket_bytes = bucket_bytes
        self._deliver = deliver
        self.orders: dict[int, list[int]] = {}
        """For each block that has been visited, its parameters in the order in which rank 0 had their gradients."""
        self._position = (0, 0)
        self._block = 0
        self._parameters: list[nn.Parameter] = []
        self._lay_out()
        self.bytes_sent = 0
        """Bytes of gradients that this rank has given to all-reduces so far."""

    def expect(self, block: int, parameters: Sequence[nn.Parameter], update: int, plan: int) -> None:
        """Make ready for the backward passes of a step.

        Args:
            block: index of the active block.
            parameters: what is active with it.
            update: updates performed so far.
            plan: a number that another plan of blocks would not have.
        """
        self._position = (update, plan)
        self._block = block
        self._parameters = list(parameters)
        self._lay_out()

    def ready(self, parameter: nn.Parameter) -> None:
        """Take in that the gradient of a parameter is complete on this rank.

        Raises:
            ConfigurationError: if it is a sparse one, or the second one before averages are taken.
            RuntimeError: if the ranks are not at the same update of the same plan.
        """
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            raise ConfigurationError(
                f"A parameter of shape {tuple(parameter.shape)} has a sparse gradient, and gradients are averaged over "
                "ranks densely; make its embedding with `sparse=False`."
            )
        if parameter in self._made:
            raise ConfigurationError(
                f"A parameter of shape {tuple(parameter.shape)} has a gradient for the second time before the first "
                "has been averaged over the ranks; go back through the sum of the losses, or take `manual_backward` "
                "(in a plain loop `after_backward` after each backward pass)."
            )
        self._open()
        self._made[parameter] = len(self._made) + 1
        self._bucket_of[parameter].waiting.discard(parameter)
        while self._begun < len(self._buckets) and not self._buckets[self._begun].waiting:
            self._begin_next()
            if self._deliver is not None and self._begun - self._delivered > 1:
                self._deliver_next()

    def finish(self, backward_ran: bool, nonfinite_loss: str | None) -> Closing:
        """Average what is left, and wait for all of it.

        Args:
            backward_ran: whether this rank has gone back through a loss since the last update.
            nonfinite_loss: ``"NaN"`` or ``"inf"``, if a loss of this rank had it.

        Raises:
            RuntimeError: if the ranks are not at the same update of the same plan.
        """
        self._open()
        later = len(self._parameters) + 1
        turns = [self._made.get(p, 0 if p.grad is None else later) for p in self._parameters]
        while self._begun < len(self._buckets):
            self._begin_next()
        closing = self._ranks.tell(backward_ran, _KINDS.index(nonfinite_loss), *turns).by_rank()
        used = {parameter for i, parameter in enumerate(self._parameters) if any(told[2 + i] for told in closing)}
        while self._delivered < len(self._buckets):
            self._deliver_next(used)
        of_rank_0 = closing[0][2:]
        if any(of_rank_0):
            self.orders[self._block] = sorted(range(len(turns)), key=lambda i: of_rank_0[i] or later)
        self._lay_out()
        return Closing(
            backward_ran=any(told[0] for told in closing),
            nonfinite_loss=next(((rank, kind) for rank, told in enumerate(closing) if (kind := _KINDS[told[1]])), None),
        )

    def give_up(self) -> None:
        """Forget a backward pass that failed on this rank; the others fail when they wait for it."""
        self._lay_out()

    def _lay_out(self) -> None:
        self._opening: Told | None = None
        self._made: dict[nn.Parameter, int] = {}  # when, counted from 1
        self._buckets: list[_Bucket] = []
        self._begun = self._delivered = 0
        kind, room = None, 0
        order = self.orders.get(self._block) or range(len(self._parameters) - 1, -1, -1)
        for parameter in (self._parameters[i] for i in order):
            if self._deliver is not None or kind != (parameter.device, parameter.dtype) or parameter.nbytes > room:
                self._buckets.append(_Bucket())
                kind, room = (parameter.device, parameter.dtype), self._bucket_bytes
            self._buckets[-1].parameters.append(parameter)
            self._buckets[-1].waiting.add(parameter)
            room -= parameter.nbytes
        self._bucket_of = {parameter: bucket for bucket in self._buckets for parameter in bucket.parameters}

    def _open(self) -> None:
        if self._opening is None:
            self._opening = self._ranks.tell(*self._position)

    def _begin_next(self) -> None:
        if self._begun == 0:
            assert self._opening is not None
            self._check(self._opening.by_rank())
        bucket = self._buckets[self._begun]
        gradients = [
            torch.zeros_like(p, memory_format=torch.contiguous_format) if p.grad is None else p.grad.contiguous()
            for p in bucket.parameters
        ]
        alone = len(gradients) == 1
        bucket.flat = gradients[0] if alone else torch.cat([gradient.view(-1) for gradient in gradients])
        bucket.flat.div_(self._ranks.size)
        bucket.work = dist.all_reduce(bucket.flat, group=self._ranks.group, async_op=True)
        self.bytes_sent += bucket.flat.nbytes
        self._begun += 1

    def _deliver_next(self, used: Collection[nn.Parameter] | None = None) -> None:
        """Wait for a bucket; parameters that had a gradient on no rank are not in ``used``."""
        bucket = self._buckets[self._delivered]
        assert bucket.work is not None
        assert bucket.flat is not None
        bucket.work.wait()
        averages = torch.split(bucket.flat.view(-1), [parameter.numel() for parameter in bucket.parameters])
        for parameter, average in zip(bucket.parameters, averages, strict=True):
            if used is not None and parameter not in used:
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            if parameter.grad is not bucket.flat:
                parameter.grad.copy_(average.view_as(parameter))
            if self._deliver is not None:
                self._deliver(parameter)
        bucket.flat = bucket.work = None
        self._delivered += 1

    def _check(self, positions: list[list[int]]) -> None:
        if all(position == positions[0] for position in positions):
            return
        where = "; ".join(f"rank {rank}: update {update + 1}" for rank, (update, _) in enumerate(positions))
        plans = "" if len({plan for _, plan in positions}) == 1 else ", and their plans of blocks differ"
        raise RuntimeError(
            f"The ranks are not at the same step ({where}{plans}), so they would average gradients of different "
            "blocks; let every rank load the same checkpoint and make the same optimizer steps."
        )
