"""What a training step holds in memory, counted from the tensors that are alive."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from hift_lightning.engine.shards import local

ON_DEVICE = ("weights", "gradients", "optimizer_state")
ROLES = (*ON_DEVICE, "parked")


def bytes_by_role(
    model: nn.Module, optimizer: Optimizer, is_parked: Callable[[Tensor], bool] | None = None
) -> dict[str, int]:
    """Count the bytes of weights, gradients and optimizer state; each storage counts once, in its first role.

    Args:
        model: whose parameters, buffers and gradients are counted; of sharded ones those of this rank.
        optimizer: whose state is counted.
        is_parked: tells whether the optimizer state of a parameter is parked; this decides where the device is
            the CPU, so that parked state lies in the same memory. `None`: nothing is.

    Returns:
        Bytes by role. `weights`: parameters and buffers. `gradients`: what stands in `.grad`.
        `optimizer_state`: state on the device of its parameter and not parked. `parked`: all other state that
        the optimizer refers to; also Adam's step counters, which torch keeps on the CPU whatever the device.
    """
    seen: set[tuple[torch.device, int]] = set()
    parameters = list(model.parameters())
    states = {"optimizer_state": list[Tensor](), "parked": list[Tensor]()}
    for parameter, state in optimizer.state.items():
        parked = is_parked is not None and is_parked(parameter)
        for tensor in filter(torch.is_tensor, tree_leaves(state)):
            on_device = not parked and tensor.device == parameter.device
            states["optimizer_state" if on_device else "parked"].append(tensor)
    return {
        "weights": _bytes([*parameters, *model.buffers()], seen),
        "gradients": _bytes((parameter.grad for parameter in parameters if parameter.grad is not None), seen),
        "optimizer_state": _bytes(states["optimizer_state"], seen),
        "parked": _bytes(states["parked"], seen),
    }


def _bytes(tensors: Iterable[Tensor], seen: set[tuple[torch.device, int]]) -> int:
    total = 0
    for part in itertools.chain.from_iterable(map(_parts, tensors)):
        storage = local(part).untyped_storage()
        key = (part.device, storage.data_ptr())
        if storage.nbytes() and key not in seen:
            seen.add(key)
            total += storage.nbytes()
    return total


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)
