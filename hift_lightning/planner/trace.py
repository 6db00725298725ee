"""What is on the fake device, from one op to the next: bytes by role and phase, and FLOPs."""

import contextlib
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hift_lightning.engine.errors import ConfigurationError

Phase = Literal["forward", "backward", "update"]

ROLES = (
    "weights",
    "gathered weights",
    "gradients",
    "optimizer state",
    "masters",
    "window",
    "activations",
    "logits",
    "temporary",
)
"""What bytes on the device are for. ``gathered weights``: put together from the shards of all ranks; ``window``: the
memory through which `streamed` and `fused` page state and masters; ``logits``: floating-point tensors as wide as the
vocabulary; ``temporary``: what ops of backward and of the optimizer make for the moment."""


@dataclass(eq=False)
class _Allocation:
    nbytes: int
    role: str


@dataclass
class StepTrace:
    """One optimizer step. Bytes are those in use on the device."""

    peak_bytes: int = 0
    peak_phase: Phase = "forward"
    roles_at_peak: dict[str, int] = field(default_factory=dict)
    phase_peaks: dict[Phase, int] = field(default_factory=dict)
    role_peaks: dict[str, int] = field(default_factory=dict)
    """The most bytes of each role, which need not be at the moment of the peak."""
    timeline: list[tuple[Phase, dict[str, int]]] = field(default_factory=list)
    """Bytes of each role at the highest moment of each of some equal stretches of each phase, in order."""
    bytes_after: int = 0
    flops: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    """Bytes of the whole tensors that ranks have reduced, gathered or sent together, by the kind of the collective."""
    to_device_bytes: int = 0
    """Bytes that ops, not the engine's paging, have copied from the host."""
    to_host_bytes: int = 0
    """Bytes that ops, not the engine's paging, have copied to the host."""


COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
}
"""By the name of torch's op its kind, and which of its arguments is the whole tensor."""


class DeviceTrace(TorchDispatchMode):
    """Follows every allocation on a device while it is on, from the tensors that ops return.

    A number that is read from a tensor (`.item()`) is 1, since fake tensors have no values.

    Args:
        device: the device.
        vocabulary: last dimension of a tensor that counts as logits; `None` if nothing does.
    """

    def __init__(self, device: torch.device, vocabulary: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._vocabulary = vocabulary
        self._alive: dict[int, tuple[weakref.ref[Any], _Allocation]] = {}
        self._events: list[tuple[int, _Allocation, Phase]] = []
        self._at_begin: list[tuple[int, _Allocation]] = []
        self._flops = 0
        self._collectives: Counter[str] = Counter()
        self._copied: Counter[bool] = Counter()
        """Bytes by whether they went to the device."""
        self._role: str | None = None
        self.phase: Phase = "forward"

    def begin_step(self) -> None:
        """From here on an optimizer step runs."""
        self._events = []
        self._at_begin = [(allocation.nbytes, allocation) for _, allocation in self._alive.values()]
        self._flops = 0
        self._collectives = Counter()
        self._copied = Counter()

    def end_step(self) -> StepTrace:
        """What has been seen since `begin_step`."""
        trace = _replay(self._at_begin, self._events, self._flops)
        trace.collectives = dict(self._collectives)
        trace.to_device_bytes, trace.to_host_bytes = self._copied[True], self._copied[False]
        return trace

    def mark(self, tensors: Iterable[Tensor], role: str) -> None:
        """Say what tensors on the device are for, whenever they were made."""
        for tensor in tensors:
            if tensor.device == self._device:
                self._allocation(tensor).role = role

    def resized(self, tensor: Tensor) -> None:
        """Say that a tensor's memory has been given another size."""
        allocation = self._allocation(tensor)
        change = tensor.untyped_storage().nbytes() - allocation.nbytes
        allocation.nbytes += change
        self._events.append((change, allocation, self.phase))

    @contextlib.contextmanager
    def made_as(self, role: str) -> Iterator[None]:
        """Within it, what is made on the device has this role."""
        before, self._role = self._role, role
        try:
            yield
        finally:
            self._role = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._count_copy(func, args, kwargs)
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == self._device:
            # a host tensor whose value torch happens to know would really be copied there
            args = (torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
        try:
            result = func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1.0 if args[0].is_floating_point() else 1
        if func.namespace == "c10d" and (kind := COLLECTIVES.get(func._opname)):
            name, position = kind
            whole = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
            if any(tensor.device == self._device for tensor in whole):
                self._collectives[name] += sum(tensor.nbytes for tensor in whole)
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=result)
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            # `fake_device` is read, since `device` would be an op again
            if isinstance(leaf, FakeTensor) and leaf.fake_device == self._device:
                self._allocation(leaf)
        return result

    def _count_copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and isinstance(args[0], FakeTensor):
            goes = target == self._device
            if goes != (args[0].fake_device == self._device):
                self._copied[goes] += args[0].nbytes

    def _allocation(self, tensor: Tensor) -> _Allocation:
        if tensor.layout != torch.strided:
            raise ConfigurationError(
                "A tensor is sparse, as gradients of `nn.Embedding(sparse=True)` are, so its bytes depend on values in "
                "a batch, and there are none while planning; plan with `sparse=False`, which needs more."
            )
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return self._alive[key][1]
        allocation = _Allocation(storage.nbytes(), self._role or self._role_of(tensor))

        def freed(_: Any) -> None:
            del self._alive[key]
            self._events.append((-allocation.nbytes, allocation, self.phase))

        self._alive[key] = (weakref.ref(storage, freed), allocation)
        self._events.append((allocation.nbytes, allocation, self.phase))
        return allocation

    def _role_of(self, tensor: Tensor) -> str:
        wide = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary and tensor.is_floating_point()
        if wide and self.phase != "update":
            return "logits"
        return "activations" if self.phase == "forward" else "temporary"


_STRETCHES = 12
"""In which the timeline divides each phase."""


def _replay(
    at_begin: list[tuple[int, _Allocation]], events: list[tuple[int, _Allocation, Phase]], flops: int
) -> StepTrace:
    """Go through a step again, now that the role of each allocation is known."""
    trace = StepTrace(flops=flops)
    in_use = sum(nbytes for nbytes, _ in at_begin)
    ends = _ends_of_stretches(events)
    roles: Counter[str] = Counter()
    for nbytes, allocation in at_begin:
        roles[allocation.role] += nbytes
    role_peaks = roles.copy()
    highest, roles_at_highest = 0, roles.copy()
    for i, (change, allocation, phase) in enumerate(events):
        in_use += change
        roles[allocation.role] += change
        role_peaks[allocation.role] = max(role_peaks[allocation.role], roles[allocation.role])
        if in_use > highest:
            highest, roles_at_highest = in_use, roles.copy()
        trace.phase_peaks[phase] = max(trace.phase_peaks.get(phase, 0), in_use)
        if in_use > trace.peak_bytes:
            trace.peak_bytes, trace.peak_phase = in_use, phase
            trace.roles_at_peak = _in_order(roles)
        if i + 1 in ends:
            trace.timeline.append((phase, _in_order(roles_at_highest)))
            highest, roles_at_highest = in_use, roles.copy()
    trace.bytes_after = in_use
    trace.role_peaks = _in_order(role_peaks)
    return trace


def _ends_of_stretches(events: list[tuple[int, _Allocation, Phase]]) -> set[int]:
    ends: set[int] = set()
    start = 0
    for _, run in itertools.groupby(phase for _, _, phase in events):
        length = len(list(run))
        ends.update(start + -(-length * part // _STRETCHES) for part in range(1, _STRETCHES + 1))
        start += length
    return ends


def _in_order(roles: Mapping[str, int]) -> dict[str, int]:
    return {role: roles[role] for role in ROLES if roles.get(role)}
