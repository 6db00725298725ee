"""Delayed learning-rate update, over the user's own scheduler."""

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, SequentialSampler

from hift_lightning import HiFTStrategy
from hift_lightning.data.loading import TrainingLoader
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

HORIZON = 4 * LAYERS


def linear(optimizer):
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=HORIZON)


def fit(lr_update, make_scheduler=linear, interval="step", batches=HORIZON, **arguments):
    module = SmallTransformer(make_scheduler=make_scheduler, interval=interval)
    trainer_ = trainer(HiFTStrategy(lr_update=lr_update), **arguments)
    trainer_.fit(module, loader(make_batches(batches)))
    return module, trainer_


def test_cycle_holds_the_rate_through_a_cycle_and_keeps_the_horizon():
    module, trainer_ = fit("cycle")
    per_cycle = [1.0, 0.75, 0.5, 0.25]
    assert module.rates == pytest.approx([1e-2 * factor for factor in per_cycle for _ in range(LAYERS)])
    assert trainer_.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)


def test_cycle_once_steps_the_scheduler_once_a_cycle():
    module, _ = fit("cycle_once")
    per_cycle = [1 - cycle / HORIZON for cycle in range(4)]
    assert module.rates == pytest.approx([1e-2 * factor for factor in per_cycle for _ in range(LAYERS)])


def test_step_does_not_delay():
    module, _ = fit("step")
    assert module.rates == pytest.approx([1e-2 * (1 - step / HORIZON) for step in range(HORIZON)])


def test_accumulated_micro_batches_count_once():
    module, _ = fit("cycle", batches=2 * HORIZON, accumulate_grad_batches=2)
    assert len(module.rates) == HORIZON
    assert module.rates[-1] == pytest.approx(0.25e-2)


class Shown(Callback):
    """The rates at the moment at which `LearningRateMonitor` reads them."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class EverySoOften(SmallTransformer):
    """Its scheduler is stepped after every third optimizer step, and notes the rate that each one has used."""

    by_hand = False

    def __init__(self, make_scheduler):
        super().__init__(make_scheduler=make_scheduler)
        self.automatic_optimization = not self.by_hand
        self.used = []

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if self.by_hand:
            self.manual_backward(loss)
            self.optimizers().step()
            if (batch_idx + 1) % 3 == 0:
                self.lr_schedulers().step()
        return loss

    def on_train_batch_end(self, *_):
        self.used.append(self.noted)

    def configure_optimizers(self):
        configured = super().configure_optimizers()
        configured["lr_scheduler"]["frequency"] = 3
        configured["optimizer"].register_step_post_hook(self.note)
        return configured

    def note(self, optimizer, args, kwargs):
        self.noted = optimizer.param_groups[0]["lr"]

    def on_before_optimizer_step(self, optimizer):
        pass


class EverySoOftenByHand(EverySoOften):
    by_hand = True


def halving(optimizer):
    return lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("update", ["block", "fused"])
@pytest.mark.parametrize("module_class", [EverySoOften, EverySoOftenByHand])
@pytest.mark.parametrize("lr_update", ["cycle", "cycle_once"])
def test_a_schedule_that_is_not_stepped_at_every_update_changes_between_cycles_too(
    lr_update, module_class, update, tmp_path
):
    assert LAYERS == 4

    def fit(steps, ckpt_path=None):
        module = module_class(halving)
        shown = Shown()
        trainer_ = trainer(HiFTStrategy(lr_update=lr_update, update=update), max_steps=steps, callbacks=[shown])
        rows = list(zip(*make_batches(1, size=4 * 13)[0], strict=True))
        batches = BatchSampler(SequentialSampler(rows), 4, drop_last=False)
        trainer_.fit(module, TrainingLoader(rows, batches, torch.Generator(), 0), ckpt_path=ckpt_path)
        assert shown.rates == module.used
        return module, trainer_

    straight, _ = fit(13)
    # steps of the schedule come after updates 3, 6, 9 and 12
    passed_on = [0, 1, 2, 4] if lr_update == "cycle" else [0, 1, 2, 3]
    assert straight.used == [1e-2 * 0.5**steps for steps in passed_on for _ in range(LAYERS)][:13]
    for stop in (3, 4, 5, 8, 12):
        _, stopped = fit(stop)
        stopped.save_checkpoint(tmp_path / "stopped.ckpt")
        resumed, _ = fit(13, tmp_path / "stopped.ckpt")
        assert resumed.used == straight.used[stop:]
        assert_same(resumed.state_dict(), straight.state_dict())


def test_schedulers_of_epochs_are_left_alone():
    def halve(optimizer):
        return lr_scheduler.ExponentialLR(optimizer, 0.5)

    module, trainer_ = fit("cycle", halve, interval="epoch", batches=3, max_epochs=3)
    assert module.rates == pytest.approx([1e-2] * 3 + [0.5e-2] * 3 + [0.25e-2] * 3)
    assert type(trainer_.lr_scheduler_configs[0].scheduler) is lr_scheduler.ExponentialLR


def test_reduce_on_plateau_is_left_alone():
    class Plateau(SmallTransformer):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=1e9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    module = Plateau()
    batches = make_batches(3)
    trainer(max_epochs=3).fit(module, loader(batches), loader(batches))
    assert module.rates[0] == 1e-2
    assert module.rates[-1] < 1e-2


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, HORIZON),
        lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=HORIZON + 1),
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=LAYERS), lr_scheduler.StepLR(o, 2)],
            milestones=[LAYERS],
        ),
    ],
    ids=["cosine", "one cycle", "lambda", "sequential"],
)
def test_the_rate_of_a_cycle_is_the_plain_schedules_at_its_first_step(make_scheduler):
    plain = SmallTransformer(make_scheduler=make_scheduler)
    trainer("auto").fit(plain, loader(make_batches(HORIZON)))
    module, _ = fit("cycle", make_scheduler)
    assert module.rates == [plain.rates[step // LAYERS * LAYERS] for step in range(HORIZON)]


def test_user_code_sees_its_own_scheduler():
    module, trainer_ = fit("cycle")
    scheduler = trainer_.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, lr_scheduler.LinearLR)
    assert scheduler.last_epoch == HORIZON
    assert scheduler.get_last_lr() == pytest.approx([0.0])
    fresh = linear(torch.optim.SGD(module.parameters(), lr=1e-2))
    fresh.load_state_dict(scheduler.state_dict())
    assert fresh.last_epoch == HORIZON


@pytest.mark.parametrize(("batches", "held"), [(LAYERS + 2, "2 steps behind"), (2 * LAYERS, "")])
def test_a_resume_that_would_lose_held_steps_says_so(batches, held, tmp_path):
    module, trainer_ = fit("cycle", batches=batches)
    trainer_.save_checkpoint(tmp_path / "held.ckpt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(HiFTStrategy(lr_update="step"), max_epochs=2).fit(
            SmallTransformer(make_scheduler=linear),
            loader(make_batches(batches)),
            ckpt_path=tmp_path / "held.ckpt",
        )
    said = [str(each.message) for each in told if "the learning rate was held" in str(each.message)]
    assert len(said) == bool(held)
    assert all(held in each for each in said)
