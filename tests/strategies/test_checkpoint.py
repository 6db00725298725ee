"""Checkpoints are complete, safe to load, and go both ways between HiFT and a plain Trainer."""

import pytest
import torch

from hift_lightning import HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

STEPS = LAYERS + 1  # an epoch ends in the middle of a cycle


def make_module(optimizer="AdamW"):
    return SmallTransformer(
        OPTIMIZERS[optimizer], lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=2 * STEPS)
    )


def fit(strategy="hift", epochs=1, ckpt_path=None, optimizer="AdamW", **arguments):
    module = make_module(optimizer)
    trainer_ = trainer(strategy, max_epochs=epochs, **arguments)
    trainer_.fit(module, loader(make_batches(STEPS)), ckpt_path=ckpt_path)
    return module, trainer_


def assert_same(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
        assert left.dtype == right.dtype
    else:
        assert left == right


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lr_update", ["cycle", "cycle_once", "step"])
def test_a_run_resumed_in_the_middle_of_a_cycle_equals_one_that_never_stopped(optimizer, lr_update, tmp_path):
    path = tmp_path / "stopped.ckpt"
    _, stopped = fit(HiFTStrategy(lr_update=lr_update, order="random"), optimizer=optimizer)
    stopped.save_checkpoint(path)
    resumed, resumed_trainer = fit(
        HiFTStrategy(lr_update=lr_update, order="random"), epochs=2, ckpt_path=path, optimizer=optimizer
    )
    straight, straight_trainer = fit(HiFTStrategy(lr_update=lr_update, order="random"), epochs=2, optimizer=optimizer)
    assert resumed.losses == straight.losses[STEPS:]
    assert resumed.rates == straight.rates[STEPS:]
    assert_same(resumed.state_dict(), straight.state_dict())
    assert_same(resumed_trainer.optimizers[0].state_dict(), straight_trainer.optimizers[0].state_dict())
    assert resumed_trainer.strategy.hift.updates == 2 * STEPS


def test_a_checkpoint_saved_after_fit_holds_everything_and_loads_with_weights_only(tmp_path):
    module, trainer_ = fit()
    trainer_.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert_same(saved["state_dict"], dict(module.state_dict()))
    assert len(saved["optimizer_states"][0]["state"]) == len(list(module.parameters()))
    assert saved["hift"]["engines"][0]["updates"] == STEPS
    assert saved["hift"]["held_lr_steps"] == [1]


def test_a_hift_checkpoint_goes_on_in_a_plain_trainer(tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "hift.ckpt")
    module, trainer_ = fit("auto", epochs=2, ckpt_path=tmp_path / "hift.ckpt")
    assert len(module.losses) == STEPS
    steps = {int(state["step"]) for state in trainer_.optimizers[0].state.values()}
    assert steps == {STEPS + 1, STEPS + 2}  # the head's block had two turns, the others one


def test_a_plain_checkpoint_goes_on_under_hift_with_its_state(tmp_path):
    _, stopped = fit("auto")
    stopped.save_checkpoint(tmp_path / "plain.ckpt")
    seen = BlocksSeen()
    _, trainer_ = fit(epochs=2, ckpt_path=tmp_path / "plain.ckpt", callbacks=[seen])
    assert seen.steps == [*TOP_DOWN, TOP_DOWN[0]]
    steps = {int(state["step"]) for state in trainer_.optimizers[0].state.values()}
    assert steps == {STEPS + 1, STEPS + 2}


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"group_size": 2}, "group_size=1.*group_size=2"), ({"order": "bottom2up"}, r"turns=\[3, 2, 1, 0\]")],
)
def test_resuming_with_another_plan_is_refused_and_shows_both(changed, named, tmp_path):
    _, stopped = fit()
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    with pytest.raises(ConfigurationError, match=named):
        fit(HiFTStrategy(**changed), epochs=2, ckpt_path=tmp_path / "stopped.ckpt")
