"""Layers → blocks, as lists of parameter names: each trainable parameter of a model in exactly one.

`engine/layers.py` tells how a model's layers are found; those with nothing to train are dropped here. The `layers`
patterns override what was found, and `always_active`, patterns or a number of layers from the top, takes parameters out
of the turns: they are trained in every step, as embeddings and head are in LISA (https://arxiv.org/abs/2403.17919).
"""

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.layers import Layer, class_of, layers_of, names_of_weights


@dataclass(frozen=True)
class Block:
    """`group_size` consecutive layers: what is active in one optimizer step.

    Attributes:
        index: Position in the plan, 0 at the bottom of the model.
        layers: The layers, bottom first.
        numel: Elements of the parameters of its layers.
        nbytes: Bytes of these weights in the dtype that they have now.
        always_active: Names of the parameters that are active with every block.
    """

    index: int
    layers: tuple[Layer, ...]
    numel: int
    nbytes: int
    always_active: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its only layer, or those of its lowest and highest layer."""
        first, last = self.layers[0].name, self.layers[-1].name
        return first if len(self.layers) == 1 else f"{first} … {last}"

    @property
    def own_parameters(self) -> tuple[str, ...]:
        """The parameter names of all its layers, bottom first."""
        return tuple(name for layer in self.layers for name in layer.parameters)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters that are active in its steps: its own, and those that always are."""
        return self.own_parameters + self.always_active


@dataclass(frozen=True)
class Plan:
    """All blocks of a model, bottom first; `print(plan)` shows them as a table.

    Attributes:
        blocks: `ceil(layers / group_size)` blocks, of which the last may have fewer layers.
        group_size: Layers per block (the paper's m).
        always_active: What is trained in every step, as a block that has no turn; its index is that behind the last.
    """

    blocks: tuple[Block, ...]
    group_size: int
    always_active: Block | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of all blocks, bottom first."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def numel(self) -> int:
        """Elements of all parameters in the plan."""
        return sum(block.numel for block in self.parts)

    @property
    def parts(self) -> tuple[Block, ...]:
        """The blocks, and what is always active: each parameter in one of them, as its own."""
        return self.blocks if self.always_active is None else (*self.blocks, self.always_active)

    @property
    def largest(self) -> Block:
        """The block with the most elements, the lowest of equals; it decides the peak of memory."""
        return max(self.blocks, key=lambda block: block.numel)

    def fingerprint(self) -> str:
        """The SHA-256, in hexadecimal, of the blocks' parameter names, which tells equal plans from others."""
        names = json.dumps([block.parameters for block in self.blocks])
        return hashlib.sha256(names.encode()).hexdigest()

    def __str__(self) -> str:
        total = f"{len(self.layers)} layers"
        width = max(len(name) for name in [total, *(block.name for block in self.parts)])
        lines = [f"block  {'layers':<{width}}  {'parameters':>15}   share  {'MiB':>12}"]
        for block in self.parts:
            share, mib = block.numel / max(self.numel, 1), block.nbytes / 2**20
            number = "" if block is self.always_active else block.index
            lines.append(f"{number:>5}  {block.name:<{width}}  {block.numel:>15,}  {share:>6.1%}  {mib:>12,.2f}")
        mib = sum(block.nbytes for block in self.parts) / 2**20
        lines.append(f"total  {total:<{width}}  {self.numel:>15,}  {1:>6.1%}  {mib:>12,.2f}")
        return "\n".join(lines)


def partition(
    model: nn.Module,
    group_size: int = 1,
    *,
    layers: Sequence[str] | None = None,
    frozen: Sequence[str] | None = None,
    always_active: Sequence[str] | int | None = None,
    trainable: Collection[str] | None = None,
) -> Plan:
    """Puts each trainable parameter of a model into exactly one block, or among those that are always active.

    The same model gives the same plan. No value of a parameter is read, so "meta" and fake tensors will do.

    Args:
        model: Any module; how its layers are found is told at the top of this file.
        group_size: Layers per block, at least 1. More than the model has gives one block.
        layers: Shell-style patterns on parameter names. Each makes one layer, called like the pattern, of all
            parameters that it matches and no earlier pattern took; it stands where the first of them stood.
            Parameters that no pattern matches keep the layer that was found for them.
        frozen: Shell-style patterns on parameter names that are never trained. A tied weight is matched under
            any of its names, here and in the other two.
        always_active: What is trained in every step, with whichever block has its turn: shell-style patterns on
            parameter names, or a number of layers from the top (of those that are trained; the head is one). What
            is frozen stays so.
        trainable: Names of the parameters to place; by default all that require a gradient.

    Raises:
        ConfigurationError: `group_size` or the number of layers that are always active is no whole number of at
            least 1; a pattern or name matches no parameter; a parameter has no shape yet (lazy modules); nothing is
            left to train, or to take turns.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigurationError(
            f"`group_size={group_size!r}` is not a number of layers: give a whole number of at least 1."
        )
    aliases = names_of_weights(model)
    weights = dict(model.named_parameters())
    chosen = _trainable(model, aliases, trainable) - _matched("frozen", frozen, aliases).keys()
    if not chosen:
        raise ConfigurationError(
            f"No parameter of `{class_of(model).__name__}` is left to train: leave `requires_grad` true on "
            f"some of them, or narrow `frozen={list(frozen or [])}`."
        )
    for name in sorted(chosen):
        if is_lazy(weights[name]):
            raise ConfigurationError(
                f"Parameter `{name}` of `{class_of(model).__name__}` has no shape yet: run one batch through the "
                "model before it is partitioned."
            )

    trained = _restricted(_override(layers_of(model), _matched("layers", layers, aliases)), chosen)
    check_always_active(always_active)
    if isinstance(always_active, int):
        constant = {name for layer in trained[-always_active:] for name in layer.parameters}
    else:
        constant = _matched("always_active", always_active, aliases).keys() & chosen
    kept = _restricted(trained, chosen - constant)
    if not kept:
        raise ConfigurationError(
            f"`always_active={always_active}` takes all parameters of `{class_of(model).__name__}` that this optimizer "
            f"trains (they are in {len(trained)} layers), and none is left to take turns: narrow it, or use full "
            "fine-tuning."
        )
    everywhere = tuple(name for layer in trained for name in layer.parameters if name in constant)
    groups = [tuple(kept[start : start + group_size]) for start in range(0, len(kept), group_size)]
    blocks = tuple(_block(index, group, weights, everywhere) for index, group in enumerate(groups))
    always = _block(len(blocks), (Layer("always active", everywhere),), weights) if everywhere else None
    return Plan(blocks, group_size, always)


def check_patterns(argument: str, patterns: Any) -> None:
    """Raise unless they are a list of strings, or `None`.

    Args:
        argument: its name, for the message.
        patterns: the value.

    Raises:
        ConfigurationError: if they are something else.
    """
    if isinstance(patterns, str):
        raise ConfigurationError(f"`{argument}={patterns!r}` is not a list of patterns: write `[{patterns!r}]`.")
    if patterns is None or (isinstance(patterns, Sequence) and all(isinstance(pattern, str) for pattern in patterns)):
        return
    raise ConfigurationError(
        f"`{argument}={patterns!r}` is not a list of patterns on parameter names: write them as in `['layers.0.*']`."
    )


def check_always_active(always_active: Sequence[str] | int | None) -> None:
    """Raise unless it is a number of layers, a list of patterns, or `None`.

    Args:
        always_active: the value.

    Raises:
        ConfigurationError: if it is something else: a number below 1, true or false, a number as text.
    """
    if isinstance(always_active, str) and always_active.isdecimal():
        raise ConfigurationError(
            f"`always_active={always_active!r}` is text; for so many layers from the top give the number, "
            f"`always_active={always_active}`."
        )
    if not isinstance(always_active, int):
        check_patterns("always_active", always_active)
    elif isinstance(always_active, bool) or always_active < 1:
        raise ConfigurationError(
            f"`always_active={always_active}` must be a number of layers from the top, at least 1, or a list of "
            "patterns on parameter names; leave it out to train every layer in its turns alone."
        )


def _restricted(layers: Sequence[Layer], names: Collection[str]) -> list[Layer]:
    """The layers with none but these parameters, without those that have nothing left."""
    left = [Layer(layer.name, tuple(name for name in layer.parameters if name in names)) for layer in layers]
    return [layer for layer in left if layer.parameters]


def _block(
    index: int, layers: tuple[Layer, ...], weights: Mapping[str, nn.Parameter], always_active: tuple[str, ...] = ()
) -> Block:
    members = [weights[name] for layer in layers for name in layer.parameters]
    numel = sum(weight.numel() for weight in members)
    nbytes = sum(weight.numel() * weight.element_size() for weight in members)
    return Block(index, layers, numel, nbytes, always_active)


def _trainable(model: nn.Module, aliases: dict[str, list[str]], trainable: Collection[str] | None) -> set[str]:
    if trainable is None:
        return {name for name, weight in model.named_parameters() if weight.requires_grad}
    first_name = {alias: first for first, names in aliases.items() for alias in names}
    for name in trainable:
        if name not in first_name:
            raise _no_such_name("trainable", name, first_name)
    return {first_name[name] for name in trainable}


def _matched(argument: str, patterns: Sequence[str] | None, aliases: dict[str, list[str]]) -> dict[str, str]:
    """Parameter name → the first pattern that matches one of its names."""
    check_patterns(argument, patterns)
    taken: dict[str, str] = {}
    for pattern in patterns or ():
        hits = [first for first, names in aliases.items() if any(fnmatchcase(name, pattern) for name in names)]
        if not hits:
            raise _no_such_name(argument, pattern, [name for names in aliases.values() for name in names])
        if argument == "layers" and taken.keys() >= set(hits):
            raise ConfigurationError(
                f"Pattern `{pattern}` in `layers` matches only parameters that earlier patterns took: "
                "put it before them, or leave it out."
            )
        for name in hits:
            taken.setdefault(name, pattern)
    return taken


def _no_such_name(argument: str, value: str, names: Collection[str]) -> ConfigurationError:
    folders = {".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)}
    candidates = list(names) if argument == "trainable" else [*names, *sorted(folders)]
    close = ", ".join(f"`{name}`" for name in difflib.get_close_matches(value, candidates, n=3, cutoff=0.0))
    return ConfigurationError(f"`{value}` in `{argument}` matches no parameter of the model: try one of {close}.")


def _override(found: list[Layer], pattern_of: dict[str, str]) -> list[Layer]:
    """Takes the parameters that a pattern matches out of their layers, into a layer for each pattern."""
    groups: dict[tuple[str, int], list[str]] = {}
    for index, layer in enumerate(found):
        for name in layer.parameters:
            key = (pattern_of[name], -1) if name in pattern_of else (layer.name, index)
            groups.setdefault(key, []).append(name)
    return [Layer(name, tuple(parameters)) for (name, _), parameters in groups.items()]
