"""What the engine knows of the optimizer step in progress."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hift_lightning.engine.nonfinite import NonfiniteSearch
from hift_lightning.engine.shards import local


@dataclass
class Step:
    """One optimizer step, from its first backward pass to the next block's turn; the next step is a new one."""

    search: NonfiniteSearch
    """Looks at the loss and the gradients of this step."""
    searched: bool = False
    """Whether all of them have been looked at."""
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
    changed_settings: list[dict[str, Any]] = field(default_factory=list)
    """What the update of the pieces has changed in each param group."""
    versions: dict[str, int] = field(default_factory=dict)
    """Counts of changes of the block's weights, as they were before the update."""

    def note_versions(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note how often the weights that will be updated have been changed so far."""
        self.versions = {name: local(parameter)._version for name, parameter in parameters.items()}

    def touched(self, parameters: Mapping[str, nn.Parameter]) -> list[str]:
        """Names of those that have been changed since; `parameters` are all of the model, by name."""
        return [name for name, version in self.versions.items() if local(parameters[name])._version != version]
