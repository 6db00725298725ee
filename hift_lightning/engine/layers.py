"""Model → layers, as lists of parameter names.

HiFT (arXiv 2401.15207) moves consecutive layers. They are read from the module tree, never from the name of an
architecture:

1. All parameters count for the structure, frozen ones too, so a PEFT model has the layers of its host. A tied
   weight exists once, under the first of its names.
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
parameter is in exactly one layer.

Rules 2 and 3 are the layout "stacks", rule 4 is "modules"; a layout of one's own (`register_layout`) is asked before.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.registry import Registry

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


Layout: TypeAlias = Callable[[nn.Module], Sequence[Layer] | None]
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


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of a model, bottom first, over all its parameters, as the first layout that knows it says.

    Raises:
        ConfigurationError: if a layout that a user has registered leaves out a parameter, or gives one twice.
    """
    for name in reversed(list(LAYOUTS)):
        if (layers := LAYOUTS[name](model)) is not None:
            return _checked(name, layers, names_of_weights(model))
    raise AssertionError("the layout `modules` knows every model")


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
    return [layer.name for layer in layers_of(model) if layer.name in modules and layer.name not in no_modules]


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class as it was written; torch's ``fully_shard`` puts one of its own before it."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed."))


def names_of_weights(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each parameter → all its names; more than one if it is tied."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(weight), name), []).append(name)
    return aliases


class _Place(NamedTuple):
    """Where a layer stands; sorts from the bottom to the top."""

    level: int  # 0 bottom, 1 between, 2 head
    order: int
    name: str


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
    return [Layer(place.name or class_of(model).__name__, tuple(groups[place])) for place in sorted(groups)]


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
    classes = Counter(class_of(element) for element in composite)
    repeated = [index for index, element in enumerate(elements) if classes[class_of(element)] > 1]
    # what stands before and behind the repetition is a stem and a head, not a layer
    between = elements[repeated[0] : repeated[-1] + 1] if repeated else []
    return [element for element in between if len(_owners(element)) > 1]


def _is_nested_stack(element: nn.Module) -> bool:
    # Without a repeated class it is a layer written as a list, such as ModuleList([attention, feed_forward]).
    classes = Counter(class_of(inner) for inner in _elements(element))
    return class_of(element) in (nn.ModuleList, nn.Sequential) and any(count > 1 for count in classes.values())


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
    words |= {word for path in own for word in _words(class_of(modules[path]).__name__)}
    return "embedding" if any(word.startswith("embed") for word in words) else None


def _without_stacks(names: list[str], modules: dict[str, nn.Module]) -> dict[str, _Place]:
    """Makes each unit a layer, except that embeddings stand together and norms go with their neighbour."""
    owners_within: dict[str, list[str]] = defaultdict(list)
    for owner in dict.fromkeys(map(_owner, names)):
        for path in _prefixes(owner):
            owners_within[path].append(owner)
    units: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if _enclosing(path, units) is None and _is_unit(path, module, owners_within[path]):
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


def _is_unit(path: str, module: nn.Module, owners: list[str]) -> bool:
    # torch's own modules stay whole (attention, LSTM, a parametrized Linear), unless they only hold others
    holds = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    return owners == [path] or (bool(owners) and class_of(module).__module__.startswith("torch.nn.") and not holds)


def _owners(module: nn.Module) -> list[nn.Module]:
    """The modules at or below this one that own parameters directly; what several hold is owned by the first."""
    owners = []
    seen: set[nn.Parameter] = set()
    for part in module.modules():
        own = set(part.parameters(recurse=False)) - seen
        if own:
            owners.append(part)
            seen |= own
    return owners


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in class_of(module).__name__


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
