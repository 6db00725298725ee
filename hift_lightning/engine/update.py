"""How the active block is stepped: with all its state on the device, or piece by piece through a window.

A *piece* is a parameter, or some of its rows. Pieces are stepped by the user's optimizer, untouched: its param groups
hold just them for the time of a call. The result equals that of one step over the whole block bit for bit, because
torch's optimizers treat parameters one by one; rows are cut only where that has been tried out (``elementwise.py``).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hift_lightning.engine.elementwise import Probe, TrialFailed, number_of_group, probe, raw_step
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.masters import follow_weights
from hift_lightning.engine.optimizers import parameters_in
from hift_lightning.engine.prefetch import StatePrefetch
from hift_lightning.engine.residency import Place, Residency
from hift_lightning.engine.shards import local, mesh_of
from hift_lightning.engine.state_tensors import state_tensors
from hift_lightning.engine.streams import SideStream
from hift_lightning.engine.tiers import ALL_ROWS, dense_strides, has_rows_in_memory

_ALIGNMENT = 64
"""Elements, and bytes: rows are cut where vectorized kernels begin anew, so that each element is computed as before."""

_SLACK = 16 * _ALIGNMENT
"""Bytes kept free for the alignment of the tensors of a piece."""


@dataclass(frozen=True)
class Piece:
    """Rows of a parameter that are stepped together."""

    parameter: nn.Parameter
    rows: slice
    last: bool
    """Whether these are the parameter's last rows."""

    @property
    def whole(self) -> bool:
        """Whether it is the whole parameter."""
        return self.rows == ALL_ROWS


class _Loaded(NamedTuple):
    """A piece on the device."""

    piece: Piece
    weights: nn.Parameter
    """What the optimizer steps: the piece's weights, or the rows of their master."""
    state: Any


class WholeUpdate:
    """Pages in all state of the parameters and leaves the step to the optimizer's own call, which follows.

    Args:
        residency: where state is parked.
    """

    uses_gradients_up = False
    """As :attr:`PieceUpdate.uses_gradients_up`; here the optimizer's own call does."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._prefetch = StatePrefetch(residency)
        self._loading_ms = 0.0
        self.held_bytes = 0
        """As :attr:`PieceUpdate.held_bytes`, which counts pieces; here are none."""
        self.in_last_backward = self._prefetch.allowed
        """To be entered for the last backward before a step, in which state may come beside it."""

    def take_loading_ms(self) -> float:
        """As :meth:`PieceUpdate.take_loading_ms`."""
        spent, self._loading_ms = self._loading_ms, 0.0
        return spent

    def hooks_of(self, parameter: nn.Parameter) -> list[Callable[[Tensor], None]]:
        """What to call when the parameter's gradient is there."""
        return [self._prefetch.page_in] if self._prefetch.applies_to(parameter) else []

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make the optimizer's own call possible."""
        started = time.perf_counter()
        self._prefetch.update_begins()
        self._residency.page_in(parameters)
        self._prefetch.join()
        self._loading_ms += (time.perf_counter() - started) * 1000

    def give_up(self) -> None:
        """Forget the step in progress."""
        self._loading_ms = 0.0
        self._prefetch.give_up()


class PieceUpdate:
    """Steps parameters piece by piece, with state and master weights paged in for a piece at a time.

    Args:
        optimizer: the user's.
        residency: where state and masters are parked.
        window: bytes of state and master weights that may be on the device, the prefetched ones included; ``None``:
            those of all parameters given, in one call of the optimizer.

    Raises:
        ConfigurationError: if the optimizer is a wrapper of another one; while stepping, if it does not treat
            parameters one by one, or the state of a tensor that cannot be cut does not fit the window.
    """

    uses_gradients_up = True
    """Whether no gradient is left after :meth:`step`, for the optimizer's own call and for other hooks."""

    def __init__(self, optimizer: Optimizer, residency: Residency, window: int | None) -> None:
        if not hasattr(type(optimizer).step, "__wrapped__"):  # which torch gives the class of every optimizer
            raise ConfigurationError(
                f"`{type(optimizer).__name__}` wraps another optimizer, and parameters are stepped one by one "
                "here; give HiFT the optimizer that it wraps (with Fabric the one that `fabric.setup` was given)."
            )
        self.optimizer = optimizer
        self.residency = residency
        self.window = window
        self._probes: dict[tuple[int, torch.device, torch.dtype], Probe] = {}
        self._checked: set[nn.Parameter] = set()
        self._sides: dict[torch.device, SideStream] = {}
        self._loading_ms = 0.0
        self.held_bytes = 0
        """Most bytes of state and masters that were on the device at one time since this was last set to 0."""

    def in_last_backward(self) -> contextlib.AbstractContextManager[None]:
        """State comes with its piece, and not beside backward."""
        return contextlib.nullcontext()

    def hooks_of(self, parameter: nn.Parameter) -> list[Callable[[Tensor], None]]:
        """None: see :meth:`in_last_backward`."""
        return []

    def give_up(self) -> None:
        """Forget the step in progress."""
        self._loading_ms = 0.0

    def take_loading_ms(self) -> float:
        """Milliseconds that the host has spent on paging in since this was last asked."""
        spent, self._loading_ms = self._loading_ms, 0.0
        return spent

    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Update the parameters from their gradients, which are freed: the optimizer's own call has nothing to do."""
        with_gradient = [p for p in parameters if p.grad is not None]
        if self.window is None:
            for parameter in with_gradient:
                self._refuse_what_is_kept_apart(parameter)
            self._step([self._load(Piece(p, ALL_ROWS, last=True), None) for p in with_gradient])
        else:
            self._stream([piece for p in with_gradient for piece in self._cut(p, self.window)], self.window)

    def check_shards(self) -> None:
        """Raise unless the optimizer may be stepped on this rank's rows of a parameter; it is tried out.

        Raises:
            ConfigurationError: if it does not treat each element by itself.
        """
        for parameter in parameters_in(self.optimizer):
            if mesh_of([parameter]) is not None and not self._probe(parameter).elementwise:
                raise ConfigurationError(
                    f"The optimizer `{type(self.optimizer).__name__}` does not treat each element of a weight by "
                    "itself, so stepping each rank's rows would change the result; use `strategy='hift_ddp'`, where "
                    "every rank has whole weights, or an optimizer such as AdamW."
                )

    def _refuse_what_is_kept_apart(self, parameter: nn.Parameter) -> None:
        if parameter in self._checked or _is_sparse(parameter.grad):
            return
        self._checked.add(parameter)
        try:
            self_contained = self._probe(parameter).self_contained
        except TrialFailed:  # which says nothing of this, and parameters are stepped whole and together
            return
        if not self_contained:
            raise ConfigurationError(
                f"The optimizer `{type(self.optimizer).__name__}` does not come to the same where masters are stepped "
                "in place of the weights, as one does not that keeps a counter or tensors outside of its `state` of a "
                "parameter and the settings of a param group; keep them there, or drop `master_weights`."
            )

    def _cut(self, parameter: nn.Parameter, window: int) -> list[Piece]:
        whole = [Piece(parameter, ALL_ROWS, last=True)]
        if _is_sparse(parameter.grad):  # which has no rows to cut
            return whole
        trial = self._probe(parameter)
        if not trial.separate:
            raise ConfigurationError(
                f"The optimizer `{type(self.optimizer).__name__}` could not be shown to treat parameters one by one, "
                "and stepping them so might change the result; use `update='block'`."
            )
        if not self.residency.copies(parameter):
            return whole
        if not self._has_rows_to_cut(parameter, trial):
            if (needed := _in_window(self._bytes(whole[0]))) > window:
                raise ConfigurationError(
                    f"The optimizer `{type(self.optimizer).__name__}` cannot be stepped on parts of a tensor of shape "
                    f"{tuple(parameter.shape)}, whose state takes {needed:,} bytes of a window; use a `window` of at "
                    "least that."
                )
            return whole
        all_rows = local(parameter).shape[0]
        rows = self._rows_in_half(parameter, trial.state_bytes, window)
        if rows >= all_rows:
            return whole
        starts = range(0, all_rows, rows)
        return [Piece(parameter, slice(i, i + rows), last=i + rows >= all_rows) for i in starts]

    def _has_rows_to_cut(self, parameter: nn.Parameter, trial: Probe) -> bool:
        weights = local(parameter)
        if not trial.elementwise or weights.dim() == 0 or weights.numel() == 0:
            return False
        group = self.optimizer.param_groups[number_of_group(self.optimizer, parameter)]
        return not group.get("fused") or has_rows_in_memory(weights)

    def _rows_in_half(self, parameter: nn.Parameter, state_bytes: int, window: int) -> int:
        """How many rows fit into half of the window, which holds two pieces; `state_bytes` are those of an element."""
        weights = local(parameter)
        all_rows = weights.shape[0]
        row = weights.numel() // all_rows
        master_bytes = torch.float32.itemsize if self.residency.has_master(parameter) else 0
        bytes_of_row = row * (state_bytes + master_bytes)
        half = window // 2 // _ALIGNMENT * _ALIGNMENT
        rows = (half - _SLACK) // max(bytes_of_row, 1)
        if rows < 1:
            raise ConfigurationError(
                f"One row of a tensor of shape {tuple(parameter.shape)} has {bytes_of_row:,} bytes of state, and a "
                f"`window` of {window:,} bytes holds two pieces of {half:,}; use a window of at least "
                f"{2 * _in_window(bytes_of_row):,} bytes."
            )
        together = _ALIGNMENT // math.gcd(row, _ALIGNMENT)
        return rows - rows % together if together < rows < all_rows else rows

    def _probe(self, parameter: nn.Parameter) -> Probe:
        dtype = torch.float32 if self.residency.has_master(parameter) else parameter.dtype
        key = (number_of_group(self.optimizer, parameter), parameter.device, dtype)
        if key not in self._probes:
            self._probes[key] = probe(self.optimizer, parameter, dtype, self.residency.parked_dtype)
        return self._probes[key]

    def _bytes(self, piece: Piece) -> int:
        """Bytes that the piece's parked tensors take on the device."""
        share = 1.0
        if not piece.whole:
            all_rows = local(piece.parameter).shape[0]
            share = len(range(*piece.rows.indices(all_rows))) / all_rows
        whole = self.residency.device_bytes(piece.parameter)
        if self.residency.has_master(piece.parameter):
            whole += local(piece.parameter).numel() * torch.float32.itemsize
        return math.ceil(whole * share)

    def _stream(self, pieces: list[Piece], window: int) -> None:
        if not pieces:
            return
        device = pieces[0].parameter.device
        # one for all updates: what is converted on the way to the device lies in memory of this stream's own
        if device not in self._sides:
            self._sides[device] = SideStream(device)
        side = self._sides[device]
        arena = _Arena(self.residency, device, max(map(self._bytes, pieces)), window, len(pieces))
        self.held_bytes = max(self.held_bytes, arena.nbytes)
        loaded = self._load(pieces[0], arena.place(0))
        for turn, following in enumerate([*pieces[1:], None], start=1):
            current = loaded
            try:
                if following is not None and arena.holds_two:
                    with side.copying():
                        loaded = self._load(following, arena.place(turn))
                self._step([current])
            finally:  # the next user of this memory may come after an error too
                side.join()
            if following is not None and not arena.holds_two:
                loaded = self._load(following, arena.place(turn))

    def _load(self, piece: Piece, place: Place | None) -> _Loaded:
        started = time.perf_counter()
        state = self.residency.load(piece.parameter, piece.rows, place)
        if self.residency.has_master(piece.parameter):
            weights = self.residency.load_master(piece.parameter, piece.rows, place)
        else:
            weights = _rows_of(piece)
        self._loading_ms += (time.perf_counter() - started) * 1000
        return _Loaded(piece, nn.Parameter(weights), state)

    def _step(self, loaded: list[_Loaded]) -> None:
        for piece, weights, state in loaded:
            assert piece.parameter.grad is not None
            gradient = local(piece.parameter.grad)
            weights.grad = (gradient if piece.whole else gradient[piece.rows]).to(weights.dtype)
            if self.residency.has_master(piece.parameter):
                follow_weights(weights.detach(), _rows_of(piece))
            if state:
                self.optimizer.state[weights] = state
        try:
            with self._only([(number_of_group(self.optimizer, one.piece.parameter), one.weights) for one in loaded]):
                raw_step(self.optimizer)
        except BaseException:
            for _, weights, _ in loaded:
                self.optimizer.state.pop(weights, None)
            raise
        self._count_held(loaded)
        for piece, weights, _ in loaded:
            parameter = piece.parameter
            weights.grad = None
            if self.residency.has_master(parameter):
                _rows_of(piece).copy_(weights.detach())
                self.residency.store_master(parameter, weights.detach(), piece.rows, last=piece.last)
            if state := self.optimizer.state.pop(weights, None):
                self.residency.store(parameter, state, piece.rows, last=piece.last)
            if piece.last:
                parameter.grad = None

    def _count_held(self, loaded: list[_Loaded]) -> None:
        held = 0
        for piece, weights, _ in loaded:
            held += sum(tensor.nbytes for tensor in state_tensors(self.optimizer.state.get(weights, {})))
            if self.residency.has_master(piece.parameter):
                held += weights.nbytes
        # a CPU computes on what is parked as it is, and has no need of the window
        self.held_bytes = max(self.held_bytes, held if self.window is None else min(held, self.window))

    @contextlib.contextmanager
    def _only(self, members: list[tuple[int, nn.Parameter]]) -> Iterator[None]:
        """Within it, the optimizer's param groups hold these parameters only."""
        groups = self.optimizer.param_groups
        before = [group["params"] for group in groups]
        for i, group in enumerate(groups):
            group["params"] = [parameter for index, parameter in members if index == i]
        try:
            yield
        finally:
            for group, parameters in zip(groups, before, strict=True):
                group["params"] = parameters


def _in_window(nbytes: int) -> int:
    """Bytes of a window that a piece takes whose tensors have so many."""
    return _aligned(nbytes + _SLACK)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout != torch.strided


def _rows_of(piece: Piece) -> Tensor:
    weights = local(piece.parameter).detach()
    return weights if piece.whole else weights[piece.rows]


class _Arena:
    """The window's memory on the device: one allocation, in which pieces take turns.

    It holds two pieces where the window allows, so that one is copied in while the other is stepped, on a stream of its
    own where the device has streams.
    """

    def __init__(self, residency: Residency, device: torch.device, piece_bytes: int, window: int, pieces: int) -> None:
        self._piece_bytes = _in_window(piece_bytes)
        self.holds_two = pieces > 1 and 2 * self._piece_bytes <= window
        self._memory: Tensor | None = None
        if device.type != "cpu" and piece_bytes > 0:  # otherwise nothing is copied, or nothing is parked yet
            self._memory = residency.window(self._piece_bytes * (1 + self.holds_two), device)

    @property
    def nbytes(self) -> int:
        """What it takes on the device."""
        return 0 if self._memory is None else self._memory.nbytes

    def place(self, turn: int) -> Place | None:
        """A function that copies host tensors, one after the other, into the part whose turn it is."""
        if self._memory is None:
            return None
        memory = self._memory
        position = self._piece_bytes * (turn % 2 if self.holds_two else 0)

        def copy_in(source: Tensor, dtype: torch.dtype) -> Tensor:
            nonlocal position
            nbytes = source.numel() * dtype.itemsize
            target = memory[position : position + nbytes].view(dtype).as_strided(source.shape, dense_strides(source))
            position += _aligned(nbytes)
            return target.copy_(source, non_blocking=True)

        return copy_in
