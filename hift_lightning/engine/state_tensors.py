"""Optimizer state as a list of plain tensors: containers are opened, and so are tensors that consist of others.

The 8-bit and 4-bit states of torchao are such tensors: codes, scales and a map, which are parked as they are. See
https://docs.pytorch.org/docs/stable/notes/extending.html ("wrapper subclasses"). The momentum of sparse gradients is a
sparse tensor, which is indices and values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_unflatten

from hift_lightning.engine.shards import local


def flatten_state(state: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Take a parameter's state apart.

    Args:
        state: as the optimizer keeps it; of sharded tensors this rank's rows are taken.

    Returns:
        Its leaves, plain tensors and primitives, and a function that puts such leaves together in the same form.
    """
    leaves, spec = tree_flatten(state)
    opened = [_open(leaf) for leaf in leaves]

    def put_together(parts: Sequence[Any]) -> Any:
        remaining = iter(parts)
        return tree_unflatten([close([next(remaining) for _ in inside]) for inside, close in opened], spec)

    return [part for inside, _ in opened for part in inside], put_together


def state_tensors(state: Any) -> list[Tensor]:
    """The plain tensors of which a parameter's state consists."""
    return [leaf for leaf in flatten_state(state)[0] if isinstance(leaf, Tensor)]


def is_quantized(leaves: Sequence[Any]) -> bool:
    """Whether the plain tensors of a state include codes, so that no other dtype will do for any of them."""
    return any(
        isinstance(leaf, Tensor) and leaf.dim() > 0 and (leaf.dtype.itemsize == 1 or not leaf.dtype.is_floating_point)
        for leaf in leaves
    )


def _open(leaf: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    if isinstance(leaf, Tensor):
        leaf = local(leaf)
    if isinstance(leaf, Tensor) and leaf.layout == torch.sparse_coo:
        return [leaf._indices(), leaf._values()], lambda parts: _sparse(parts[0], parts[1], leaf)
    if not is_traceable_wrapper_subclass(leaf):
        return [leaf], lambda parts: parts[0]
    names, context = leaf.__tensor_flatten__()
    opened = [_open(getattr(leaf, name)) for name in names]

    def close(parts: list[Any]) -> Any:
        remaining = iter(parts)
        inner = [close_one([next(remaining) for _ in inside]) for inside, close_one in opened]
        tensors = dict(zip(names, inner, strict=True))
        return type(leaf).__tensor_unflatten__(tensors, context, leaf.shape, leaf.stride())

    return [part for inside, _ in opened for part in inside], close


def _sparse(indices: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        indices, values, like.shape, is_coalesced=like.is_coalesced(), check_invariants=False
    )
