"""Where optimizer state and master weights are: on the compute device while they are used, parked otherwise.

The optimizer's own ``state`` always holds the tensors that count: parked ones are simply host tensors in it, so
``optimizer.state_dict()`` needs no help from here. Nothing in this file knows an optimizer by name.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.shards import local
from hift_lightning.engine.state_dicts import casts_by_itself, in_own_form, saved_ids
from hift_lightning.engine.state_tensors import flatten_state, is_quantized, state_tensors
from hift_lightning.engine.streams import device_module
from hift_lightning.engine.tiers import ALL_ROWS, Buffer, make_tier

# fp16 is not among them: its smallest number is far above Adam's second moments
PARKED_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}

Place = Callable[[Tensor, torch.dtype], Tensor]
"""Puts a host tensor on the device, in a dtype."""


def check_parked_dtype(parked_dtype: str | None) -> None:
    """Raise if parked moments cannot be kept in this dtype.

    Args:
        parked_dtype: ``"float32"``, ``"bfloat16"``, or ``None`` for that of the state itself.

    Raises:
        ConfigurationError: for any other value.
    """
    if not isinstance(parked_dtype, str | None) or parked_dtype not in PARKED_DTYPES:
        names = ", ".join(str(name) for name in PARKED_DTYPES)
        raise ConfigurationError(f"`parked_dtype={parked_dtype!r}` is not a dtype to park in; choose one of {names}.")


class _ParkedLeaf(NamedTuple):
    buffer: Buffer
    dtype: torch.dtype
    """Of the tensor on the device; the buffer's may be narrower."""


class Residency:
    """Pages optimizer state and master weights in, and parks them again.

    Parking copies each tensor into a buffer that is allocated once and used again at every later visit. Copies are
    issued on the device's current stream, in the order of the kernels that use them, and nothing waits for them until
    the host reads the state (:meth:`synchronize`). On a CPU device with ``offload="cpu"`` nothing is copied,
    unless ``parked_dtype`` is another one.

    Until a parameter's state is parked again, its last parked state is kept, so a step that fails can be given up
    (:meth:`discard`).

    Args:
        optimizer: any :class:`torch.optim.Optimizer`. State that it has already built (Adagrad builds all of it in its
            constructor) or that is loaded later counts as parked.
        offload: see :func:`~hift_lightning.engine.tiers.check_offload`.
        parked_dtype: see :func:`check_parked_dtype`; zero-dimensional, integer, quantized and sparse
            state keeps its own.

    Raises:
        ConfigurationError: if a value cannot work.
    """

    def __init__(self, optimizer: Optimizer, offload: str | Path = "cpu", parked_dtype: str | None = None) -> None:
        check_parked_dtype(parked_dtype)
        self.optimizer = optimizer
        self._parks_state = offload != "none"
        """Whether state leaves the device; masters do in any case."""
        self.bytes_paged_in = 0
        """Bytes copied from host to device so far."""
        self.bytes_parked = 0
        """Bytes copied from device to host so far."""
        self._tier = make_tier(offload)
        self.parked_dtype = PARKED_DTYPES[parked_dtype]
        """Of moments in :attr:`~torch.optim.Optimizer.state` while they are parked; ``None``: their own."""
        self._parked_leaves: dict[Tensor, list[_ParkedLeaf | None]] = {}
        """Where each leaf of a parameter's state is parked, also while it is paged in; ``None`` for one that is not."""
        self._parked: set[Tensor] = set()
        self._last_parked: dict[Tensor, Any] = {}
        """The state of parameters that are paged in, as it was before."""
        self._with_master: set[Tensor] = set()
        """Parameters that are stepped through a master, which may be made in their first update only."""
        self._masters: dict[Tensor, Buffer] = {}
        self._unfinished_masters: dict[Tensor, Buffer] = {}
        """Masters of which not all rows have been parked yet, in a parameter's first update."""
        self._copying_from: set[torch.device] = set()
        self.adopt_state()

    def adopt_state(self) -> list[nn.Parameter]:
        """Take state that this class has not parked itself (built early, or loaded) as parked.

        It moves to its tier. Zero-dimensional tensors (Adam's ``step``) stay in host memory for good unless the
        optimizer wants them on the device (``capturable`` or ``fused``), as in
        :meth:`torch.optim.Optimizer.load_state_dict`, or they are moments of a parameter without dimensions.

        Returns:
            The parameters whose state has come in 16 bits and will step fp32 masters, with something in it already.
        """
        self.synchronize()
        known_before, self._parked_leaves = self._parked_leaves, {}
        self._parked.clear()
        self._last_parked.clear()
        if self._tier.in_host_memory:  # where it is pinned if the parameters have come to a device meanwhile
            for parameter, master in self._masters.items():
                self._masters[parameter] = self._tier.adopt(master.tensor, torch.float32, parameter.device)
        rounded = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if self.optimizer.state.get(parameter):
                    if self._is_rounded(parameter):
                        rounded.append(parameter)
                    self._adopt(parameter, group, known_before.get(parameter, []))
        return rounded

    def _is_rounded(self, parameter: Tensor) -> bool:
        if not self.has_master(parameter) or self.parked_dtype is not None:
            return False
        tensors = state_tensors(self.optimizer.state[parameter])
        return not is_quantized(tensors) and any(
            tensor.dtype in (torch.float16, torch.bfloat16)
            and not isinstance(tensor, FakeTensor)
            and bool((tensor != tensor.flatten()[:1]).any())  # not as an optimizer's constructor builds it
            for tensor in tensors
        )

    def dtypes(self, parameter: Tensor) -> list[str]:
        """Names of the dtypes of a parameter as the optimizer sees it, and of its state's tensors on the device.

        To be saved beside the state, whose parked tensors may be narrower; see :meth:`load_state_dict`.
        """
        leaves, _ = flatten_state(self.optimizer.state.get(parameter, {}))
        known = self._parked_leaves.get(parameter, [])
        if len(known) != len(leaves):  # an optimizer may add tensors to state that it computes on where it is parked
            known = [None for _ in leaves]
        on_device = [
            getattr(leaf, "dtype", None) if parked is None else parked.dtype
            for leaf, parked in zip(leaves, known, strict=True)
        ]
        return [str(dtype).removeprefix("torch.") for dtype in (self._stepped_dtype(parameter), *on_device)]

    def load_state_dict(
        self, state_dict: dict[str, Any], dtypes: Mapping[Tensor, Sequence[str]] = MappingProxyType({})
    ) -> None:
        """Load the optimizer's state without putting it on the device; it is copied, a tensor at a time.

        :meth:`torch.optim.Optimizer.load_state_dict` casts every state tensor to its parameter's device and dtype,
        which would put the state of the whole model there. So it loads the param groups only. Nothing of
        ``state_dict`` is referred to afterwards (it may be parts of a mapped file), and buffers that are there already
        are written to rather than allocated again.

        Args:
            state_dict: what ``optimizer.state_dict()`` of a like optimizer gave; the present state is dropped.
            dtypes: what :meth:`dtypes` gave for each parameter when it was saved. State that had the dtype of its
                parameter gets that which the parameter has now; other state keeps its own. Of a parameter that is not
                among them, state is cast as torch would cast it.

        Raises:
            ValueError: if the param groups do not match (raised by torch).
        """
        self.synchronize()  # what is still being parked would arrive on top of what is loaded
        known_before = dict(self._parked_leaves)
        state_dict = in_own_form(self.optimizer, state_dict)
        self.optimizer.load_state_dict({**state_dict, "state": {}})
        self._parked_leaves.clear()
        self._parked.clear()
        self._last_parked.clear()
        self.optimizer.state.clear()
        state, ids = state_dict["state"], saved_ids(self.optimizer, state_dict)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                known = known_before.pop(parameter, [])
                if ids[parameter] in state:
                    self.optimizer.state[parameter] = state[ids[parameter]]
                    self._adopt(parameter, group, known, self._dtypes_to_load(parameter, dtypes))
        # an optimizer may keep things under keys that are no parameters
        others = state.keys() - ids.values()
        self.optimizer.state.update(copy.deepcopy({key: state[key] for key in others}))

    def _dtypes_to_load(self, parameter: Tensor, saved: Mapping[Tensor, Sequence[str]]) -> list[torch.dtype | None]:
        """On the device, of the tensors that a loaded state has."""
        leaves, _ = flatten_state(self.optimizer.state[parameter])
        quantized = is_quantized(leaves)
        now = self._stepped_dtype(parameter)
        then, *on_device = [getattr(torch, name, None) for name in saved.get(parameter, ())] or [None]
        if len(on_device) != len(leaves):
            on_device = [
                self._own_dtype(parameter, leaf, quantized) if isinstance(leaf, Tensor) else None for leaf in leaves
            ]
            then = None if casts_by_itself(self.optimizer) else now

        def dtype_of(leaf: Any, dtype: torch.dtype | None) -> torch.dtype | None:
            if not isinstance(leaf, Tensor) or dtype is None or quantized or leaf.dim() == 0:
                return dtype
            floating = dtype.is_floating_point and now.is_floating_point
            return now if floating and then in (None, dtype) else dtype

        return [dtype_of(leaf, dtype) for leaf, dtype in zip(leaves, on_device, strict=True)]

    def _adopt(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        known_before: list[_ParkedLeaf | None],
        dtypes: Sequence[torch.dtype | None] | None = None,
    ) -> None:
        """Park state that stands in ``optimizer.state``, where it is.

        Args:
            parameter: whose state.
            group: its param group.
            known_before: what was parked of it.
            dtypes: on the device, if the state has been loaded: then it is copied.
        """
        loaded = dtypes is not None
        state = self.optimizer.state[parameter]
        leaves, put_together = flatten_state(state)
        quantized = is_quantized(leaves)
        step = state.get("step") if isinstance(state, Mapping) else None
        ours = {id(known.buffer.tensor): known for known in known_before if known is not None}
        known: list[_ParkedLeaf | None] = [None for _ in leaves]
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            if _stays_on_host(leaf, parameter, group, step):
                leaves[i] = leaf.to("cpu", copy=loaded)
                continue
            own = ours.get(id(leaf))
            dtype = dtypes[i] if dtypes else None
            dtype = dtype or (self._own_dtype(parameter, leaf, quantized) if own is None else own.dtype)
            if self.has_master(parameter) and dtype.is_floating_point and not quantized:
                dtype = torch.float32  # it may have been built with the 16-bit weights; it will step fp32 masters
            if not self._parks_state:
                leaves[i] = leaf.to(parameter.device, dtype, copy=loaded)
                continue
            kept = self._kept_dtype(leaf, dtype, quantized)
            if loaded:
                former = known_before[i] if i < len(known_before) else None
                buffer = self._copied(leaf, kept, parameter.device, former)
            elif own is not None and leaf.dtype == kept:
                buffer = own.buffer
            else:
                buffer = self._tier.adopt(leaf, kept, parameter.device)
            if leaf.device.type != "cpu":
                self._copying_from.add(leaf.device)
            known[i] = _ParkedLeaf(buffer, dtype)
            leaves[i] = buffer.tensor
        self.optimizer.state[parameter] = put_together(leaves)
        if self._parks_state:
            self._parked_leaves[parameter] = known
            self._parked.add(parameter)

    def _copied(self, leaf: Tensor, dtype: torch.dtype, device: torch.device, former: _ParkedLeaf | None) -> Buffer:
        """A copy, in the buffer that was there before if it fits."""
        if former is not None and (former.buffer.tensor.shape, former.buffer.tensor.dtype) == (leaf.shape, dtype):
            buffer = former.buffer
        else:
            buffer = self._tier.allocate(leaf, dtype, device)
        buffer.write(leaf)
        return buffer

    # --- where things are ------------------------------------------------------------------------------------------

    def is_parked(self, parameter: Tensor) -> bool:
        """Whether the parameter has optimizer state, and it is parked."""
        return parameter in self._parked

    @property
    def parked_bytes(self) -> int:
        """Bytes of all parked state and master weights."""
        return sum(self.state_bytes(parameter) for parameter in self._parked) + self.master_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes of all master weights."""
        return sum(master.tensor.nbytes for master in self._masters.values())

    def state_bytes(self, parameter: Tensor) -> int:
        """Bytes of the parameter's optimizer state, wherever it is."""
        return sum(tensor.nbytes for tensor in state_tensors(self.optimizer.state.get(parameter, {})))

    def device_bytes(self, parameter: Tensor) -> int:
        """Bytes on the device of the parameter's parked state, once it is paged in."""
        known = self._parked_leaves.get(parameter, [])
        return sum(leaf.buffer.tensor.numel() * leaf.dtype.itemsize for leaf in known if leaf is not None)

    def conversion_bytes(self, parameter: Tensor) -> int:
        """Most bytes on the device of a copy in :attr:`parked_dtype`, which a tensor passes through on its way."""
        known = (leaf for leaf in self._parked_leaves.get(parameter, []) if leaf is not None)
        parked = (leaf.buffer.tensor for leaf in known if leaf.buffer.tensor.dtype != leaf.dtype)
        return max((tensor.nbytes for tensor in parked), default=0)

    # --- whole parameters, in place in `optimizer.state` -------------------------------------------------------------

    def page_in(self, parameters: Iterable[Tensor], place: Place | None = None) -> None:
        """Bring the parameters' state onto their device.

        Args:
            parameters: those without parked state are passed over.
            place: as in :meth:`load`.
        """
        for parameter in parameters:
            if parameter in self._parked:
                state = self.load(parameter, place=place)
                self._last_parked[parameter] = self.optimizer.state[parameter]
                self.optimizer.state[parameter] = state
                self._parked.discard(parameter)

    def park(self, parameters: Iterable[Tensor]) -> None:
        """Move the parameters' state off their device.

        Args:
            parameters: those that are parked or have no state are passed over.
        """
        if not self._parks_state:
            return
        for parameter in parameters:
            if parameter not in self._parked and self.optimizer.state.get(parameter):
                self.store(parameter, self.optimizer.state[parameter])
                self._last_parked.pop(parameter, None)

    def discard(self, parameters: Iterable[Tensor]) -> None:
        """Give up what was done to the parameters' state since it was paged in.

        What is computed on in place (``offload="none"``, or host memory on a CPU device) stays as it is.
        """
        self._unfinished_masters.clear()
        if not self._parks_state:
            return
        for parameter in parameters:
            if parameter in self._last_parked:
                self.optimizer.state[parameter] = self._last_parked.pop(parameter)
                self._parked.add(parameter)
            elif parameter not in self._parked and self.copies(parameter):
                self.optimizer.state.pop(parameter, None)
        self.park(parameters)

    # --- rows of a parameter, for callers that hold the loaded state --------------------------------------------------

    def load(self, parameter: Tensor, rows: slice = ALL_ROWS, place: Place | None = None) -> Any:
        """Copy parked state to the parameter's device, and leave the parked one as it is.

        Args:
            parameter: whose state.
            rows: of the state's tensors; all but zero-dimensional ones must have the parameter's shape if these are
                not all rows.
            place: puts a host tensor on the device; by default in memory of its own.

        Returns:
            The state as the optimizer knows it, ``{}`` where there is none yet. Host memory that a CPU device computes
            on in place is not copied.
        """
        if not self.optimizer.state.get(parameter):
            return {}
        if not self.copies(parameter):
            return self.optimizer.state[parameter]
        place = place or _own_memory_on(parameter.device)
        leaves, put_together = flatten_state(self.optimizer.state[parameter])
        for i, known in enumerate(self._parked_leaves[parameter]):
            if known is not None:
                source = known.buffer.read(rows if leaves[i].dim() else ALL_ROWS)
                leaves[i] = place(source, known.dtype)
                self.bytes_paged_in += source.nbytes
            elif isinstance(leaves[i], Tensor):
                leaves[i] = leaves[i].clone()
        return put_together(leaves)

    def store(self, parameter: Tensor, state: Any, rows: slice = ALL_ROWS, *, last: bool = True) -> None:
        """Park state that was loaded, or made by the optimizer.

        Args:
            parameter: whose state.
            state: for these rows, in the form that the optimizer keeps.
            rows: as in :meth:`load`.
            last: whether these are the last rows; tensors that have no rows are parked with them.
        """
        if not self.copies(parameter):
            self.optimizer.state[parameter] = state
            if self._parks_state:
                self._parked.add(parameter)
            return
        leaves, put_together = flatten_state(state)
        quantized = is_quantized(leaves)
        known = self._parked_leaves.get(parameter, [])
        if len(known) != len(leaves):
            known = self._parked_leaves[parameter] = [None for _ in leaves]
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not self._departs_with(leaf, parameter):
                continue
            split = rows != ALL_ROWS and leaf.dim() > 0
            whole = local(parameter) if split else leaf  # of whose rows those of the state are
            kept = known[i]
            if kept is None or kept.buffer.tensor.shape != whole.shape or kept.dtype != leaf.dtype:
                dtype = self._kept_dtype(leaf, leaf.dtype, quantized)
                buffer = self._tier.allocate(whole, dtype, parameter.device)
                kept = known[i] = _ParkedLeaf(buffer, leaf.dtype)
            if split or last:
                kept.buffer.write(leaf, rows if split else ALL_ROWS)
                self.bytes_parked += leaf.numel() * kept.buffer.tensor.element_size()
            leaves[i] = kept.buffer.tensor
        self._copying_from.add(parameter.device)
        if last:
            self.optimizer.state[parameter] = put_together(leaves)
            self._parked.add(parameter)

    def window(self, nbytes: int, device: torch.device) -> Tensor:
        """Memory on the device for pieces of state and masters to take turns in; uint8.

        A method, so that the planner can tell by it what the window takes.

        Args:
            nbytes: its size in bytes.
            device: where the parameters are.
        """
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait until all that is parked has arrived, so that the host may read it, or write in its place."""
        for device in self._copying_from:
            if (module := device_module(device)) is not None:
                module.synchronize(device)
        self._copying_from.clear()

    def check_files(self) -> None:
        """Find out whether all parked state and masters can be read, where they lie in files.

        Raises:
            ParkedStateError: if a file is gone or too short.
        """
        buffers = [leaf.buffer for known in self._parked_leaves.values() for leaf in known if leaf is not None]
        for buffer in (*buffers, *self._masters.values()):
            buffer.check()

    def copies(self, parameter: Tensor) -> bool:
        """Whether paging in copies; otherwise the optimizer computes on the tensors where they are."""
        in_place = self._computes_on_parked(parameter) and self.parked_dtype is None
        return self._parks_state and not in_place

    def steps_in_place(self, parameter: Tensor) -> bool:
        """Whether a step changes what is parked, state or master, so that there is nothing to go back to."""
        master = parameter in self._masters and self._computes_on_parked(parameter)
        return master or not self.copies(parameter)

    def _departs_with(self, leaf: Tensor, parameter: Tensor) -> bool:
        """Whether a state tensor leaves the device, or the CPU's memory, when its parameter's state is parked."""
        return leaf.device == parameter.device and (leaf.device.type != "cpu" or leaf.dim() > 0)

    def _own_dtype(self, parameter: Tensor, leaf: Tensor, quantized: bool) -> torch.dtype:
        """On the device, of a state tensor that nothing is known of: it may have been parked by another residency."""
        narrow = leaf.dtype == self.parked_dtype and leaf.dim() > 0 and not quantized
        return self._stepped_dtype(parameter) if narrow and parameter.dtype.is_floating_point else leaf.dtype

    def _stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """Of the parameter as the optimizer sees it."""
        return torch.float32 if self.has_master(parameter) else parameter.dtype

    def _kept_dtype(self, leaf: Tensor, dtype: torch.dtype, quantized: bool) -> torch.dtype:
        """In which a state tensor is parked that has this dtype on the device."""
        stays = quantized or leaf.dim() == 0 or not dtype.is_floating_point
        return dtype if stays or self.parked_dtype is None else self.parked_dtype

    # --- master weights ---------------------------------------------------------------------------------------------

    def keep_master(self, parameter: Tensor, weights: Tensor) -> None:
        """Park a master copy of a parameter.

        Args:
            parameter: the parameter, in whatever dtype it is computed with.
            weights: its values before rounding; they are kept in fp32.
        """
        self.synchronize()
        self._with_master.add(parameter)
        if parameter not in self._masters:
            self._masters[parameter] = self._tier.allocate(weights, torch.float32, parameter.device)
        self._masters[parameter].write(weights)
        self._copying_from.add(weights.device)

    def make_master_when_updated(self, parameter: Tensor) -> None:
        """Have a master from the next update on; until then the 16-bit weights, which were never rounded, are it."""
        self._with_master.add(parameter)
        self._masters.pop(parameter, None)

    def has_master(self, parameter: Tensor) -> bool:
        """Whether the parameter is stepped through a master."""
        return parameter in self._with_master

    def master(self, parameter: Tensor) -> Tensor | None:
        """The parked master of a parameter as a host tensor, fp32; ``None`` where there is none (yet)."""
        buffer = self._masters.get(parameter)
        return None if buffer is None else buffer.tensor

    def load_master(self, parameter: Tensor, rows: slice, place: Place | None) -> Tensor:
        """Rows of the master on the parameter's device, fp32; see :meth:`load`."""
        place = place or _own_memory_on(parameter.device)
        if parameter not in self._masters:
            weights = local(parameter).detach()
            return place(weights if rows == ALL_ROWS else weights[rows], torch.float32)
        source = self._masters[parameter].read(rows)
        if self._computes_on_parked(parameter):
            return source
        self.bytes_paged_in += source.nbytes
        return place(source, torch.float32)

    def store_master(self, parameter: Tensor, values: Tensor, rows: slice, *, last: bool) -> None:
        """Park rows of the master; arguments as in :meth:`store`."""
        made = parameter in self._masters
        if made and self._computes_on_parked(parameter):
            return
        if not made and parameter not in self._unfinished_masters:
            self._unfinished_masters[parameter] = self._tier.allocate(local(parameter), torch.float32, parameter.device)
        (self._masters if made else self._unfinished_masters)[parameter].write(values, rows)
        self.bytes_parked += values.nbytes
        self._copying_from.add(parameter.device)
        if last and not made:
            self._masters[parameter] = self._unfinished_masters.pop(parameter)

    def _computes_on_parked(self, parameter: Tensor) -> bool:
        """Whether the device is the CPU, and what is parked lies in memory that it can compute on."""
        return parameter.device.type == "cpu" and self._tier.in_host_memory


def _stays_on_host(leaf: Tensor, parameter: Tensor, group: dict[str, Any], step: Any) -> bool:
    """Whether a state tensor is never paged in: a number (Adam's ``step``) that the optimizer does not want there."""
    if leaf.dim() > 0:
        return False
    if parameter.device.type == "cpu":
        return True
    if group.get("capturable") or group.get("fused"):
        return False
    return parameter.dim() > 0 or leaf is step  # moments of a parameter without dimensions have none either


def _own_memory_on(device: torch.device) -> Place:
    return lambda source, dtype: source.to(device, dtype, non_blocking=True)
