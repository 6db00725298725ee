"""What can be set about a run."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.partition import check_always_active, check_patterns
from hift_lightning.engine.residency import check_parked_dtype
from hift_lightning.engine.rotation import ONCE, check_order, check_steps_per_block
from hift_lightning.engine.tiers import check_offload


@dataclass(frozen=True)
class HiFTSettings:
    """How a model is trained block by block.

    Raises:
        ConfigurationError: if a value cannot work.
    """

    group_size: int | str = 1
    """Layers per block (the paper's m); ``auto`` until the planner has chosen it for ``memory_budget``."""
    memory_budget: str | int | None = None
    """Bytes of the device's memory that ``group_size="auto"`` may take; ``None`` for all that the device has."""
    order: str = "top2down"
    """Order of the blocks' turns: ``bottom2up``, ``top2down``, ``random``, or the name of a registered one."""
    lr_update: str = "cycle"
    """When the learning rate changes. ``cycle``: at the end of a cycle, by as many scheduler steps as the cycle
    had optimizer steps; ``cycle_once``: at the end of a cycle, by one; ``step``: at every optimizer step."""
    steps_per_block: int | str = 1
    """Optimizer steps before the next block has its turn; ``once``: so many that each block has one turn in the run."""
    offload: str | Path = "cpu"
    """Where optimizer state is parked: ``cpu`` (host memory), the path of a folder (files), ``none`` (it stays on the
    device), or a registered tier."""
    update: str = "block"
    """How the active block is stepped. ``block``: all its state paged in, one optimizer step. ``streamed``: piece by
    piece through a window. ``fused``: streamed inside backward, each gradient freed as soon as it has been used; then
    hooks that look at gradients after backward see none, and norm clipping and accumulation are not possible."""
    window: str | int = "256MiB"
    """Bytes of parked state and masters that ``streamed`` and ``fused`` may have on the device, prefetch included."""
    activation_checkpointing: bool = False
    """Whether each layer from the active block upwards computes its activations anew in backward."""
    master_weights: bool = False
    """Whether fp32 masters of 16-bit weights are kept, and paged with their block (the paper's Mixed^Hi)."""
    parked_dtype: str | None = None
    """Keep parked moments in this dtype: ``bfloat16`` halves their bytes."""
    nonfinite: str = "raise"
    """What is done about NaN or inf in the loss or in a gradient. ``raise``: an error before anything is updated (with
    ``fused``, after backward); ``skip``: the step is left out, and the block keeps its turn."""
    resume_plan: str = "same"
    """What happens when a checkpoint was made with another plan of blocks. ``same``: an error; ``rebuild``: weights,
    masters and optimizer state carry over, and the rotation begins at the start of a cycle of this plan."""
    layers: Sequence[str] | None = None
    """Shell-style patterns on parameter names that override the layers found: each makes one layer."""
    frozen: Sequence[str] | None = None
    """Shell-style patterns on parameter names that are never trained."""
    always_active: Sequence[str] | int | None = None
    """What is trained in every step, with whichever block has its turn: a number of layers from the top, or
    shell-style patterns on parameter names. The top layer is the head, or the final norm where the head has the weights
    of the embeddings. Gradients and state of these layers are on the device in each step."""
    seed: int | None = 0
    """Seed of the order; ``bottom2up`` and ``top2down`` have no use for it, and with them it may be ``None``, as it is
    in projects that do not seed."""

    def __post_init__(self) -> None:
        if self.group_size != "auto":
            self._check_group_size()
        if self.memory_budget is not None:
            parse_bytes("memory_budget", self.memory_budget)
        if not isinstance(self.seed, int) and (self.seed is not None or self.order not in ("bottom2up", "top2down")):
            raise ConfigurationError(
                f"`seed={self.seed!r}` must be an integer; orders such as `random` are drawn from it."
            )
        check_patterns("layers", self.layers)
        check_patterns("frozen", self.frozen)
        check_always_active(self.always_active)
        check_order(self.order)
        _check_choice("lr_update", self.lr_update, "a way to update the learning rate", ("cycle", "cycle_once", "step"))
        check_steps_per_block(self.steps_per_block)
        if self.steps_per_block == ONCE and self.lr_update != "step":
            raise ConfigurationError(
                f"`steps_per_block={ONCE!r}` makes the run one cycle, and `lr_update={self.lr_update!r}` would hold "
                "the learning rate all through it; give `lr_update='step'`."
            )
        check_offload(self.offload)
        check_parked_dtype(self.parked_dtype)
        if self.offload == "none" and self.parked_dtype is not None:
            raise ConfigurationError(
                f"`parked_dtype={self.parked_dtype!r}` is the dtype of parked moments, and with `offload='none'` none "
                "are parked; leave one of them out."
            )
        _check_choice("resume_plan", self.resume_plan, "a way to go on from a checkpoint", ("same", "rebuild"))
        _check_choice("update", self.update, "a way to update a block", ("block", "streamed", "fused"))
        _check_choice("nonfinite", self.nonfinite, "a policy for NaN and inf", ("raise", "skip"))
        if self.nonfinite == "skip" and self.update == "fused":
            raise ConfigurationError(
                "`nonfinite='skip'` leaves out a step whose gradients have NaN or inf, and `update='fused'` uses each "
                "gradient inside backward, before the others are there; use `update='streamed'`, or "
                "`nonfinite='raise'`."
            )
        parse_bytes("window", self.window)
        for name in ("activation_checkpointing", "master_weights"):
            check_switch(name, getattr(self, name))

    @property
    def layers_per_block(self) -> int:
        """``group_size`` as a number.

        Raises:
            ConfigurationError: while it is ``auto``.
        """
        if not isinstance(self.group_size, int):
            raise ConfigurationError(
                "`group_size='auto'` is chosen by `HiFTStrategy` at the start of `fit`, since it depends on a batch; "
                "give a number here, such as the one that `python plan.py strategy.group_size=auto` tells."
            )
        return self.group_size

    def _check_group_size(self) -> None:
        if not isinstance(self.group_size, int) or isinstance(self.group_size, bool) or self.group_size < 1:
            raise ConfigurationError(
                f"`group_size={self.group_size!r}` must be an integer of at least 1, the layers in a block, or `auto`."
            )
        if self.memory_budget is not None:
            raise ConfigurationError(
                f"`memory_budget={self.memory_budget!r}` is looked at with `group_size='auto'` alone, and "
                f"`group_size={self.group_size}` is given; leave one of them out."
            )


def _check_choice(argument: str, value: str, what: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ConfigurationError(f"`{argument}={value!r}` is not {what}; choose one of {', '.join(choices)}.")


def check_switch(name: str, value: Any) -> None:
    """Raise unless a value is ``True`` or ``False``: any other, such as the word "no", might count as true.

    Args:
        name: of the argument, for the message.
        value: the value.

    Raises:
        ConfigurationError: if it is not.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"`{name}={value!r}` must be `True` or `False` (in YAML `true`, `false`).")


def parse_bytes(name: str, value: str | int) -> int:
    """Read a number of bytes such as ``"256MiB"``.

    Args:
        name: of the argument, for the message.
        value: bytes, or a number with a unit (B, KiB, MiB, GiB, KB, MB, GB), in capitals or not.

    Raises:
        ConfigurationError: if it cannot be read or is not positive.
    """
    units = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if match and match[2] in units and (number := int(float(match[1]) * units[match[2]])) > 0:
        return number
    raise ConfigurationError(f"`{name}={value!r}` is not a number of bytes; write it like `256MiB`.")
