"""What a user registers is found by its name, and a name means one thing."""

import pytest
import torch

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.layers import LAYOUTS, Layer, register_layout
from hift_lightning.engine.partition import partition
from hift_lightning.engine.registry import Registry
from hift_lightning.engine.rotation import ORDERS, register_order
from hift_lightning.engine.tiers import TIERS, HostMemory, make_tier, register_tier
from tests.small_transformer import SmallTransformer


def test_what_is_built_in_is_registered():
    assert set(ORDERS) == {"bottom2up", "top2down", "random"}
    assert set(TIERS) == {"none", "cpu", "files"}
    assert list(LAYOUTS) == ["modules", "stacks"]


@pytest.mark.parametrize(
    ("register", "name"), [(register_order, "random"), (register_tier, "none"), (register_layout, "stacks")]
)
def test_a_name_is_not_given_twice(registries, register, name):
    with pytest.raises(ConfigurationError, match=f"'{name}'.*<lambda>`, and the name belongs to `hift"):
        register(name)(lambda *arguments: None)


@pytest.mark.parametrize("name", ["", "a:b", "a/b", "-x", len])
def test_a_name_is_a_word(registries, name):
    with pytest.raises(ConfigurationError, match=r"write `@register_order\('a_name'\)`"):
        register_order(name)


def test_what_a_notebook_defines_again_takes_the_old_ones_place():
    registry = Registry("register")
    for value in (1, 2):
        cell = {}
        exec(f"def number(): return {value}", {"__name__": "__main__"}, cell)
        registry.register("number")(cell["number"])
    assert registry["number"]() == 2


def test_a_strategy_takes_registered_names_and_no_others(registries, tmp_path):
    register_order("mine")(lambda blocks, cycle, seed: range(blocks))
    register_tier("shelf")(HostMemory)
    HiFTStrategy(order="mine", offload="shelf")
    with pytest.raises(ConfigurationError, match="`order='yours'`.*bottom2up, mine, random, top2down"):
        HiFTStrategy(order="yours")
    with pytest.raises(ConfigurationError, match="`offload='attic'`.*cpu, files, none, shelf, the path of a folder"):
        HiFTStrategy(offload="attic")


def test_a_tier_is_made_with_what_stands_behind_its_name(registries, tmp_path):
    @register_tier("shelf")
    class Shelf(HostMemory):
        def __init__(self, where):
            self.where = where

    assert make_tier("shelf:top: left").where == "top: left"
    assert make_tier(f"files:{tmp_path}").folder.parent == tmp_path
    assert make_tier(tmp_path).folder.parent == tmp_path
    with pytest.raises(ConfigurationError, match="`offload='shelf'` does not fit the tier `shelf`"):
        HiFTStrategy(offload="shelf")
    with pytest.raises(ConfigurationError, match="`offload='cpu:top'` does not fit the tier `cpu`"):
        HiFTStrategy(offload="cpu:top")


def test_the_layout_registered_last_is_asked_first(registries):
    model = SmallTransformer()
    names = [name for name, _ in model.named_parameters()]
    register_layout("one")(lambda model: [Layer("one", tuple(names))])
    register_layout("none")(lambda model: None)
    assert [layer.name for layer in partition(model).layers] == ["one"]
    register_layout("two")(lambda model: [Layer("low", tuple(names[:3])), Layer("high", names[3:])])
    assert [layer.parameters for layer in partition(model).layers] == [tuple(names[:3]), tuple(names[3:])]
    assert [layer.name for layer in partition(model, layers=["head.*"]).layers] == ["low", "high", "head.*"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([("a", "b")], r"The layout `bad` gave \('a', 'b'\)"),
        ([Layer("x", "a")], "The layout `bad` gave Layer"),
        ([Layer("x", ("a", "c"))], "puts `c` into layer `x`, and the model has no parameter"),
        ([Layer("x", ("a", "b")), Layer("y", ("a",))], "puts parameter `a` into layer `y`, and it is in `x` already"),
        ([Layer("x", ("a", "b", "tied"))], "puts parameter `tied` into layer `x`, and it is in `x` already"),
        ([Layer("x", ("a",))], "puts 1 parameters into no layer: `b`"),
        ([], "puts 2 parameters into no layer: `a`, `b`"),
    ],
)
def test_a_layout_that_does_not_place_each_parameter_once_is_refused(registries, layers, message):
    model = torch.nn.Module()
    model.a, model.b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    model.tied = model.a
    register_layout("bad")(lambda model: layers)
    with pytest.raises(ConfigurationError, match=message):
        partition(model)


def test_a_layout_may_use_any_name_of_a_tied_weight(registries):
    model = torch.nn.Module()
    model.a = model.tied = torch.nn.Parameter(torch.zeros(2))
    register_layout("tied")(lambda model: [Layer("x", ("tied",))])
    assert partition(model).layers == (Layer("x", ("a",)),)
