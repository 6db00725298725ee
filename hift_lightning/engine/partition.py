"""Model → layers → blocks, as lists of parameter names.

HiFT (arXiv 2401.15207) trains one block of consecutive layers in each optimizer step. The layers
are read from the module tree, never from the name of an architecture:

1. All parameters count for the structure, frozen ones too, so a PEFT model has the layers of its host. A tied
   weight exists once, under the first of its names. Layers with nothing to train are dropped at the end.
2. A *stack* is an `nn.ModuleList` with elements that own parameters in two or more modules, or an
   `nn.Sequential` in which such elements repeat a class. Its elements are the layers. The outermost stack
   wins: the experts of a mixture or the sublayers of a T5 block stay inside their layer. Only an element that
   is itself a bare list of such elements (a stage of a ResNet) is opened.
3. Parameters outside the stacks are *loose*. Embeddings go to the bottom layer, wherever they are registered.
   The others go by their place in the order of registration: before the first stack to the bottom, behind
   the last one to the head (final norm, pooler and classifier together), in between to the nearest layer.
   Two things correct that order: a name that says "top" (OPT registers its final norm before its stack), and
   that a bare `nn.Parameter` on a module that contains the layers makes no layer of its own.
4. Without a stack (a plain `nn.Sequential` of linear layers, a CNN with attributes) each `torch.nn` module is
   a layer. Embeddings stand together at the bottom, a norm goes with its neighbour, the final one with the
   last layer.

*Nearest* means: the longest common module path, then the one registered before, then the shortest distance.
A placement that misses what the forward pass does costs time, not correctness: whatever the order, each
trainable parameter is in exactly one block. The `layers` patterns override what was found, and
`always_active`, patterns or a number of layers from the top, takes parameters out of the turns: they are trained in
every step, as embeddings and head are in LISA (https://arxiv.org/abs/2403.17919).

Rules 2 and 3 are the layout "stacks", rule 4 is "modules"; a layout of one's own (`register_layout`) is asked before.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_PLACES = ("embeddings", "stem", "head")
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


Layout: TypeAlias = "Callable[[nn.Module], Sequence[Layer] | None]"
"""A function from a model to its layers, bottom first; `None` where it has nothing to say about this model."""

LAYOUTS: Registry[Layout] = Registry("register_layout")
"""The layouts by name. The one registered last is asked first, and the first answer counts."""


def register_layout(name: str) -> Callable[[Layout], Layout]:
    """A decorator that makes a function a layout, which is asked before all that are there.

    The function is given the model as it is trained (under Lightning the LightningModule) and returns its layers,
    bottom first, with each of its parameters in one of them; or `None`, and the next layout is asked.

    Args:
        name: for messages.

    Raises:
        ConfigurationError: if another layout has this name.
    """
    return LAYOUTS.register(name)


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
    aliases = _names_of_weights(model)
    weights = dict(model.named_parameters())
    chosen = _trainable(model, aliases, trainable) - _matched("frozen", frozen, aliases).keys()
    if not chosen:
        raise ConfigurationError(
            f"No parameter of `{type(model).__name__}` is left to train: leave `requires_grad` true on "
            f"some of them, or narrow `frozen={list(frozen or [])}`."
        )
    for name in sorted(chosen):
        if is_lazy(weights[name]):
            raise ConfigurationError(
                f"Parameter `{name}` of `{type(model).__name__}` has no shape yet: run one batch through the "
                "model before it is partitioned."
            )

    placed = _override(_lay_out(model, aliases), _matched("layers", layers, aliases))
    check_always_active(always_active)
    if isinstance(always_active, int):
        constant = {name for layer in _restricted(placed, chosen)[-always_active:] for name in layer.parameters}
    else:
        constant = _matched("always_active", always_active, aliases).keys() & chosen
    kept = _restricted(placed, chosen - constant)
    if not kept:
        raise ConfigurationError(
            f"`always_active={always_active}` takes all parameters of `{type(model).__name__}` that this optimizer "
            f"trains (they are in {len(_restricted(placed, chosen))} layers), and none is left to take turns: narrow "
            "it, or use full fine-tuning."
        )
    everywhere = tuple(name for layer in _restricted(placed, constant) for name in layer.parameters)
    groups = [tuple(kept[start : start + group_size]) for start in range(0, len(kept), group_size)]
    blocks = tuple(_block(index, group, weights, everywhere) for index, group in enumerate(groups))
    always = _block(len(blocks), (Layer("always active", everywhere),), weights) if everywhere else None
    return Plan(blocks, group_size, always)


def modules_of_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are a module of the model, bottom first, whether they are trained or not.

    What stands around stacks has the name of its place ("embeddings", "stem", "head") and is none of them, even where a
    module is called so: with it go the final norm, or embeddings from elsewhere.

    Args:
        model: any module.
    """
    names, modules = _names_and_modules(model)
    stacks = set(_inside_stacks(names, modules).values())
    no_modules = set(_PLACES) - stacks if stacks else set()
    found = partition(model, trainable=names).layers
    return [layer.name for layer in found if layer.name in modules and layer.name not in no_modules]


def check_patterns(argument: str, patterns: Any) -> None:
    """Raise unless they are a list of strings, or `None`.

    Args:
        argument: for the message.
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
    """Raise if it is a number that is none of layers.

    Args:
        always_active: patterns, or a number of layers from the top.

    Raises:
        ConfigurationError: if it is a number below 1, true or false, or no list of patterns.
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


def _names_of_weights(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter → all its names; more than one if it is tied."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(weight), name), []).append(name)
    return aliases


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


class _Place(NamedTuple):
    """Where a layer stands; sorts from the bottom to the top."""

    level: int  # 0 bottom, 1 between, 2 head
    order: int
    name: str


def _lay_out(model: nn.Module, aliases: dict[str, list[str]]) -> list[Layer]:
    """The layers of a model, bottom first, over all its parameters, as the first layout that knows it says."""
    for name in reversed(list(LAYOUTS)):
        if (layers := LAYOUTS[name](model)) is not None:
            return _checked(name, layers, aliases)
    raise AssertionError("the layout `modules` knows every model")


def _checked(layout: str, layers: Sequence[Layer], aliases: dict[str, list[str]]) -> list[Layer]:
    """The layers, under the first names of tied weights; raises unless every parameter is in one of them."""
    first_name = {alias: first for first, names in aliases.items() for alias in names}
    layer_of: dict[str, str] = {}
    checked = []
    for layer in layers:
        if not isinstance(layer, Layer) or isinstance(layer.parameters, str):
            raise ConfigurationError(
                f"The layout `{layout}` gave {layer!r}; let it return `Layer(name, parameters)`, with the names of "
                "parameters as in `model.named_parameters()`."
            )
        parameters = []
        for name in layer.parameters:
            if name not in first_name:
                raise ConfigurationError(
                    f"The layout `{layout}` puts `{name}` into layer `{layer.name}`, and the model has no parameter of "
                    "that name; take the names of `model.named_parameters()`."
                )
            first = first_name[name]
            if first in layer_of:
                raise ConfigurationError(
                    f"The layout `{layout}` puts parameter `{name}` into layer `{layer.name}`, and it is in "
                    f"`{layer_of[first]}` already; a parameter, by whatever name, belongs to one layer."
                )
            layer_of[first] = layer.name
            parameters.append(first)
        checked.append(Layer(layer.name, tuple(parameters)))
    if forgotten := [name for name in aliases if name not in layer_of]:
        raise ConfigurationError(
            f"The layout `{layout}` puts {len(forgotten)} parameters into no layer: "
            f"{', '.join(f'`{name}`' for name in forgotten[:3])}{', …' if len(forgotten) > 3 else ''}; put every "
            "parameter into one, and leave out what shall not train with `frozen`."
        )
    return checked


@register_layout("modules")
def _modules(model: nn.Module) -> list[Layer]:
    names, modules = _names_and_modules(model)
    return _in_places(model, names, _without_stacks(names, modules))


@register_layout("stacks")
def _stacks(model: nn.Module) -> list[Layer] | None:
    names, modules = _names_and_modules(model)
    inside = _inside_stacks(names, modules)
    return _in_places(model, names, _around_stacks(names, modules, inside)) if inside else None


def _names_and_modules(model: nn.Module) -> tuple[list[str], dict[str, nn.Module]]:
    return [name for name, _ in model.named_parameters()], dict(model.named_modules())


def _in_places(model: nn.Module, names: list[str], places: dict[str, _Place]) -> list[Layer]:
    groups: dict[_Place, list[str]] = {}
    for name in names:
        groups.setdefault(places[name], []).append(name)
    return [Layer(place.name or _class_of(model).__name__, tuple(groups[place])) for place in sorted(groups)]


def _inside_stacks(names: list[str], modules: dict[str, nn.Module]) -> dict[str, str]:
    """Parameter name → path of the stack's element that it lies in."""
    path_of = {id(module): path for path, module in modules.items()}
    found: set[str] = set()
    for path, module in modules.items():
        if _enclosing(path, found) is None:
            elements = [path_of[id(element)] for element in _elements(module) if not _is_nested_stack(element)]
            found.update([element for element in elements if _enclosing(element, found) is None])
    return {name: element for name in names if (element := _enclosing(name, found)) is not None}


def _elements(container: nn.Module) -> list[nn.Module]:
    """The elements that make a container a stack; empty if it is none."""
    if not isinstance(container, nn.ModuleList | nn.Sequential):
        return []
    # list() keeps the repetitions of a shared element, which children() would drop
    elements = [element for element in list(container) if element is not None and _owners(element)]
    composite = [element for element in elements if len(_owners(element)) > 1]
    if isinstance(container, nn.ModuleList):
        return elements if composite else []
    classes = Counter(_class_of(element) for element in composite)
    repeated = [index for index, element in enumerate(elements) if classes[_class_of(element)] > 1]
    # what stands before and behind the repetition is a stem and a head, not a layer
    between = elements[repeated[0] : repeated[-1] + 1] if repeated else []
    return [element for element in between if len(_owners(element)) > 1]


def _is_nested_stack(element: nn.Module) -> bool:
    # Without a repeated class it is a layer written as a list, such as ModuleList([attention, feed_forward]).
    classes = Counter(_class_of(inner) for inner in _elements(element))
    return _class_of(element) in (nn.ModuleList, nn.Sequential) and any(count > 1 for count in classes.values())


def _around_stacks(names: list[str], modules: dict[str, nn.Module], inside: dict[str, str]) -> dict[str, _Place]:
    """Places the parameters of the stacks, then the loose ones by what their names say and where they stand."""
    order = {path: index for index, path in enumerate(dict.fromkeys(inside.values()))}
    places = {name: _Place(1, order[path], path) for name, path in inside.items()}
    ancestors = {prefix for path in order for prefix in _prefixes(path)[:-1]}
    positions = [index for index, name in enumerate(names) if name in inside]
    first, last = positions[0], positions[-1]

    says = {name: _what_its_name_says(name, modules, ancestors) for name in names if name not in inside}
    bottom: list[str] = []
    head: list[str] = []
    for index, name in enumerate(names):
        if name in inside:
            continue
        if says[name] == "embedding" or (index < first and says[name] != "top"):
            bottom.append(name)
        elif index < first or index > last:
            head.append(name)
        else:
            places[name] = places[names[_nearest(index, positions, names)]]

    def make_a_layer(loose: list[str]) -> bool:
        return any(says[name] == "embedding" or _owner(name) not in ancestors for name in loose)

    bottom_name = "embeddings" if "embedding" in says.values() else "stem"
    bottom_place = _Place(0, 0, bottom_name) if make_a_layer(bottom) else places[names[first]]
    head_place = _Place(2, 0, "head") if make_a_layer(head) else places[names[last]]
    return places | dict.fromkeys(bottom, bottom_place) | dict.fromkeys(head, head_place)


def _what_its_name_says(name: str, modules: dict[str, nn.Module], ancestors: set[str]) -> str | None:
    """Whether a loose parameter calls itself an "embedding" or the "top" of the model."""
    # The layers' ancestors do not count: a `SentenceEmbedder` around a whole BERT says nothing of its parts.
    own = [path for path in _prefixes(_owner(name)) if path not in ancestors]
    if any(isinstance(modules[path], nn.Embedding | nn.EmbeddingBag) for path in own):
        return "embedding"
    above = max((path for path in _prefixes(name) if path in ancestors), key=len)
    words = _words(name[len(above) :])
    if words & _TOP_WORDS:
        return "top"  # asked first, for GPT-NeoX has called its LM head `embed_out`
    words |= {word for path in own for word in _words(_class_of(modules[path]).__name__)}
    return "embedding" if any(word.startswith("embed") for word in words) else None


def _without_stacks(names: list[str], modules: dict[str, nn.Module]) -> dict[str, _Place]:
    """Makes each unit a layer, except that embeddings stand together and norms go with their neighbour."""
    units: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if _enclosing(path, units) is None and _is_unit(module):
            units[path] = module
    without_norms = {path: module for path, module in units.items() if not _is_norm(module)}
    units = without_norms or units

    order = {path: index for index, path in enumerate(units)}
    places: dict[str, _Place] = {}
    for name in names:
        if (unit := _enclosing(_owner(name), units)) is not None:
            embeds = isinstance(units[unit], nn.Embedding | nn.EmbeddingBag)
            places[name] = _Place(0, 0, "embeddings") if embeds else _Place(1, order[unit], unit)
    positions = [index for index, name in enumerate(names) if name in places]
    top = max(places.values())
    for index, name in enumerate(names):
        if name in places:
            continue
        nearest = names[_nearest(index, positions, names)]
        following = next((names[other] for other in positions if other > index), nearest)
        is_final_norm = _is_norm(modules[_owner(name)]) and places[following] == top
        joins_head = is_final_norm and _common(name, following) == _common(name, nearest)
        places[name] = places[following if joins_head else nearest]
    return places


def _is_unit(module: nn.Module) -> bool:
    owners = _owners(module)
    # torch's own modules stay whole (attention, LSTM, a parametrized Linear), unless they only hold others
    holds = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return owners == [module] or (bool(owners) and _class_of(module).__module__.startswith("torch.nn.") and not holds)


def _owners(module: nn.Module) -> list[nn.Module]:
    """The modules at or below this one that own parameters directly."""
    return [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in _class_of(module).__name__


def _class_of(module: nn.Module) -> type[nn.Module]:
    # torch's `fully_shard` puts classes of its own before that of the module
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _prefixes(path: str) -> list[str]:
    """All paths that contain this one, from the root: "a.b" gives "", "a", "a.b"."""
    pieces = path.split(".") if path else []
    return [".".join(pieces[:depth]) for depth in range(len(pieces) + 1)]


def _enclosing(path: str, among: Collection[str]) -> str | None:
    """The outermost of some module paths that contains this path or is equal to it."""
    return next((prefix for prefix in _prefixes(path) if prefix in among), None)


def _common(name: str, other: str) -> int:
    """How many modules two parameters have in common on their way from the root."""
    return len(set(_prefixes(_owner(name))) & set(_prefixes(_owner(other))))


def _nearest(index: int, candidates: list[int], names: list[str]) -> int:
    """The candidate nearest in the tree; of equals one before rather than behind; of these the closest."""
    return max(candidates, key=lambda other: (_common(names[index], names[other]), other < index, -abs(other - index)))


def _words(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}
