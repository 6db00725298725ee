"""Activation checkpointing of each layer, and never of one below the active block."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hift_lightning.engine.layers import class_of, modules_of_layers

_CACHES = ("past_key_value", "past_key_values")
"""Arguments of transformers' layers that a second forward would fill again; they are left out, as transformers does.
Its newer versions give them other names, and know them by their class."""


def layers_to_checkpoint(model: nn.Module) -> list[str]:
    """Paths of the modules that are layers of a stack; a warning tells if there is none.

    Frozen layers and those that are always active are among them: backward goes through them as through the rest.
    """
    names = modules_of_layers(model)
    if not names:
        warnings.warn(
            "`activation_checkpointing=True` computes layers of a stack anew, and "
            f"`{class_of(model).__name__}` has no stack of modules; leave it out.",
            stacklevel=4,
        )
    return names


class ActivationCheckpointing:
    """Makes layers compute their activations anew in backward, while it is on.

    A layer is checkpointed in a forward whose result needs a gradient, which below the active block none does: there no
    activation is kept in any case. Checkpoints are of the non-reentrant kind
    (https://docs.pytorch.org/docs/stable/checkpoint.html), which does not ask that inputs require a gradient.

    Args:
        model: the model.
        layers: paths of the modules that are its layers.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        self._layers = [model.get_submodule(name) for name in layers]
        self._own_forwards: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def start(self) -> None:
        """Begin to checkpoint."""
        for layer in self._layers:
            self._own_forwards.append((layer, layer.__dict__.get("forward")))
            # bound to the layer, so that a deep copy of the model computes with its own
            layer.forward = MethodType(_checkpointed(_function_of(layer)), layer)

    def stop(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer, own in self._own_forwards:
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.forward = own
        self._own_forwards = []


def _function_of(layer: nn.Module) -> Callable[..., Any]:
    """What computes a layer, to be called with the layer first."""
    forward = layer.forward
    if isinstance(forward, MethodType) and forward.__self__ is layer:
        return forward.__func__
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


def _checkpointed(function: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in [*tensors, *layer.parameters()]):
            return function(layer, *args, **kwargs)
        args = tuple(None if _is_cache(value) else value for value in args)
        kwargs = {name: None if name in _CACHES or _is_cache(value) else value for name, value in kwargs.items()}
        norms = [norm for norm in layer.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]

        # as an argument, since `checkpoint` would take keywords of its own names for its own, and since it finds the
        # devices whose random numbers come again by the tensors in what it is given
        def function_of_inputs(kwargs: dict[str, Any], *args: Any) -> Any:
            return function(layer, *args, **kwargs)

        if norms and not torch.compiler.is_compiling():  # a compiled layer updates them once by itself
            return checkpoint(
                function_of_inputs,
                kwargs,
                *args,
                use_reentrant=False,
                context_fn=lambda: (contextlib.nullcontext(), _averages_left_alone(norms)),
            )
        return checkpoint(function_of_inputs, kwargs, *args, use_reentrant=False)

    checkpointed.__name__ = "forward"  # as which it is pickled with the model, and found again in its class
    return checkpointed


def _is_cache(value: Any) -> bool:
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(value).__mro__}
    return "transformers.cache_utils.Cache" in kinds


@contextlib.contextmanager
def _averages_left_alone(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within it these norms leave their running averages as they are: the first forward has updated them."""
    # they have to be handed over all the same, since a second forward must save as many tensors as the first
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for _, _, count in before]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:  # by torch's exception too that ends a second forward early
        for (norm, momentum, count), was in zip(before, counts, strict=True):
            norm.momentum = momentum
            if count is not None and was is not None:
                count.copy_(was)
