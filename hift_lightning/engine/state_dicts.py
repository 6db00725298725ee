"""What an optimizer's saved state dict says of its parameters, in the form in which the optimizer keeps it."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from typing_extensions import Self


def saved_ids(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[nn.Parameter, Any]:
    """By which number a state dict of a like optimizer knows each parameter."""
    ids: dict[nn.Parameter, Any] = {}
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        ids.update(zip(group["params"], saved["params"], strict=True))
    return ids


def casts_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's ``load_state_dict`` is torch's, which casts state to its parameter's device and dtype."""
    return type(optimizer).load_state_dict is Optimizer.load_state_dict


def in_own_form(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A saved state dict with the state in the form in which the optimizer keeps it.

    An optimizer with a ``load_state_dict`` of its own may save another form (bitsandbytes packs 8-bit state), so it is
    called, with something in place of the tensors that it cannot cast or move.

    Args:
        optimizer: where its ``load_state_dict`` is its own, it is left without state, and with the saved param groups.
        state_dict: what ``state_dict()`` of a like optimizer gave.
    """
    if casts_by_itself(optimizer):
        return state_dict
    stand_ins = tree_map_only(Tensor, _StandIn, state_dict["state"])
    optimizer.load_state_dict({**state_dict, "state": stand_ins})
    loaded = tree_map_only(_StandIn, lambda stand_in: stand_in.tensor, dict(optimizer.state))
    optimizer.state.clear()
    ids = saved_ids(optimizer, state_dict)
    return {**state_dict, "state": {ids.get(key, key): state for key, state in loaded.items()}}


class _StandIn:
    """Goes through an optimizer's ``load_state_dict`` in place of a tensor, which is neither copied nor moved."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        return self
