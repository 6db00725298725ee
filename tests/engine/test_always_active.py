"""Parameters that are trained in every step, with whichever block has its turn."""

import copy
import re

import pytest
import torch
from torch import nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.partition import partition
from hift_lightning.engine.settings import HiFTSettings
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, make_batches

HEAD = ("norm.weight", "norm.bias", "head.weight", "head.bias")
PATTERNS = ["norm.*", "head.*"]


def settings_of(always_active):
    return HiFTSettings(always_active=always_active)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def test_they_are_in_no_block_and_active_with_each():
    plan = partition(SmallTransformer(), always_active=PATTERNS)
    assert len(plan.blocks) == LAYERS - 1
    assert not any(set(HEAD) & set(block.own_parameters) for block in plan.blocks)
    assert all(block.parameters == (*block.own_parameters, *HEAD) for block in plan.blocks)
    assert plan.always_active.own_parameters == HEAD
    assert plan.numel == partition(SmallTransformer()).numel
    assert plan.fingerprint() != partition(SmallTransformer(), frozen=PATTERNS).fingerprint()
    head = next(line for line in str(plan).splitlines() if "always active" in line)
    assert f"{plan.always_active.numel:,}" in head


def test_what_is_frozen_stays_so():
    plan = partition(SmallTransformer(), frozen=["norm.*"], always_active=PATTERNS)
    assert plan.always_active.own_parameters == ("head.weight", "head.bias")
    plan = partition(SmallTransformer(), frozen=PATTERNS, always_active=PATTERNS)
    assert plan == partition(SmallTransformer(), frozen=PATTERNS)


def test_a_number_means_so_many_layers_from_the_top():
    assert partition(SmallTransformer(), always_active=1) == partition(SmallTransformer(), always_active=PATTERNS)
    below = partition(SmallTransformer()).layers[-2].parameters
    plan = partition(SmallTransformer(), always_active=2)
    assert plan.always_active.own_parameters == (*below, *HEAD)
    assert len(plan.blocks) == LAYERS - 2


def test_frozen_layers_are_not_among_the_layers_from_the_top():
    below = partition(SmallTransformer()).layers[-2].parameters
    assert partition(SmallTransformer(), frozen=PATTERNS, always_active=1).always_active.own_parameters == below


@pytest.mark.parametrize("value", [["*"], LAYERS, LAYERS + 1])
def test_all_parameters_cannot_be_active_always(value):
    told = rf"^`always_active={re.escape(str(value))}` takes all .* in {LAYERS} layers.* narrow it"
    with pytest.raises(ConfigurationError, match=told):
        partition(SmallTransformer(), always_active=value)


@pytest.mark.parametrize("value", [0, -1, True])
@pytest.mark.parametrize("accept", [lambda v: partition(SmallTransformer(), always_active=v), settings_of])
def test_a_number_that_is_none_of_layers_is_refused(accept, value):
    with pytest.raises(ConfigurationError, match=f"^`always_active={value}` must be a number of layers from the top"):
        accept(value)


def trained(model, settings, batches, steps=None):
    optimizer = adamw(model.parameters())
    with HiFT(model, optimizer, settings) as hift:
        for batch in batches[:steps]:
            model.loss(batch).backward()
            hift.after_backward()
            optimizer.step()
    return hift


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("steps_per_block", [1, 2])
def test_it_equals_a_second_optimizer_that_steps_them_every_time(update, steps_per_block):
    batches = make_batches(9)
    settings = HiFTSettings(update=update, steps_per_block=steps_per_block, always_active=PATTERNS)
    model = SmallTransformer()
    hift = trained(model, settings, batches)

    apart = SmallTransformer()
    names = dict(apart.named_parameters())
    of_head = adamw([names[name] for name in HEAD])
    rest = adamw([parameter for name, parameter in names.items() if name not in HEAD])
    with HiFT(apart, rest, HiFTSettings(steps_per_block=steps_per_block), others=[of_head]):
        for batch in batches:
            apart.loss(batch).backward()
            rest.step()
            of_head.step()
            of_head.zero_grad()

    assert_same(model.state_dict(), apart.state_dict())
    report = hift.report()
    assert [block.visits for block in report.blocks] == ([3, 3, 3] if steps_per_block == 1 else [2, 3, 4])
    assert report.always_active.visits == 9
    moments, counters = 2 * sum(names[name].nbytes for name in HEAD), 4 * len(HEAD)
    assert report.always_active.parked_bytes == moments + counters
    assert "always active" in str(report)


def test_only_they_and_the_block_have_gradients():
    model = SmallTransformer()
    optimizer = adamw(model.parameters())
    with HiFT(model, optimizer, HiFTSettings(always_active=PATTERNS)) as hift:
        for batch in make_batches(LAYERS):
            expected = {*hift.block.own_parameters, *HEAD}
            model.loss(batch).backward()
            assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
            optimizer.step()
            assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_masters_and_state_go_on_from_a_checkpoint():
    settings = HiFTSettings(update="streamed", master_weights=True, always_active=PATTERNS)
    batches = make_batches(7)
    whole = SmallTransformer().bfloat16()
    trained(whole, settings, batches)

    first, second = SmallTransformer().bfloat16(), SmallTransformer().bfloat16()
    optimizer = adamw(first.parameters())
    with HiFT(first, optimizer, settings) as hift:
        for batch in batches[:4]:
            first.loss(batch).backward()
            optimizer.step()
        hift.residency.synchronize()
        saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), hift.state_dict()))
    second.load_state_dict(saved[0])
    optimizer = adamw(second.parameters())
    hift = HiFT(second, optimizer, settings)
    hift.load_optimizer_state_dict(saved[1])
    hift.load_state_dict(saved[2])
    with hift:
        for batch in batches[4:]:
            second.loss(batch).backward()
            optimizer.step()
    assert_same(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize("update", ["block", "fused"])
def test_a_block_that_no_gradient_reaches_is_named_though_they_have_one(update):
    class WithUnused(SmallTransformer):
        def __init__(self):
            super().__init__()
            self.layers.append(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

        def forward(self, tokens):
            hidden = self.embedding(tokens)
            for layer in self.layers[:2]:
                hidden = layer(hidden)
            return self.head(self.norm(hidden).mean(1))

    with pytest.warns(UserWarning, match=r"No gradient reached block 3 \(`layers\.2`\)"):
        trained(WithUnused(), HiFTSettings(update=update, always_active=PATTERNS), make_batches(4))


def test_a_number_of_layers_is_refused_where_several_optimizers_share_the_model():
    model = SmallTransformer()
    names = dict(model.named_parameters())
    head = adamw([names[name] for name in HEAD])
    rest = adamw([parameter for name, parameter in names.items() if name not in HEAD])
    with pytest.raises(ConfigurationError, match="^`always_active=1` counts layers .* several optimizers share them"):
        HiFT(model, rest, HiFTSettings(always_active=1), others=[head])


def test_a_checkpoint_with_others_that_are_always_active_is_told_from_this_run():
    one, other = (
        HiFT(model := SmallTransformer(), adamw(model.parameters()), HiFTSettings(always_active=patterns))
        for patterns in (["head.bias"], None)
    )
    with pytest.raises(ConfigurationError, match=r"\(order=top2down\), with `head.bias` always active, and this run"):
        other.load_state_dict(one.state_dict())
