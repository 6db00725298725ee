"""Where optimizer state is: on the compute device while its block is updated, parked otherwise.

The optimizer's own ``state`` always holds the tensors that count: parked ones are simply host tensors in it,
so ``optimizer.state_dict()`` needs no help from here. Nothing in this file knows an optimizer by name.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hift_lightning.engine.errors import ConfigurationError

OFFLOADS = ("none", "cpu")


def check_offload(offload: str) -> None:
    """Raise if parked state cannot be kept there.

    Args:
        offload: ``"none"`` keeps all state on the device, ``"cpu"`` parks it in host memory.

    Raises:
        ConfigurationError: for any other value.
    """
    if offload not in OFFLOADS:
        raise ConfigurationError(
            f"`offload={offload!r}` is no place to park optimizer state; choose one of {', '.join(OFFLOADS)}."
        )


class Residency:
    """Pages the optimizer state of a block in and parks it again.

    On a device other than the CPU, parking copies each state tensor into a host buffer that is allocated once
    (in pinned memory where the device supports it) and used again at every later visit. Copies are issued on
    the device's current stream, in the order of the kernels that use them, and nothing waits for them until
    the host reads the state (:meth:`synchronize`). On the CPU nothing is copied.

    Args:
        optimizer: any :class:`torch.optim.Optimizer`. State that it has already built (Adagrad builds all of
            it in its constructor) or that is loaded later counts as parked.
        offload: ``"cpu"`` or ``"none"``.

    Raises:
        ConfigurationError: if ``offload`` is neither.
    """

    def __init__(self, optimizer: Optimizer, offload: str = "cpu") -> None:
        check_offload(offload)
        self.optimizer = optimizer
        self.offload = offload
        self.bytes_paged_in = 0
        """Bytes copied from host to device so far."""
        self.bytes_parked = 0
        """Bytes copied from device to host so far."""
        self._buffers: dict[Tensor, list[Tensor | None]] = {}
        self._parked: set[Tensor] = set()
        self._copying_from: set[torch.device] = set()
        self.adopt_state()

    def adopt_state(self) -> None:
        """Take state that this class has not parked itself (built early, or loaded) as parked.

        It moves to host memory if it is not there. Zero-dimensional tensors (Adam's ``step``) stay on the host
        for good unless the optimizer wants them on the device (``capturable`` or ``fused``), as in
        :meth:`torch.optim.Optimizer.load_state_dict`.
        """
        self._buffers.clear()
        self._parked.clear()
        if self.offload == "none":
            return
        for group in self.optimizer.param_groups:
            scalars_on_device = bool(group.get("capturable") or group.get("fused"))
            for parameter in group["params"]:
                if not self.optimizer.state.get(parameter):
                    continue
                leaves, spec = tree_flatten(self.optimizer.state[parameter])
                leaves = [leaf.to("cpu") if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                self.optimizer.state[parameter] = tree_unflatten(leaves, spec)
                self._buffers[parameter] = [
                    leaf if isinstance(leaf, Tensor) and (leaf.dim() > 0 or scalars_on_device) else None
                    for leaf in leaves
                ]
                self._parked.add(parameter)

    def is_parked(self, parameter: Tensor) -> bool:
        """Whether the parameter's optimizer state is parked (it may hold none yet)."""
        return parameter in self._parked

    @property
    def parked_bytes(self) -> int:
        """Bytes of all parked state."""
        return sum(self.state_bytes(parameter) for parameter in self._parked)

    def state_bytes(self, parameter: Tensor) -> int:
        """Bytes of the parameter's optimizer state, wherever it is."""
        leaves = tree_leaves(self.optimizer.state.get(parameter, {}))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    def page_in(self, parameters: Iterable[Tensor]) -> None:
        """Bring the parameters' state onto their device.

        Args:
            parameters: a block's parameters; those without parked state are passed over.
        """
        for parameter in parameters:
            if parameter not in self._parked:
                continue
            if parameter.device.type != "cpu":
                leaves, spec = tree_flatten(self.optimizer.state[parameter])
                for i, buffer in enumerate(self._buffers[parameter]):
                    if buffer is not None:
                        leaves[i] = buffer.to(parameter.device, non_blocking=True)
                        self.bytes_paged_in += buffer.nbytes
                self.optimizer.state[parameter] = tree_unflatten(leaves, spec)
            else:
                self._buffers.pop(parameter, None)
            self._parked.discard(parameter)

    def park(self, parameters: Iterable[Tensor]) -> None:
        """Move the parameters' state off their device.

        Args:
            parameters: a block's parameters; those that are parked or have no state are passed over.
        """
        if self.offload == "none":
            return
        for parameter in parameters:
            if parameter in self._parked or not self.optimizer.state.get(parameter):
                continue
            if parameter.device.type != "cpu":
                leaves, spec = tree_flatten(self.optimizer.state[parameter])
                buffers = self._buffers.get(parameter, [])
                if len(buffers) != len(leaves):
                    buffers = [None for _ in leaves]
                for i, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor) and leaf.device == parameter.device:
                        buffers[i] = leaves[i] = _copy_to_host(leaf, buffers[i])
                        self.bytes_parked += leaf.nbytes
                self._buffers[parameter] = buffers
                self.optimizer.state[parameter] = tree_unflatten(leaves, spec)
                self._copying_from.add(parameter.device)
            self._parked.add(parameter)

    def synchronize(self) -> None:
        """Wait until all parked state has arrived, so that the host may read it."""
        for device in self._copying_from:
            torch.get_device_module(device).synchronize(device)
        self._copying_from.clear()


def load_optimizer_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state dict without putting anything on the device.

    :meth:`torch.optim.Optimizer.load_state_dict` casts every state tensor to its parameter's device and dtype,
    which would put the state of the whole model there. So it loads the param groups only, and the state is
    entered as it is. Call :meth:`Residency.adopt_state` afterwards.

    Args:
        optimizer: the optimizer to load into; its present state is dropped.
        state_dict: what ``optimizer.state_dict()`` of a like optimizer gave.

    Raises:
        ValueError: if the param groups do not match (raised by torch).
    """
    optimizer.load_state_dict({**state_dict, "state": {}})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved_ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
    by_id = dict(zip(saved_ids, parameters, strict=True))
    optimizer.state.clear()
    for key, state in state_dict["state"].items():
        optimizer.state[by_id.get(key, key)] = state


@contextlib.contextmanager
def parameters_stay_themselves(device: torch.device) -> Iterator[None]:
    """Within it, ``Module.to`` changes Parameters in place on every kind of device.

    :meth:`torch.nn.Module.to` replaces the Parameter objects where CPU tensors and the device's are of
    incompatible kinds (PrivateUse1 backends, XLA), and then the optimizer would be left with the old ones.

    Args:
        device: where the module is, or goes.
    """
    replaces = not torch._has_compatible_shallow_copy_type(torch.empty(0), torch.empty(0, device=device))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(before or replaces)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _copy_to_host(tensor: Tensor, buffer: Tensor | None) -> Tensor:
    pin = _can_pin(tensor.device.type)
    if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype or buffer.is_pinned() != pin:
        buffer = torch.empty_like(tensor, device="cpu", pin_memory=pin)
    return buffer.copy_(tensor, non_blocking=True)


_pinning: dict[str, bool] = {}


def _can_pin(device_type: str) -> bool:
    """Whether host memory can be pinned for this kind of device; asked of the device once, by trying."""
    if device_type not in _pinning:
        accelerator = torch.accelerator.current_accelerator()
        _pinning[device_type] = accelerator is not None and accelerator.type == device_type and _try_to_pin()
    return _pinning[device_type]


def _try_to_pin() -> bool:
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except (RuntimeError, NotImplementedError):  # backends without pinned memory say so in either way
        return False
