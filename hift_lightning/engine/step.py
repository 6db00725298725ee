"""What the engine knows of the optimizer step in progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hift_lightning.engine.nonfinite import NonfiniteSearch
from hift_lightning.engine.shards import local
from hift_lightning.engine.state_tensors import state_tensors


@dataclass
class Step:
    """One optimizer step, from its first backward pass to the next block's turn; the next step is a new one."""

    search: NonfiniteSearch
    """Looks at the loss and the gradients of this step."""
    searched: bool = False
    """Whether all that backward has left has been looked at."""
    nonfinite_loss: str | None = None
    """``"NaN"`` or ``"inf"``, if a loss had it and ranks have not agreed on that yet."""
    left_out_because: str | None = None
    """Why the whole window of micro-batches is to be left out."""
    backward_ran: bool = False
    averaged: bool = False
    """Whether gradients are averages over the ranks."""
    updated: bool = False
    """Whether the update has begun; of pieces the gradients are gone before the optimizer's own call."""
    updated_in_backward: set[str] = field(default_factory=set)
    """Names of the parameters that ``update="fused"`` has updated."""
    reached_in_backward: bool = False
    """Whether one of them is the block's own, and not of what is always active."""
    reach_noted: bool = False
    """Whether it has been noted if a gradient has reached the block."""
    changed_settings: list[dict[str, Any]] = field(default_factory=list)
    """What the update of the pieces has changed in each param group."""
    versions: dict[str, int] = field(default_factory=dict)
    """Torch's counts of changes of the block's weights, as they were before the update."""
    bits: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the bits of these weights, where the optimizer is not known to change them in ways that are counted."""
    with_gradient: set[str] = field(default_factory=set)
    """Names of those that will be updated."""

    def note_weights(self, parameters: Mapping[str, nn.Parameter], *, counted: bool) -> None:
        """Note the weights of the block as they are before the update.

        Args:
            parameters: by name.
            counted: whether the optimizer's changes are, as those through ``p.data`` are not.
        """
        if self.versions:  # a closure that is called again, after what the optimizer has done since
            return
        self.versions = {name: local(parameter)._version for name, parameter in parameters.items()}
        self.bits = (
            {}
            if counted
            else {
                name: _sum_of_bits(local(p).detach())
                for name, p in parameters.items()
                if not isinstance(local(p), FakeTensor)  # which has none
            }
        )
        self.with_gradient = {name for name, parameter in parameters.items() if parameter.grad is not None}

    def counts_changes(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether the completed update was counted for each weight; `parameters` are all of the model, by name."""
        updated = self.with_gradient | self.updated_in_backward
        return bool(updated) and all(local(parameters[name])._version != self.versions[name] for name in updated)

    def touched(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of those that have been changed since; `parameters` are all of the model, by name."""

        def is_touched(name: str) -> bool:
            weights = local(parameters[name]).detach()
            if weights._version != self.versions[name]:
                return True
            # in host memory: that of the device may have run out
            return name in self.bits and bool(self.bits[name].cpu() != _sum_of_bits(weights.cpu()))

        return list(filter(is_touched, self.versions))


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(weights: Tensor) -> Tensor:
    """A number that another value of any one weight would change; it takes no memory on the device but its own."""
    total = torch.zeros((), dtype=torch.int64, device=weights.device)
    for part in state_tensors(weights):  # the weights themselves, or what they consist of
        flat = (torch.view_as_real(part) if part.is_complex() else part).reshape(-1)
        if flat.storage_offset() * flat.itemsize % torch.int64.itemsize != 0:
            flat = flat.clone()
        in_words = flat.numel() - flat.numel() % (torch.int64.itemsize // flat.itemsize)
        total += flat[:in_words].view(torch.int64).sum()  # of narrower integers torch would make a wide copy first
        total += flat[in_words:].view(_INTEGERS[flat.itemsize]).sum()
    return total
