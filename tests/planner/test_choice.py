"""`group_size="auto"` takes the largest group that fits, and tells the smallest budget where nothing does."""

import dataclasses
import functools
import re

import pytest
import torch

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.settings import HiFTSettings, parse_bytes
from hift_lightning.planner import StepPlanner, choose, plan
from hift_lightning.planner.gpus import GIB, needed_bytes
from tests.planner.small_llama import SmallLlama
from tests.small_transformer import SmallTransformer, make_batches

AUTO = HiFTSettings(group_size="auto", window="512KiB")


@pytest.fixture(autouse=True)
def nothing_beside_the_peak(monkeypatch):
    """The model is so small that the driver's context would be all there is."""
    monkeypatch.setattr("hift_lightning.planner.gpus.CONTEXT_BYTES", 0)


class RemembersPlans(StepPlanner):
    @functools.cache  # noqa: B019
    def plan(self, settings):
        return super().plan(settings)


@pytest.fixture(scope="module")
def step():
    return RemembersPlans(SmallTransformer(depth=4), make_batches(1)[0])


def needed(step, **settings):
    return needed_bytes(step.plan(dataclasses.replace(AUTO, **settings)).peak_bytes)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_largest_group_that_fits_is_chosen(step, size):
    budget = needed(step, group_size=size)
    choice = choose(AUTO, budget, step)
    settings = choice.settings
    assert (settings.update, settings.activation_checkpointing) == ("block", False)
    assert settings.group_size >= size
    assert needed_bytes(choice.plan.peak_bytes) <= budget
    if settings.group_size < 6:
        assert needed(step, group_size=settings.group_size + 1) > budget
        assert f"group_size={settings.group_size + 1} would need" in choice.reason
    assert f"group_size={settings.group_size} with update=block" in choice.reason


def test_all_layers_are_one_block_where_there_is_room(step):
    assert choose(AUTO, GIB, step).settings.group_size == 6


def test_where_single_layers_do_not_fit_it_streams_then_checkpoints_then_fuses():
    step = RemembersPlans(SmallLlama(layers=2), torch.zeros(1, 200, dtype=torch.long))
    least = {
        ("block", False): needed(step, group_size=1),
        ("streamed", False): needed(step, group_size=1, update="streamed"),
        ("streamed", True): needed(step, group_size=1, update="streamed", activation_checkpointing=True),
        ("fused", True): needed(step, group_size=1, update="fused", activation_checkpointing=True),
    }
    assert sorted(set(least.values()), reverse=True) == list(least.values())
    for (update, checkpointing), budget in least.items():
        settings = choose(AUTO, budget, step).settings
        assert (settings.update, settings.activation_checkpointing) == (update, checkpointing)


def test_where_nothing_fits_the_smallest_budget_is_named_and_fits(step):
    with pytest.raises(ConfigurationError, match=r"Nothing fits `memory_budget` of 0.00 GiB") as caught:
        choose(AUTO, 1000, step)
    named = re.search(r"give `memory_budget=(\S+)`", str(caught.value)).group(1)
    assert choose(AUTO, parse_bytes("memory_budget", named), step).plan.peak_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"gradient_clip_val": 1.0}, "`gradient_clip_val=1.0` clips by norm"),
        ({"accumulate_grad_batches": 2}, "`accumulate_grad_batches=2` sums gradients over batches"),
        ({"precision": "16-mixed"}, "a GradScaler looks for overflows in fp16"),
    ],
)
def test_fused_is_never_chosen_nor_planned_where_the_run_would_refuse_it(arguments, reason):
    step = StepPlanner(SmallTransformer(), make_batches(1)[0], **arguments)
    assert step.why_not_fused == reason
    with pytest.raises(ConfigurationError, match=re.escape(reason)):
        step.plan(HiFTSettings(update="fused"))
    frugal = HiFTSettings(update="streamed", activation_checkpointing=True)
    budget = needed_bytes(step.plan(frugal).peak_bytes)
    with pytest.raises(ConfigurationError, match="Nothing fits"):
        choose(AUTO, budget - 1000, step)


def test_clipping_by_value_goes_with_fused():
    step = StepPlanner(SmallTransformer(), make_batches(1)[0], gradient_clip_val=1.0, gradient_clip_algorithm="value")
    assert step.why_not_fused is None
    assert step.plan(HiFTSettings(update="fused")).peak_bytes > 0


def test_a_plan_with_the_group_size_left_open_is_answered_with_what_chooses_it():
    strategy = HiFTStrategy(group_size="auto", memory_budget="1GiB")
    with pytest.raises(ConfigurationError, match=r"^`group_size='auto'` is chosen by .* `choose\(strategy.settings, "):
        plan(SmallTransformer(), strategy, make_batches(1)[0])
