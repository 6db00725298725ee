"""Model → layers → blocks, as lists of parameter names.

HiFT (arXiv 2401.15207, section 3) trains one block of consecutive layers in each optimizer step. The layers
are read from the module tree, never from the name of an architecture:

1. All parameters count for the structure, frozen ones too, so a PEFT model has the layers of its host. A tied
   weight exists once, under the first of its names. Layers with nothing to train are dropped at the end.
2. A *stack* is an `nn.ModuleList` with elements that own parameters in two or more modules, or an
   `nn.Sequential` in which such elements repeat a class. Its elements are the layers. The outermost stack
   wins: the experts of a mixture or the sublayers of a T5 block stay inside their layer. Only an element that
   wraps a stack of one class and has nothing but norms beside it (a stage of a ResNet) is opened.
3. Parameters outside the stacks are *loose*. Embeddings go to the bottom layer, wherever they are registered.
   The others go by their place in the order of registration: before the first stack to the bottom, behind
   the last one to the head (final norm, pooler and classifier together), in between to the nearest layer.
   Two things correct that order: a name that says "top" (OPT registers its final norm before its stack), and
   that a bare `nn.Parameter` on a module that contains the layers makes no layer of its own.
4. Without a stack (a plain `nn.Sequential` of linear layers, a CNN with attributes) each `torch.nn` module is
   a layer. Embeddings are together at the bottom, a norm goes with its neighbour, the final norm with the head.

*Nearest* means: the longest common module path, then the one registered before, then the shortest distance.
A placement that misses what the forward pass does costs time, not correctness: whatever the order, each
trainable parameter is in exactly one block. The `layers` patterns override what was found.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from hift_lightning.engine.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_TOP_WORDS = {"final", "out", "head", "classifier", "logit", "logits"}


@dataclass(frozen=True)
class Layer:
    """The smallest unit that the method moves.

    Attributes:
        name: A module path such as "encoder.layer.3"; or "embeddings", "stem" (what feeds the first layer of
            a stack and is no embedding) or "head"; or the pattern that the user gave for it.
        parameters: Qualified names as in `model.named_parameters()`; of a tied weight the first name.
    """

    name: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """`group_size` consecutive layers: what is active in one optimizer step.

    Attributes:
        index: Position in the plan, 0 at the bottom of the model.
        layers: The layers, bottom first.
        numel: Elements of all its parameters.
        nbytes: Bytes of these weights in the dtype that they have now.
    """

    index: int
    layers: tuple[Layer, ...]
    numel: int
    nbytes: int

    @property
    def name(self) -> str:
        """The name of its only layer, or those of its lowest and highest layer."""
        first, last = self.layers[0].name, self.layers[-1].name
        return first if len(self.layers) == 1 else f"{first} … {last}"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameter names of all its layers, bottom first."""
        return tuple(name for layer in self.layers for name in layer.parameters)


@dataclass(frozen=True)
class Plan:
    """All blocks of a model, bottom first; `print(plan)` shows them as a table.

    Attributes:
        blocks: `ceil(layers / group_size)` blocks, of which the last may have fewer layers.
        group_size: Layers per block (the paper's m).
    """

    blocks: tuple[Block, ...]
    group_size: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of all blocks, bottom first."""
        return tuple(layer for block in self.blocks for layer in block.layers)

    @property
    def numel(self) -> int:
        """Elements of all parameters in the plan."""
        return sum(block.numel for block in self.blocks)

    @property
    def largest(self) -> Block:
        """The block with the most elements, the lowest of equals; it decides the peak of memory."""
        return max(self.blocks, key=lambda block: block.numel)

    def fingerprint(self) -> str:
        """The SHA-256, in hexadecimal, of the blocks' parameter names; equal if and only if the blocks are."""
        names = json.dumps([block.parameters for block in self.blocks])
        return hashlib.sha256(names.encode()).hexdigest()

    def __str__(self) -> str:
        nbytes = sum(block.nbytes for block in self.blocks)
        rows = [("block", "layers", "parameters", "share", "MiB")]
        rows += [
            (
                str(b.index),
                b.name,
                f"{b.numel:,}",
                f"{b.numel / max(self.numel, 1):.1%}",
                f"{b.nbytes / 2**20:,.2f}",
            )
            for b in self.blocks
        ]
        rows += [("total", f"{len(self.layers)} layers", f"{self.numel:,}", "", f"{nbytes / 2**20:,.2f}")]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            f"{index:>{widths[0]}}  {name:<{widths[1]}}  {numel:>{widths[2]}}  {share:>{widths[3]}}  {mib:>{widths[4]}}"
            for index, name, numel, share, mib in rows
        )


def partition(
    model: nn.Module,
    group_size: int = 1,
    *,
    layers: Sequence[str] | None = None,
    frozen: Sequence[str] | None = None,
    trainable: Collection[str] | None = None,
) -> Plan:
    """Puts each trainable parameter of a model into exactly one block.

    The same model gives the same plan. No value of a parameter is read, so "meta" and fake tensors will do.

    Args:
        model: Any module; how its layers are found is told at the top of this file.
        group_size: Layers per block, at least 1. More than the model has gives one block.
        layers: Shell-style patterns on parameter names. Each makes one layer, called like the pattern, of all
            parameters that it matches and no earlier pattern took; it stands where the first of them stood.
            Parameters that no pattern matches keep the layer that was found for them.
        frozen: Shell-style patterns on parameter names that are never trained. A tied weight is matched under
            any of its names, here and in `layers`.
        trainable: Names of the parameters to place; by default all that require a gradient.

    Raises:
        ConfigurationError: `group_size` is no whole number of at least 1; a pattern or name matches no
            parameter; a parameter has no shape yet (lazy modules); nothing is left to train.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ConfigurationError(
            f"`group_size={group_size!r}` is not a number of layers per block: give a whole number of at least 1."
        )
    aliases = _names_of_weights(model)
    weights = dict(model.named_parameters())
    chosen = _trainable(model, aliases, trainable) - _matched("frozen", frozen, aliases).keys()
    if not chosen:
        raise ConfigurationError(
            f"No parameter of `{type(model).__name__}` is left to train: leave `requires_grad` true on some of "
            f"them, or narrow `frozen={list(frozen or [])}`."
        )
    for name in sorted(chosen):
        if is_lazy(weights[name]):
            raise ConfigurationError(
                f"Parameter `{name}` of `{type(model).__name__}` has no shape yet: run one batch through the model "
                "before it is partitioned."
            )

    placed = _override(_find_layers(model), _matched("layers", layers, aliases))
    kept = [Layer(layer.name, tuple(name for name in layer.parameters if name in chosen)) for layer in placed]
    kept = [layer for layer in kept if layer.parameters]
    blocks = []
    for index, start in enumerate(range(0, len(kept), group_size)):
        group = tuple(kept[start : start + group_size])
        members = [weights[name] for layer in group for name in layer.parameters]
        numel = sum(weight.numel() for weight in members)
        nbytes = sum(weight.numel() * weight.element_size() for weight in members)
        blocks.append(Block(index, group, numel, nbytes))
    return Plan(tuple(blocks), group_size)


def _names_of_weights(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter → all its names; more than one if it is tied."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(weight), name), []).append(name)
    return aliases


def _trainable(
    model: nn.Module, aliases: dict[str, list[str]], trainable: Collection[str] | None
) -> set[str]:
    if trainable is None:
        return {name for name, weight in model.named_parameters() if weight.requires_grad}
    first_name = {alias: first for first, names in aliases.items() for alias in names}
    for name in trainable:
        if name not in first_name:
            raise _no_such_name("trainable", name, first_name)
    return {first_name[name] for name in trainable}


def _matched(argument: str, patterns: Sequence[str] | None, aliases: dict[str, list[str]]) -> dict[str, str]:
    """Parameter name → the first pattern that matches one of its names."""
    if isinstance(patterns, str):
        raise ConfigurationError(
            f"`{argument}={patterns!r}` is not a list of patterns: write `[{patterns!r}]`."
        )
    taken: dict[str, str] = {}
    for pattern in patterns or ():
        hits = [
            first for first, names in aliases.items() if any(fnmatchcase(name, pattern) for name in names)
        ]
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
    folders = {
        ".".join(name.split(".")[:depth]) + ".*" for name in names for depth in range(1, name.count(".") + 1)
    }
    candidates = list(names) if argument == "trainable" else [*names, *sorted(folders)]
    close = ", ".join(f"`{name}`" for name in difflib.get_close_matches(value, candidates, n=3, cutoff=0.0))
    return ConfigurationError(
        f"`{value}` in `{argument}` matches no parameter of the model: close names are {close}."
    )


def _override(found: list[Layer], pattern_of: dict[str, str]) -> list[Layer]:
    """Takes the parameters that a pattern matches out of their layers, into a layer for each pattern."""
    groups: dict[tuple[str, int], list[str]] = {}
    for index, layer in enumerate(found):
        for name in layer.parameters:
            key = (pattern_of[name], -1) if name in pattern_of else (layer.name, index)
            groups.setdefault(key, []).append(name)
    return [Layer(name, tuple(parameters)) for (name, _), parameters in groups.items()]


class _Place(NamedTuple):
    """Where a layer stands; sorts from the bottom to the top."""

    level: int  # 0 bottom, 1 between, 2 head
    order: int
    name: str


def _find_layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, bottom first, over all its parameters."""
    names = [name for name, _ in model.named_parameters()]
    modules = dict(model.named_modules())
    stacked = [
        path for path in _layers_of_stacks(modules) if any(name.startswith(f"{path}.") for name in names)
    ]
    places = _around_stacks(names, modules, stacked) if stacked else _without_stacks(names, modules)
    groups: dict[_Place, list[str]] = {}
    for name in names:
        groups.setdefault(places[name], []).append(name)
    return [Layer(place.name or type(model).__name__, tuple(groups[place])) for place in sorted(groups)]


# --- stacks ---------------------------------------------------------------------------------------------------


def _owners(module: nn.Module) -> list[nn.Module]:
    """The modules at or below this one that own parameters directly."""
    return [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]


def _elements(container: nn.ModuleList | nn.Sequential) -> list[nn.Module]:
    """The elements of a container that are layers; empty if it is no stack."""
    # list() keeps the repetitions of a shared element, which children() would drop
    elements = [element for element in list(container) if _owners(element)]
    composite = [len(_owners(element)) > 1 for element in elements]
    if isinstance(container, nn.ModuleList):
        return elements if any(composite) else []
    classes = Counter(type(element) for element, many in zip(elements, composite, strict=True) if many)
    repeated = [index for index, element in enumerate(elements) if classes[type(element)] > 1]
    if not repeated:
        return []
    # what stands before and behind the repetition is a stem and a head, not a layer
    span = range(repeated[0], repeated[-1] + 1)
    return [elements[index] for index in span if composite[index]]


def _only_wraps_a_stack(element: nn.Module) -> bool:
    for part in element.modules():
        if type(part) in (nn.ModuleList, nn.Sequential):
            assert isinstance(part, nn.ModuleList | nn.Sequential)
            classes = Counter(type(inner) for inner in _elements(part))
            if classes and max(classes.values()) > 1:
                inside = set(_owners(part))
                return all(_is_norm(owner) for owner in _owners(element) if owner not in inside)
    return False


def _layers_of_stacks(modules: dict[str, nn.Module]) -> list[str]:
    """The paths of the stacks' elements, in the order of registration."""
    path_of = {id(module): path for path, module in modules.items()}
    found: dict[str, None] = {}
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList | nn.Sequential) and _enclosing(path, found) is None:
            for element in _elements(module):
                element_path = path_of[id(element)]
                if not _only_wraps_a_stack(element) and _enclosing(element_path, found) is None:
                    found[element_path] = None
    return list(found)


def _around_stacks(names: list[str], modules: dict[str, nn.Module], stacked: list[str]) -> dict[str, _Place]:
    """Places the stacks' elements as they are, and what is loose by its words and its position."""
    places: dict[str, _Place] = {}
    for index, path in enumerate(stacked):
        places |= {name: _Place(1, index, path) for name in names if name.startswith(f"{path}.")}
    inside = [index for index, name in enumerate(names) if name in places]
    ancestors = {prefix for path in stacked for prefix in _prefixes(path)[:-1]}

    embeddings: list[str] = []
    stem: list[str] = []
    head: list[str] = []
    joined: dict[str, _Place] = {}
    for index, name in enumerate(names):
        if name in places:
            continue
        says = _what_its_name_says(name, modules, ancestors)
        if says == "embedding":
            embeddings.append(name)
        elif index < inside[0]:
            (head if says == "top" else stem).append(name)
        elif index > inside[-1]:
            head.append(name)
        else:
            joined[name] = places[names[_nearest(index, inside, names)]]

    def makes_a_layer(loose: list[str]) -> bool:
        return any(_owner(name) not in ancestors for name in loose)

    bottom_place, head_place = _Place(0, 0, "embeddings" if embeddings else "stem"), _Place(2, 0, "head")
    if not embeddings and not makes_a_layer(stem):
        bottom_place = places[names[inside[0]]]
    if not makes_a_layer(head):
        head_place = places[names[inside[-1]]]
    return places | joined | dict.fromkeys(embeddings + stem, bottom_place) | dict.fromkeys(head, head_place)


def _what_its_name_says(name: str, modules: dict[str, nn.Module], ancestors: set[str]) -> str | None:
    """Whether a loose parameter calls itself an "embedding" or the "top" of the model."""
    # An ancestor of the layers does not count: `SentenceEmbedder` around a whole BERT says nothing of its parts.
    own = [path for path in _prefixes(_owner(name)) if path not in ancestors]
    if any(isinstance(modules[path], nn.Embedding | nn.EmbeddingBag) for path in own):
        return "embedding"
    above = max((path for path in _prefixes(name) if path in ancestors), key=len)
    words = _words(name[len(above) :])
    if words & _TOP_WORDS:
        return "top"  # first, for GPT-NeoX calls its LM head `embed_out`
    words |= {word for path in own for word in _words(type(modules[path]).__name__)}
    return "embedding" if any(word.startswith("embed") for word in words) else None


# --- no stack -------------------------------------------------------------------------------------------------


def _without_stacks(names: list[str], modules: dict[str, nn.Module]) -> dict[str, _Place]:
    """Makes each unit a layer, except that embeddings stand together and norms go with their neighbour."""
    units: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if _is_unit(module) and _enclosing(path, units) is None:
            units[path] = module
    if not all(_is_norm(module) for module in units.values()):
        units = {path: module for path, module in units.items() if not _is_norm(module)}

    places: dict[str, _Place] = {}
    for index, (path, unit) in enumerate(units.items()):
        embeds = isinstance(unit, nn.Embedding | nn.EmbeddingBag)
        place = _Place(0, 0, "embeddings") if embeds else _Place(1, index, path)
        places |= {name: place for name in names if path in _prefixes(_owner(name))}
    inside = [index for index, name in enumerate(names) if name in places]
    top = max(places.values())
    joined: dict[str, _Place] = {}
    for index, name in enumerate(names):
        if name not in places:
            nearest = _nearest(index, inside, names)
            following = next((after for after in inside if after > index), nearest)
            is_final_norm = _is_norm(modules[_owner(name)]) and places[names[following]] == top
            if is_final_norm and _common(name, names[following]) == _common(name, names[nearest]):
                nearest = following
            joined[name] = places[names[nearest]]
    return places | joined


def _is_unit(module: nn.Module) -> bool:
    owners = _owners(module)
    if owners == [module]:
        return True
    # torch's own modules stay whole (attention, LSTM, a parametrized Linear), unless they only hold others
    holds = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return bool(owners) and type(module).__module__.startswith("torch.nn.") and not holds


# --- paths and names ------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _prefixes(path: str) -> list[str]:
    """All paths that contain this one, from the root: "a.b" gives "", "a", "a.b"."""
    pieces = path.split(".") if path else []
    return [".".join(pieces[:depth]) for depth in range(len(pieces) + 1)]


def _enclosing(path: str, among: Collection[str]) -> str | None:
    """The one of some module paths that contains this path or is equal to it."""
    return next((prefix for prefix in _prefixes(path) if prefix in among), None)


def _common(name: str, other: str) -> int:
    """How many modules two parameters have in common on their way from the root."""
    return len(set(_prefixes(_owner(name))) & set(_prefixes(_owner(other))))


def _nearest(index: int, candidates: list[int], names: list[str]) -> int:
    """The candidate nearest in the tree; of equals one before rather than behind; of these the closest."""
    return max(
        candidates,
        key=lambda other: (_common(names[index], names[other]), other < index, -abs(other - index)),
    )


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}
