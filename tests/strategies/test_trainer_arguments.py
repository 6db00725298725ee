"""What the Trainer can be told, it can be told under HiFT."""

from datetime import timedelta

import pytest
import torch

from hift_lightning import HiFTStrategy
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


def all_trainable_and_clean(module):
    return all(p.requires_grad and p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "updates"),
    [
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 5}, 5),
        ({"overfit_batches": 2, "max_epochs": 3}, 6),
        ({"limit_train_batches": 3, "max_epochs": 2}, 6),
        ({"limit_train_batches": 0.5}, 4),
        ({"limit_val_batches": 1, "val_check_interval": 2}, 8),
        ({"max_steps": 5, "max_epochs": -1}, 5),
        ({"max_time": timedelta(minutes=5)}, 8),
        ({"detect_anomaly": True}, 8),
        ({"barebones": True}, 8),
        ({"profiler": "simple"}, 8),
        ({"profiler": "advanced"}, 8),
        ({"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}, 8),
        ({"deterministic": True}, 8),
        ({"inference_mode": False, "check_val_every_n_epoch": 1}, 8),
        ({"num_sanity_val_steps": 2}, 8),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, 16),
    ],
    ids=str,
)
def test_argument_trains_by_blocks(arguments, updates, tmp_path):
    seen = BlocksSeen()
    module = SmallTransformer()
    if arguments.get("barebones"):
        bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"))
        arguments = {**arguments, **bare, "enable_model_summary": None}
    trainer_ = trainer(callbacks=[seen], default_root_dir=tmp_path, **arguments)
    batches = make_batches(8)
    trainer_.fit(module, loader(batches), loader(batches[:2]))
    assert trainer_.strategy.hift.updates == updates
    assert seen.steps == [TOP_DOWN[i % LAYERS] for i in range(updates)]
    assert all_trainable_and_clean(module)


def test_max_time_ends_a_run_that_can_be_trained_on():
    module = SmallTransformer()
    trainer_ = trainer(max_time=timedelta(seconds=1), max_epochs=-1)
    trainer_.fit(module, loader(make_batches(8)))
    assert trainer_.strategy.hift.updates > 0
    assert all_trainable_and_clean(module)


def test_validation_and_test_inside_and_after_leave_training_as_it_was():
    batches = make_batches(3 * LAYERS)
    plain, validated = SmallTransformer(), SmallTransformer()
    trainer().fit(plain, loader(batches))
    trainer_ = trainer(val_check_interval=2)
    trainer_.fit(validated, loader(batches), loader(batches[:2]))
    assert trainer_.callback_metrics["val_loss"] > 0
    for left, right in zip(plain.parameters(), validated.parameters(), strict=True):
        assert torch.equal(left, right)
    trainer_.validate(validated, loader(batches[:2]), verbose=False)
    trainer_.test(validated, loader(batches[:2]), verbose=False)
    assert all_trainable_and_clean(validated)


def test_fit_twice_with_one_trainer_goes_on_from_the_bottom_of_the_order():
    seen = BlocksSeen()
    module = SmallTransformer()
    trainer_ = trainer(callbacks=[seen])
    trainer_.fit(module, loader(make_batches(3)))
    trainer_.fit_loop.max_epochs = 2
    trainer_.fit(module, loader(make_batches(3)))
    assert seen.steps == TOP_DOWN[:3] * 2  # a new `fit` makes new optimizers, and so begins a new rotation
    assert all_trainable_and_clean(module)


def test_two_trainers_can_train_one_module_in_turn():
    module = SmallTransformer()
    first, second = BlocksSeen(), BlocksSeen()
    trainer(callbacks=[first]).fit(module, loader(make_batches(3)))
    trainer(HiFTStrategy(group_size=2), callbacks=[second]).fit(module, loader(make_batches(2)))
    assert first.steps == TOP_DOWN[:3]
    assert second.steps == [TOP_DOWN[0] | TOP_DOWN[1], TOP_DOWN[2] | TOP_DOWN[3]]
    trainer("auto").fit(module, loader(make_batches(1)))
    assert all(p.requires_grad for p in module.parameters())


class Stops(SmallTransformer):
    def __init__(self, exception, where):
        super().__init__()
        self.exception, self.where = exception, where

    def training_step(self, batch, batch_idx):
        if self.where == "forward" and batch_idx == 2:
            raise self.exception
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.where == "backward" and self.trainer.global_step == 2:
            raise self.exception

    def on_before_optimizer_step(self, optimizer):
        if self.where == "step" and self.trainer.global_step == 2:
            raise self.exception


@pytest.mark.parametrize("where", ["forward", "backward", "step"])
@pytest.mark.parametrize("exception", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_fit_after_an_exception(where, exception):
    module = Stops(exception, where)
    trainer_ = trainer()
    with pytest.raises((RuntimeError, SystemExit)):
        trainer_.fit(module, loader(make_batches(8)))
    assert all_trainable_and_clean(module)
    assert trainer_.strategy.hift.updates == 2
    assert not trainer_.strategy.hift.optimizer._optimizer_step_pre_hooks

    module.where = None
    seen = BlocksSeen()
    trainer(callbacks=[seen]).fit(module, loader(make_batches(LAYERS)))
    assert seen.steps in (TOP_DOWN, [])  # `Stops` overrides the hook that the recorder shares
    assert all_trainable_and_clean(module)
