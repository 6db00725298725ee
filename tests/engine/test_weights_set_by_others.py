"""fp32 masters follow weights that something else than a step has set: loading, clamping, averaging."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hift_lightning import HiFT, HiFTSettings
from hift_lightning.engine.masters import follow_weights, master_of
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, make_batches

BATCHES = make_batches(2 * LAYERS)


def started(update="block", **settings):
    model = SmallTransformer().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hift = HiFT(model, optimizer, HiFTSettings(master_weights=True, update=update, **settings))
    hift.start()
    return model, hift


def train(model, hift, batches=BATCHES, after_step=lambda: None):
    for batch in batches:
        model.loss(batch).backward()
        hift.optimizer.step()
        after_step()


def test_a_master_keeps_its_lower_bits_where_the_weight_is_its_rounding_and_follows_it_elsewhere():
    master = torch.tensor([1.001, 2.0, 3.0, float("nan")])
    weights = master.to(torch.bfloat16)
    kept = master.clone()
    weights[1] = 5.0
    follow_weights(master, weights)
    assert torch.equal(master[:3], torch.tensor([kept[0], 5.0, 3.0]))
    assert master[3].isnan()
    assert master_of(torch.tensor([1.0]).bfloat16(), kept[:1]).data_ptr() == kept.data_ptr()


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
@pytest.mark.parametrize("parked_dtype", [None, "bfloat16"])
def test_weights_loaded_while_training_are_what_is_trained_on(update, parked_dtype):
    model, hift = started(update, parked_dtype=parked_dtype)
    train(model, hift)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    train(model, hift)
    assert all((parameter.float() - 3.0).abs().max() < 0.1 for parameter in model.parameters())
    assert_same({n: v.bfloat16() for n, v in hift.master_state_dict().items()}, dict(model.state_dict()))


def test_weights_clamped_after_each_step_stay_so():
    model, hift = started()

    def clamp():
        for parameter in model.parameters():
            parameter.data.clamp_(-0.01, 0.01)

    train(model, hift, after_step=clamp)
    largest = torch.tensor(0.01).bfloat16()
    for name, master in hift.master_state_dict().items():
        assert master.bfloat16().abs().max() <= largest, name


def test_averages_put_into_the_model_are_exported():
    model, hift = started()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(model, hift, after_step=lambda: average.update_parameters(model))
    hift.finish()
    model.load_state_dict(average.module.state_dict())
    for name, master in hift.master_state_dict().items():
        assert torch.equal(master.bfloat16(), model.state_dict()[name]), name


def test_masters_that_nothing_else_sets_are_given_as_they_are():
    model, hift = started()
    train(model, hift)
    given = hift.master_state_dict()
    for name, parameter in model.named_parameters():
        assert given[name].data_ptr() == hift.residency.master(parameter).data_ptr()


@pytest.mark.parametrize("checkpointed_layers_compiled", [False, True])
def test_a_deep_copy_made_while_layers_are_checkpointed_computes_with_its_own_weights(checkpointed_layers_compiled):
    model = SmallTransformer()
    if checkpointed_layers_compiled:
        for layer in model.layers:
            layer.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = BATCHES[0][0]
    with HiFT(model, optimizer, HiFTSettings(activation_checkpointing=True)) as hift:
        train(model, hift, BATCHES[:LAYERS])
        teacher = copy.deepcopy(model)
        before = teacher(tokens).detach()
        train(model, hift)
        assert torch.equal(teacher(tokens), before)
        assert not torch.equal(model(tokens), before)
    assert torch.equal(teacher(tokens), before)
