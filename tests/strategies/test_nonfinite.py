"""NaN and inf under the Trainer: the right parameter is named, or the step is left out."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from hift_lightning import HiFTManualMixin, HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.engine.errors import NonfiniteError
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

pytestmark = pytest.mark.filterwarnings("ignore:A step is left out")


class Spiking(SmallTransformer):
    """Its loss is NaN at the batches named."""

    def __init__(self, spikes=(), value=math.nan, **arguments):
        super().__init__(**arguments)
        self.spikes, self.value = spikes, value

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.value if batch_idx in self.spikes else loss


class Manual(Spiking):
    """Calls backward and step by hand."""

    clip_val = None

    def __init__(self, *args, **arguments):
        super().__init__(*args, **arguments)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if self.clip_val:
            self.clip_gradients(self.optimizers(), self.clip_val, "norm")
        self.optimizers().step()


class WithMixin(HiFTManualMixin, Spiking):
    def __init__(self, *args, accumulate=1, clip_val=None, **arguments):
        super().__init__(*args, **arguments)
        self.automatic_optimization = False
        self.step_arguments = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip_val}

    def training_step(self, batch, batch_idx):
        self.hift_step(super().training_step(batch, batch_idx), **self.step_arguments)


def linear(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=3 * LAYERS)


def assert_same_weights(left, right):
    for (name, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(p, q), name


def state_of(trainer_):
    state = trainer_.optimizers[0].state_dict()["state"]
    return {f"{i}.{key}": value.to("cpu", copy=True) for i, leaves in state.items() for key, value in leaves.items()}


class BreaksGradient(SmallTransformer):
    """One gradient has an inf at the step named, after backward."""

    broken_at = LAYERS + 2
    broken = "layers.0.linear1.bias"

    def on_after_backward(self):
        if self.trainer.global_step == self.broken_at:
            self.get_parameter(self.broken).grad[2] = math.inf
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in self.named_parameters()}
            self.trainer.strategy.hift.residency.synchronize()
            self.state = state_of(self.trainer)


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("update", ["block", "streamed"])
def test_clipping_by_norm_does_not_hide_the_parameter_and_all_is_as_before_the_step(any_device, update, clip, tmp_path):
    module = BreaksGradient()
    checkpoint = ModelCheckpoint(tmp_path, save_on_exception=True)
    trainer_ = trainer(
        HiFTStrategy(update=update, window="6KiB"),
        gradient_clip_val=clip,
        accelerator=any_device.type,
        devices=1,
        callbacks=[checkpoint],
        enable_checkpointing=True,
    )
    named = (
        r"^The gradient of `layers.0.linear1.bias` has inf in update 7 \(block 1, `layers.0`\); weights and optimizer"
    )
    with pytest.raises(NonfiniteError, match=named) as failure:
        trainer_.fit(module, loader(make_batches(2 * LAYERS)))
    assert not hasattr(failure.value, "__notes__")
    assert {name: p.tolist() for name, p in module.named_parameters()} == {
        name: p.tolist() for name, p in module.weights.items()
    }
    state = state_of(trainer_)
    assert all(torch.equal(value, module.state[key]) for key, value in state.items())
    assert trainer_.strategy.hift.updates == trainer_.global_step == module.broken_at

    (saved,) = tmp_path.iterdir()  # when the run ended
    assert torch.load(saved, weights_only=True)["hift"]["engines"][0]["updates"] == module.broken_at


@pytest.mark.parametrize("module_class", [Spiking, Manual, WithMixin])
def test_a_loss_is_named(module_class):
    named = r"^The loss has NaN in update 3 \(block 1, `layers.0`\)"
    with pytest.raises(NonfiniteError, match=named):
        trainer().fit(module_class([2]), loader(make_batches(LAYERS)))


def test_fused_names_the_loss_and_what_has_been_touched():
    with pytest.raises(NonfiniteError, match=r"^The loss has NaN in update 3 \(block 1, `layers.0`\); look") as failure:
        trainer(HiFTStrategy(update="fused")).fit(Spiking([2]), loader(make_batches(LAYERS)))
    assert "layers.0.linear1.bias" in failure.value.__notes__[0]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_with_spikes_is_the_run_without_those_windows(any_device, accumulate, clip, value):
    batches = make_batches(4 * LAYERS * accumulate)
    windows = range(2, 4 * LAYERS, 3)
    # the first micro-batch of a window, the last, and both
    spikes = {w * accumulate for w in windows if w % 2 == 0} | {
        w * accumulate + accumulate - 1 for w in windows if w % 4
    }
    arguments = {
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": clip,
        "accelerator": any_device.type,
        "devices": 1,
    }
    module = Spiking(spikes, value, make_scheduler=linear)
    trainer_ = trainer(HiFTStrategy(nonfinite="skip"), **arguments)
    trainer_.fit(module, loader(batches))
    kept = [batch for i, batch in enumerate(batches) if i // accumulate not in windows]
    expected = SmallTransformer(make_scheduler=linear)
    straight = trainer(HiFTStrategy(), **arguments)
    straight.fit(expected, loader(kept))
    assert_same_weights(module, expected)
    left, right = state_of(trainer_), state_of(straight)
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[key]) for key, value in left.items())
    engine = trainer_.strategy.hift
    assert (engine.updates, engine.skipped_steps) == (4 * LAYERS - len(windows), len(windows))
    # the rate is that of the steps which counted
    assert [rate for w, rate in enumerate(module.rates) if w not in windows] == expected.rates


@pytest.mark.parametrize("module_class", [Manual, WithMixin])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_by_hand_are_left_out_too(module_class, clip):
    batches = make_batches(3 * LAYERS)
    spikes = [1, 4, 5]
    module = module_class(spikes, make_scheduler=linear if module_class is WithMixin else None)
    module.clip_val = clip
    if module_class is WithMixin:
        module.step_arguments["gradient_clip_val"] = clip
    trainer_ = trainer(HiFTStrategy(nonfinite="skip"))
    trainer_.fit(module, loader(batches))
    expected = SmallTransformer(make_scheduler=module.make_scheduler)
    kept = [batch for i, batch in enumerate(batches) if i not in spikes]
    trainer(gradient_clip_val=clip).fit(expected, loader(kept))
    assert_same_weights(module, expected)
    assert trainer_.strategy.hift.skipped_steps == 3


class ClipsItself(Spiking):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class ClipsWithTorch(Spiking):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)


class ClipsByHand(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(Spiking.training_step(self, batch, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")
        optimizer.step()


@pytest.mark.parametrize("module_class", [ClipsItself, ClipsWithTorch, ClipsByHand])
def test_a_step_that_is_left_out_has_nothing_to_clip_by_value(module_class):
    batches = make_batches(2 * LAYERS)
    module = module_class([1, 4])
    clip = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    trainer_ = trainer(HiFTStrategy(nonfinite="skip"), **(clip if module_class is ClipsWithTorch else {}))
    trainer_.fit(module, loader(batches))
    expected = SmallTransformer()
    kept = [batch for i, batch in enumerate(batches) if i not in (1, 4)]
    trainer(**clip).fit(expected, loader(kept))
    assert_same_weights(module, expected)
    assert "clip_gradients" not in vars(trainer_.precision_plugin)


def test_the_mixin_leaves_out_the_whole_window():
    batches = make_batches(2 * LAYERS * 3)
    module = WithMixin([3, 10], accumulate=3, clip_val=0.5)
    trainer_ = trainer(HiFTStrategy(nonfinite="skip"))
    trainer_.fit(module, loader(batches))
    expected = SmallTransformer()
    kept = [batch for i, batch in enumerate(batches) if i // 3 not in (1, 3)]
    trainer(accumulate_grad_batches=3, gradient_clip_val=0.5).fit(expected, loader(kept))
    assert_same_weights(module, expected)


class Adversarial(HiFTManualMixin, L.LightningModule):
    """A generator and a discriminator; the loss of one of them can be NaN."""

    def __init__(self, spikes=()):
        super().__init__()
        self.spikes = spikes
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.generator, self.discriminator)]

    def training_step(self, batch, batch_idx):
        noise, real = batch
        for optimizer, loss in enumerate(
            [
                lambda: -self.discriminator(self.generator(noise)).mean(),
                lambda: (self.discriminator(self.generator(noise).detach()) - self.discriminator(real)).mean(),
            ]
        ):
            spike = math.nan if (batch_idx, optimizer) in self.spikes else 1.0
            self.hift_step(loss() * spike, optimizer=optimizer)


def test_of_several_optimizers_only_the_one_whose_loss_it_is_leaves_its_step_out():
    data = [(torch.randn(3, 4), torch.randn(3, 4)) for _ in range(6)]
    strategy = HiFTStrategy(nonfinite="skip")
    module = Adversarial({(1, 0), (3, 0), (3, 1)})
    monitor = HiFTMonitor()
    trainer(strategy, callbacks=[monitor]).fit(module, loader(data))
    assert [engine.updates for engine in strategy.engines] == [4, 5]
    assert [engine.skipped_steps for engine in strategy.engines] == [2, 1]
    assert monitor.numbers["hift/skipped_steps"] == 3
    assert all(p.isfinite().all() for p in module.parameters())
    with pytest.raises(NonfiniteError, match=r"The loss has NaN in update 4 \(block 0, `discriminator.0`\)"):
        trainer().fit(Adversarial({(3, 1)}), loader(data))


@pytest.mark.parametrize("module_class", [Spiking, Manual, WithMixin])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_a_loss_of_nan_is_left_out_and_an_overflow_is_the_scalers(module_class, fused):
    def fit(module, strategy):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer_ = trainer(strategy, plugins=MixedPrecision("16-mixed", "cpu", scaler))
        trainer_.fit(module, loader(make_batches(6)))
        return trainer_.strategy.hift, scaler.get_scale()

    def make_optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    module = module_class([2, 4], make_optimizer=make_optimizer)
    engine, scale = fit(module, HiFTStrategy(nonfinite="skip"))
    assert (engine.updates, engine.skipped_steps, scale) == (4, 2, 2.0**10)
    assert all(p.isfinite().all() for p in module.parameters())

    engine, scale = fit(module_class([2, 4], math.inf, make_optimizer=make_optimizer), HiFTStrategy(nonfinite="skip"))
    assert (engine.updates, engine.skipped_steps, scale) == (4, 0, 2.0**8)

    with pytest.raises(NonfiniteError, match="^The loss has NaN in update 3"):
        fit(module_class([2]), HiFTStrategy())


def test_the_block_keeps_its_turn():
    class AfterBackward(Callback):
        def on_after_backward(self, trainer, pl_module):
            seen.on_before_optimizer_step(trainer, pl_module, None)

    seen = BlocksSeen()
    trainer(HiFTStrategy(nonfinite="skip"), callbacks=[AfterBackward()]).fit(
        Spiking([1, 2]), loader(make_batches(LAYERS + 2))
    )
    assert seen.steps == [TOP_DOWN[0], *[TOP_DOWN[1]] * 3, *TOP_DOWN[2:]]


def test_the_number_is_logged_and_kept_in_the_checkpoint(tmp_path):
    monitor = HiFTMonitor()
    trainer_ = trainer(HiFTStrategy(nonfinite="skip"), callbacks=[monitor])
    trainer_.fit(Spiking([1, 2]), loader(make_batches(LAYERS)))
    assert monitor.numbers["hift/skipped_steps"] == 2
    assert trainer_.callback_metrics["hift/skipped_steps"] == 2
    trainer_.save_checkpoint(tmp_path / "skipped.ckpt")

    again = trainer(HiFTStrategy(nonfinite="skip"), max_epochs=2)
    again.fit(Spiking([0]), loader(make_batches(LAYERS)), ckpt_path=tmp_path / "skipped.ckpt")
    assert again.strategy.hift.skipped_steps == 3
    assert again.strategy.hift.updates == 2 + LAYERS - 1


class GoesOn:
    """The batches, from where a checkpoint says."""

    def __init__(self, batches):
        self.batches, self.position = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("spike", [2, 3])
def test_a_run_goes_on_exactly_from_within_a_window_that_is_to_be_left_out(spike, tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "window.ckpt")

    def fit(callbacks=(), ckpt_path=None):
        module = Spiking({spike})
        strategy = HiFTStrategy(nonfinite="skip")
        trainer_ = trainer(strategy, accumulate_grad_batches=2, callbacks=list(callbacks))
        trainer_.fit(module, GoesOn(make_batches(8)), ckpt_path=ckpt_path)
        return dict(module.state_dict()), strategy.hift

    weights, straight = fit([Saves()])
    resumed_weights, resumed = fit(ckpt_path=tmp_path / "window.ckpt")
    assert (resumed.updates, resumed.skipped_steps) == (straight.updates, straight.skipped_steps) == (3, 1)
    assert_same(resumed_weights, weights)
