"""The rotation is a function of the number of updates, and each block has its turn once a cycle."""

import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.rotation import ORDERS, Rotation, length_of_turn, register_order
from hift_lightning.engine.settings import HiFTSettings

rotations = st.builds(
    Rotation,
    blocks=st.integers(1, 40),
    order=st.sampled_from(sorted(ORDERS)),
    steps_per_block=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)


@given(rotations, st.integers(0, 10))
def test_every_block_is_visited_equally_in_every_cycle(rotation, cycle):
    start = cycle * rotation.cycle_length
    turns = [rotation.block_at(start + i) for i in range(rotation.cycle_length)]
    assert sorted(turns) == sorted(list(range(rotation.blocks)) * rotation.steps_per_block)


@given(rotations, st.integers(0, 1000))
def test_visits_count_the_turns_that_were_had(rotation, updates):
    turns = [rotation.block_at(i) for i in range(updates)]
    assert [rotation.visits(b, updates) for b in range(rotation.blocks)] == [
        turns.count(b) for b in range(rotation.blocks)
    ]


@given(rotations, st.integers(0, 1000))
def test_a_block_makes_its_steps_in_a_row(rotation, updates):
    first = updates // rotation.steps_per_block * rotation.steps_per_block
    assert rotation.block_at(updates) == rotation.block_at(first)


@given(rotations, st.integers(0, 1000))
def test_the_same_arguments_give_the_same_rotation(rotation, updates):
    again = Rotation(rotation.blocks, rotation.order, rotation.steps_per_block, rotation.seed)
    assert again.block_at(updates) == rotation.block_at(updates)


def test_orders_permute_the_turns_only():
    assert Rotation(4, "bottom2up").turns == (0, 1, 2, 3)
    assert Rotation(4, "top2down").turns == (3, 2, 1, 0)
    assert sorted(Rotation(4, "random", seed=5).turns) == [0, 1, 2, 3]
    assert len({Rotation(10, "random", seed=seed).turns for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "sideways"}, "`order='sideways'`.*bottom2up, random, top2down"),
        ({"steps_per_block": 0}, "`steps_per_block=0`"),
        ({"steps_per_block": True}, "`steps_per_block=True`"),
        ({"steps_per_block": "once"}, "`steps_per_block='once'` must be an integer .*`length_of_turn`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Rotation(3, **arguments)


@pytest.mark.parametrize("value", [None, ["cpu"], {"name": "cpu"}, 3.5])
@pytest.mark.parametrize("argument", ["order", "offload", "parked_dtype"])
def test_a_value_of_a_type_that_names_nothing_is_named(argument, value):
    if (argument, value) != ("parked_dtype", None):
        with pytest.raises(ConfigurationError, match=re.escape(f"`{argument}={value!r}` is no")):
            HiFTSettings(**{argument: value})


@given(st.integers(1, 40), st.integers(1, 2000))
def test_once_gives_every_block_one_turn_of_the_run(blocks, total_steps):
    rotation = Rotation(blocks, steps_per_block=length_of_turn("once", blocks, total_steps))
    if total_steps >= blocks:
        assert rotation.cycle_length <= total_steps < rotation.cycle_length + blocks
    assert length_of_turn(3, blocks, None) == 3


def test_once_wants_the_steps_of_the_run_and_a_rate_that_is_not_held():
    with pytest.raises(
        ConfigurationError, match=r"^`steps_per_block='once'` divides .*`HiFT\(..., total_steps=1000\)`"
    ):
        length_of_turn("once", 3, None)
    with pytest.raises(
        ConfigurationError, match="^`steps_per_block='once'` .*`lr_update='cycle'`.*give `lr_update='st"
    ):
        HiFTSettings(steps_per_block="once")
    with pytest.raises(ConfigurationError, match="^`steps_per_block='twice'` must be .* or `once`"):
        HiFTSettings(steps_per_block="twice", lr_update="step")


def test_a_registered_order_that_is_no_permutation_is_refused(registries):
    register_order("lazy")(lambda blocks, cycle, seed: [0] * blocks if cycle == 3 else range(blocks))
    with pytest.raises(ConfigurationError, match=r"\(0, 0, 0\) in cycle 3, .* exactly one turn a cycle"):
        Rotation(3, "lazy")


def test_a_registered_order_may_give_numbers_of_numpy(registries):
    register_order("permutation")(lambda blocks, cycle, seed: np.random.default_rng([seed, cycle]).permutation(blocks))
    assert {type(block) for block in Rotation(3, "permutation").turns} == {int}


def test_a_registered_order_that_gives_other_turns_when_asked_again_is_refused(registries):
    @register_order("dice")
    def dice(blocks, cycle, seed):
        return random.sample(range(blocks), blocks)

    with pytest.raises(ConfigurationError, match="`order='dice'` gives other turns when it is asked again"):
        Rotation(8, "dice")


@given(updates=st.integers(0, 1000), blocks=st.integers(1, 12), steps_per_block=st.integers(1, 3), seed=st.integers())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_order_may_change_from_cycle_to_cycle(reshuffled, updates, blocks, steps_per_block, seed):
    rotation = Rotation(blocks, reshuffled, steps_per_block, seed)
    cycle, rest = divmod(updates, blocks * steps_per_block)
    expected = list(range(blocks))
    random.Random(f"{seed} {cycle}").shuffle(expected)
    assert rotation.block_at(updates) == expected[rest // steps_per_block]
    taken = [rotation.block_at(i) for i in range(updates)]
    assert [rotation.visits(b, updates) for b in range(blocks)] == [taken.count(b) for b in range(blocks)]


def test_orders_with_other_turns_have_other_fingerprints(reshuffled):
    rotations = [
        Rotation(4, "top2down"),
        Rotation(4, "bottom2up"),
        *(Rotation(2, reshuffled, seed=seed) for seed in range(20)),  # half of them begin alike
    ]
    assert len({rotation.fingerprint for rotation in rotations}) == 22
    assert Rotation(4, "top2down", seed=1).fingerprint == Rotation(4, "top2down", seed=2).fingerprint


@pytest.fixture
def reshuffled(registries):
    @register_order("reshuffled")
    def reshuffled(blocks, cycle, seed):
        turns = list(range(blocks))
        random.Random(f"{seed} {cycle}").shuffle(turns)
        return turns

    return "reshuffled"
