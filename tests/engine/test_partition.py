"""Properties that hold for every model, and the arguments and messages of `partition`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.layers import Layer
from hift_lightning.engine.partition import Block, partition
from hift_lightning.engine.settings import HiFTSettings


class Residual(nn.Module):
    """Two submodules that own parameters, and one parameter of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)


class Network(nn.Module):
    """Children and bare parameters under names that a random draw chose."""

    def __init__(self, children: dict[str, nn.Module], bare: list[str]) -> None:
        super().__init__()
        for name in bare:
            self.register_parameter(name, nn.Parameter(torch.ones(3)))
        for name, child in children.items():
            self.add_module(name, child)


class Stack(nn.Module):
    """Embedding, `depth` layers, final norm, and a head that is tied on demand."""

    def __init__(self, depth: int = 5, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.layers = nn.ModuleList(Residual(4) for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight


WORDS = ["embed", "layers", "stem", "head", "final_norm", "out", "fc", "scale", "blocks", "logits"]
LEAVES = [
    lambda: nn.Linear(3, 3),
    lambda: nn.LayerNorm(3),
    lambda: nn.Embedding(5, 3),
    lambda: nn.Conv1d(3, 3, 1),
    lambda: nn.LSTM(3, 3),
    lambda: nn.MultiheadAttention(3, 1),
    lambda: nn.ReLU(),
    lambda: Residual(3),
    lambda: nn.TransformerEncoderLayer(3, 1, 3),
]
NAMES = st.lists(st.sampled_from(WORDS), unique=True, max_size=4)


def _network(children: list[nn.Module], names: list[str], bare: list[str]) -> nn.Module:
    return Network(dict(zip(names, children, strict=False)), [name for name in bare if name not in names])


def _repeated(child: nn.Module, times: int) -> nn.Module:
    return nn.ModuleList([child] * times)


def _grow(child: st.SearchStrategy[nn.Module]) -> st.SearchStrategy[nn.Module]:
    children = st.lists(child, max_size=4)
    return (
        st.builds(nn.ModuleList, children)
        | st.builds(lambda some: nn.Sequential(*some), children)
        | st.builds(_network, children, NAMES, NAMES)
        | st.builds(_repeated, child, st.integers(1, 3))
    )


MODULES = st.recursive(st.sampled_from(LEAVES).map(lambda make: make()), _grow, max_leaves=12)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """A random module tree with ties and frozen parameters, and at least one that trains."""
    parts = [draw(MODULES), *draw(st.lists(MODULES, max_size=2)), nn.Linear(3, 3)]
    model = Network({f"part{index}": part for index, part in enumerate(parts)}, draw(NAMES))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for one, other in draw(st.lists(st.tuples(st.sampled_from(linears), st.sampled_from(linears)), max_size=2)):
        other.weight = one.weight
    for weight in model.parameters():
        weight.requires_grad_(draw(st.integers(0, 4)) > 0)
    next(iter(linears[-1].parameters())).requires_grad_(True)
    return model


@settings(max_examples=150, deadline=None)
@given(models(), st.integers(1, 9))
def test_any_model_is_cut_into_blocks_that_hold_each_trainable_parameter_once(
    model: nn.Module, group_size: int
) -> None:
    plan = partition(model, group_size)
    placed = [name for block in plan.blocks for name in block.parameters]

    assert sorted(placed) == sorted(name for name, weight in model.named_parameters() if weight.requires_grad)
    weights = [id(model.get_parameter(name)) for name in placed]
    assert len(set(weights)) == len(weights)

    layers = partition(model).layers
    assert plan.layers == layers
    assert len(plan.blocks) == math.ceil(len(layers) / group_size)
    sizes = [len(block.layers) for block in plan.blocks]
    assert sizes[:-1] == [group_size] * (len(sizes) - 1)
    assert sizes[-1] == len(layers) - sum(sizes[:-1])
    assert all(layer.parameters for layer in layers)
    assert [block.index for block in plan.blocks] == list(range(len(plan.blocks)))

    assert plan.numel == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert partition(model, group_size) == plan
    assert partition(model, group_size).fingerprint() == plan.fingerprint()
    assert all(block.name in str(plan) for block in plan.blocks)


@settings(max_examples=60, deadline=None)
@given(models(), st.data())
def test_any_choice_of_names_is_placed_without_its_neighbours_moving(model: nn.Module, data: st.DataObject) -> None:
    names = [name for name, _ in model.named_parameters()]
    everywhere = partition(model, trainable=names)
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))

    kept = [tuple(name for name in layer.parameters if name in chosen) for layer in everywhere.layers]
    assert [layer.parameters for layer in partition(model, trainable=chosen).layers] == [some for some in kept if some]


@settings(max_examples=60, deadline=None)
@given(models(), st.data())
def test_any_patterns_for_layers_leave_a_partition(model: nn.Module, data: st.DataObject) -> None:
    names = [name for name, _ in model.named_parameters()]
    patterns = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=4))
    plan = partition(model, layers=patterns, trainable=names)

    assert sorted(name for block in plan.blocks for name in block.parameters) == sorted(names)
    for pattern in patterns:
        assert Layer(pattern, (pattern,)) in plan.layers


def test_a_layer_that_was_taken_out_is_none() -> None:
    model = Stack(depth=3)
    model.layers[1] = None  # as people do who prune layers

    assert [layer.name for layer in partition(model).layers] == ["embeddings", "layers.0", "layers.2", "head"]


def test_blocks_are_cut_from_the_bottom_and_the_last_is_smaller() -> None:
    plan = partition(Stack(depth=5), 3)

    assert [[layer.name for layer in block.layers] for block in plan.blocks] == [
        ["embeddings", "layers.0", "layers.1"],
        ["layers.2", "layers.3", "layers.4"],
        ["head"],
    ]
    assert [block.name for block in plan.blocks] == ["embeddings … layers.1", "layers.2 … layers.4", "head"]


def test_a_group_larger_than_the_model_gives_one_block() -> None:
    (block,) = partition(Stack(depth=2), 100).blocks

    assert len(block.layers) == 4


def test_sizes_are_those_of_the_weights_in_their_own_dtype() -> None:
    model = Stack(depth=2)
    model.layers[1].to(torch.bfloat16)
    plan = partition(model)

    numel = 4 + 2 * 4 + 4 * 4 + 4
    assert [(block.numel, block.nbytes) for block in plan.blocks] == [
        (44, 4 * 44),
        (numel, 4 * numel),
        (numel, 2 * numel),
        (52, 4 * 52),
    ]
    assert plan.numel == 96 + 2 * numel
    assert plan.largest is plan.blocks[3]


def test_the_largest_block_is_the_lowest_of_equals() -> None:
    plan = partition(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))

    assert plan.largest.index == 0


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_no_value_of_a_parameter_is_read(kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        model = Stack(tied=True)

    assert partition(model) == partition(Stack(tied=True))


def test_a_tied_weight_is_placed_once_under_its_first_name() -> None:
    plan = partition(Stack(tied=True))

    assert plan.blocks[0].parameters == ("embed.weight",)
    assert plan.blocks[-1].parameters == ("norm.weight", "norm.bias")


class Sampler(nn.Module):
    """Holds a weight that another module holds as well."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.mean = weight


class Sampled(nn.Module):
    """A layer that hands its weight to a child, as Bayesian layers do."""

    def __init__(self, weight: nn.Parameter, of_child: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.sampler = Sampler(weight if of_child is None else of_child)


def test_a_layer_may_share_its_weight_with_a_child() -> None:
    model = Network({name: Sampled(nn.Parameter(torch.ones(3))) for name in ("first", "second")}, [])

    assert partition(model).layers == (Layer("first", ("first.weight",)), Layer("second", ("second.weight",)))


def test_a_child_may_hold_only_what_the_model_itself_holds() -> None:
    model = Network({}, ["shared"])
    model.layer = Sampled(nn.Parameter(torch.ones(3)), of_child=model.shared)

    assert [name for layer in partition(model).layers for name in layer.parameters] == ["shared", "layer.weight"]


def test_the_fingerprint_is_that_of_the_blocks() -> None:
    model = Stack()
    plan = partition(model)

    assert len(plan.fingerprint()) == 64
    assert partition(Stack()).fingerprint() == plan.fingerprint()
    assert partition(model.to(torch.float64)).fingerprint() == plan.fingerprint()
    assert partition(model, 2).fingerprint() != plan.fingerprint()
    assert partition(model, frozen=["norm.bias"]).fingerprint() != plan.fingerprint()


def test_the_plan_prints_as_a_table() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024, bias=False))

    assert str(partition(model)) == (
        "block  layers         parameters   share           MiB\n"
        "    0  0               1,049,600   50.0%          4.00\n"
        "    1  1               1,048,576   50.0%          4.00\n"
        "total  2 layers        2,098,176  100.0%          8.00"
    )


def test_frozen_parameters_are_in_no_block_and_empty_layers_disappear() -> None:
    plan = partition(Stack(depth=3), frozen=["embed.*", "layers.1.*", "*.scale"])

    assert [layer.name for layer in plan.layers] == ["layers.0", "layers.2", "head"]
    assert not [name for layer in plan.layers for name in layer.parameters if name.endswith("scale")]


def test_a_frozen_pattern_may_match_what_is_frozen_already() -> None:
    model = Stack(depth=1)
    model.embed.requires_grad_(False)

    assert partition(model, frozen=["embed.*"]) == partition(model)


def test_a_tied_weight_is_frozen_under_any_of_its_names() -> None:
    plan = partition(Stack(depth=1, tied=True), frozen=["head.*"])

    assert [layer.name for layer in plan.layers] == ["layers.0", "head"]
    assert plan.layers[-1].parameters == ("norm.weight", "norm.bias")


def test_the_structure_does_not_depend_on_what_trains() -> None:
    model = Stack(depth=3).requires_grad_(False)
    model.layers[2].scale.requires_grad_(True)
    model.norm.requires_grad_(True)

    assert partition(model).layers == (
        Layer("layers.2", ("layers.2.scale",)),
        Layer("head", ("norm.weight", "norm.bias")),
    )


def test_trainable_names_the_parameters_to_place() -> None:
    model = Stack(depth=2, tied=True).requires_grad_(False)
    plan = partition(model, trainable={"head.weight", "layers.0.scale"})

    assert [layer.parameters for layer in plan.layers] == [("embed.weight",), ("layers.0.scale",)]


def test_a_pattern_makes_one_layer_where_its_first_parameter_stood() -> None:
    plan = partition(Stack(depth=4), layers=["layers.[12].*", "head.*"])

    assert [layer.name for layer in plan.layers] == [
        "embeddings",
        "layers.0",
        "layers.[12].*",
        "layers.3",
        "head",
        "head.*",
    ]
    assert len(plan.layers[2].parameters) == 10


def test_an_earlier_pattern_takes_precedence() -> None:
    plan = partition(Stack(depth=1), layers=["layers.0.norm.*", "layers.0.*"])

    assert plan.layers[1:3] == (
        Layer("layers.0.*", ("layers.0.scale", "layers.0.linear.weight", "layers.0.linear.bias")),
        Layer("layers.0.norm.*", ("layers.0.norm.weight", "layers.0.norm.bias")),
    )


@pytest.mark.parametrize("group_size", [0, -1, 1.5, "2", True, None])
def test_a_group_size_that_is_no_number_of_layers_is_refused(group_size: object) -> None:
    with pytest.raises(ConfigurationError, match=r"`group_size=.*` is not a number of layers: .* at least 1"):
        partition(Stack(), group_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["frozen", "layers", "always_active"])
def test_a_pattern_without_a_match_is_refused_with_close_names(argument: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"^`layer\.0\.\*` in `{argument}` matches no parameter .*`layers\.0\.\*`"
    ):
        partition(Stack(), **{argument: ["embed.*", "layer.0.*"]})


def test_a_module_path_in_place_of_a_pattern_is_answered_with_the_pattern() -> None:
    with pytest.raises(ConfigurationError, match=r"^`layers\.3\.norm` in `frozen` .*`layers\.3\.norm\.\*`"):
        partition(Stack(), frozen=["layers.3.norm"])


def test_an_unknown_trainable_name_is_refused_with_close_names() -> None:
    with pytest.raises(ConfigurationError, match=r"^`embed\.wieght` in `trainable` .*`embed\.weight`"):
        partition(Stack(), trainable=["embed.wieght"])


def test_a_pattern_that_is_left_with_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`layers\.0\.norm\.\*` in `layers` .* earlier patterns took"):
        partition(Stack(), layers=["layers.*", "layers.0.norm.*"])


@pytest.mark.parametrize("argument", ["frozen", "layers", "always_active"])
def test_a_lone_string_is_refused_rather_than_read_by_letters(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{argument}='\*'` is not a list of patterns: write `\['\*'\]`"):
        partition(Stack(), **{argument: "*"})


@pytest.mark.parametrize("argument", ["frozen", "layers", "always_active"])
@pytest.mark.parametrize("value", [1.5, [1], {"head.*": 1}])
def test_what_is_no_list_of_patterns_is_refused(argument: str, value: object) -> None:
    for refused in (lambda given: HiFTSettings(**given), lambda given: partition(Stack(), **given)):
        with pytest.raises(ConfigurationError, match=rf"^`{argument}=.*` is not a list of patterns on parameter names"):
            refused({argument: value})


def test_a_number_of_layers_in_quotes_is_answered_with_the_number() -> None:
    with pytest.raises(ConfigurationError, match="^`always_active='2'` is text; .* give the number, `always_active=2`"):
        HiFTSettings(always_active="2")


def test_nothing_left_to_train_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"No parameter of `Stack` is left to train.*`frozen=\['\*'\]`"):
        partition(Stack(), frozen=["*"])
    with pytest.raises(ConfigurationError, match="No parameter of `ReLU`"):
        partition(nn.ReLU())
    with pytest.raises(ConfigurationError, match="`requires_grad`"):
        partition(Stack().requires_grad_(False))
    with pytest.raises(ConfigurationError, match="is left to train"):
        partition(Stack(), trainable=[])


def test_a_lazy_parameter_is_refused_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ConfigurationError, match=r"`0\.\w+` of `Sequential` has no shape yet: run one batch"):
        partition(model)

    model(torch.ones(1, 3))
    assert partition(model).numel == 8


def test_blocks_and_layers_are_values() -> None:
    layer = Layer("a", ("a.weight",))

    assert Block(0, (layer,), 1, 4) == Block(0, (Layer("a", ("a.weight",)),), 1, 4)
    with pytest.raises(AttributeError):
        layer.name = "b"  # type: ignore[misc]
