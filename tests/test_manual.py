"""``HiFTManualMixin``: one call in ``training_step`` does everything, and wrong calls are refused."""

import copy
import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import BatchSampler, SequentialSampler

from hift_lightning import HiFTManualMixin, HiFTStrategy
from hift_lightning.data.loading import TrainingLoader
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


def linear(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=2 * LAYERS)


class Manual(HiFTManualMixin, SmallTransformer):
    def __init__(self, **step_arguments):
        super().__init__(make_scheduler=linear)
        self.automatic_optimization = False
        self.step_arguments = step_arguments
        self.stepped = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.stepped.append(self.hift_step(loss, **self.step_arguments))


@pytest.mark.parametrize("strategy", [HiFTStrategy, lambda: "auto"], ids=["hift", "plain"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("clip", "algorithm"), [(None, "norm"), (0.5, "norm"), (0.01, "value")])
def test_equals_automatic_optimization_exactly(strategy, accumulate, clip, algorithm):
    batches = make_batches(2 * LAYERS * accumulate + accumulate - 1)  # the last window is not full
    automatic = SmallTransformer(make_scheduler=linear)
    trainer(
        strategy(),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        gradient_clip_algorithm=algorithm,
    ).fit(automatic, loader(batches))
    manual = Manual(accumulate_grad_batches=accumulate, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
    trainer_ = trainer(strategy())
    trainer_.fit(manual, loader(batches))
    assert manual.losses == automatic.losses
    assert manual.rates == automatic.rates
    assert sum(manual.stepped) == trainer_.global_step == len(automatic.rates)
    for left, right in zip(manual.parameters(), automatic.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("strategy", [HiFTStrategy, lambda: "auto"], ids=["hift", "plain"])
def test_a_validation_within_a_window_leaves_its_gradients(strategy):
    class Validated(Manual):
        def validation_step(self, batch, batch_idx):
            pass

    def fit(**arguments):
        module = Validated(accumulate_grad_batches=4)
        trainer_ = trainer(strategy(), num_sanity_val_steps=0, **arguments)
        trainer_.fit(module, loader(make_batches(4 * LAYERS)), loader(make_batches(1)))
        return module

    expected = fit(limit_val_batches=0)
    assert fit(val_check_interval=2).losses == expected.losses


def test_rotates_and_frees_gradients():
    class Watched(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if self.stepped[-1]:
                assert all(p.grad is None for p in self.parameters())

    seen = BlocksSeen()
    module = Watched(accumulate_grad_batches=2)
    trainer(callbacks=[seen]).fit(module, loader(make_batches(2 * LAYERS)))
    assert seen.steps == TOP_DOWN
    assert module.stepped == [False, True] * LAYERS


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_clips_the_unscaled_gradients_under_a_grad_scaler(update):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    module = Manual(gradient_clip_val=1e-3)
    module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    trainer_ = trainer(HiFTStrategy(update=update), plugins=MixedPrecision("16-mixed", "cpu", scaler))
    before = [p.detach().clone() for p in module.parameters()]
    trainer_.fit(module, loader(make_batches(1)))
    assert nn.utils.get_total_norm(
        [(p - old).detach() for p, old in zip(module.parameters(), before, strict=True)]
    ).item() == pytest.approx(1e-3 * 0.1, rel=1e-2)


class Adversarial(HiFTManualMixin, L.LightningModule):
    """A generator and a discriminator, each with an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-2),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-2),
        ]

    def training_step(self, batch, batch_idx):
        real, _ = batch
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(batch_idx))
        self.hift_step(-self.discriminator(self.generator(noise)).mean(), optimizer=0)
        assert all(p.grad is None for p in self.parameters())
        fake = self.generator(noise).detach()
        loss = nn.functional.softplus(self.discriminator(fake)) + nn.functional.softplus(-self.discriminator(real))
        self.hift_step(loss.mean(), optimizer=1)


def test_each_of_several_optimizers_rotates_over_its_own_layers():
    module = Adversarial()
    before = [p.detach().clone() for p in module.parameters()]
    strategy = HiFTStrategy()
    data = [(torch.randn(3, 4), torch.zeros(3)) for _ in range(4)]
    trainer(strategy).fit(module, loader(data))
    assert [engine.updates for engine in strategy.engines] == [4, 4]
    assert [engine.cycle for engine in strategy.engines] == [2, 2]
    assert not any(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
    assert all(p.requires_grad for p in module.parameters())


class WindowsOfTwo(Adversarial):
    """The generator steps at every second batch, the discriminator at every one."""

    def training_step(self, batch, batch_idx):
        real, _ = batch
        self.hift_step(self.discriminator(self.generator(real)).mean(), optimizer=0, accumulate_grad_batches=2)
        self.hift_step(self.discriminator(real).mean(), optimizer=1)


def test_clipping_comes_after_hooks_of_ones_own():
    class Scales(Manual):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()["optimizer"]
            optimizer.register_step_pre_hook(self.scale)
            return optimizer

        def scale(self, optimizer, args, kwargs):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(100)

    for strategy in (HiFTStrategy(), HiFTStrategy(update="streamed"), "auto"):
        module = Scales(gradient_clip_val=1e-3)
        module.make_optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
        before = [p.detach().clone() for p in module.parameters()]
        trainer(strategy).fit(module, loader(make_batches(1)))
        moved = [(p - old).detach() for p, old in zip(module.parameters(), before, strict=True)]
        assert nn.utils.get_total_norm(moved).item() == pytest.approx(1e-3, rel=1e-2)


class WithoutToggling(Adversarial):
    """Each loss leaves gradients in the other network, which the next `zero_grad` of its optimizer frees."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
            self.manual_backward(self.discriminator(self.generator(batch[0])).mean())
            optimizer.step()


class TogglesLate(SmallTransformer):
    """Says which optimizer's turn it is between forward and backward, which also comes to the other one's layers."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.other = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        own, _ = self.optimizers()
        loss = self.other(self(batch[0])).square().mean()
        self.losses.append(loss.item())
        self.toggle_optimizer(own)
        self.manual_backward(loss)
        own.step()
        own.zero_grad()
        self.untoggle_optimizer(own)

    def configure_optimizers(self):
        own = [p for name, p in self.named_parameters() if not name.startswith("other")]
        return [torch.optim.AdamW(own, lr=1e-2), torch.optim.SGD(self.other.parameters(), lr=0.1)]


@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_an_optimizer_may_be_toggled_between_forward_and_backward(update):
    losses = []
    for strategy in (HiFTStrategy(), HiFTStrategy(update=update)):
        torch.manual_seed(0)
        module = TogglesLate()
        trainer(strategy).fit(module, loader(make_batches(6)))
        losses.append(module.losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]


def test_gradients_that_a_loop_by_hand_leaves_over_are_not_warned_of(tmp_path):
    data = [(torch.randn(3, 4), torch.zeros(3)) for _ in range(2)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer_ = trainer(HiFTStrategy(), enable_checkpointing=True, default_root_dir=tmp_path)
        trainer_.fit(WithoutToggling(), loader(data))
    assert list(tmp_path.rglob("*.ckpt"))
    assert not [each for each in told if "wait for their step" in str(each.message)]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_run_of_two_networks_goes_on_from_the_batch_before_which_it_was_interrupted(hook, tmp_path):
    rows = list(torch.randn(15, 4, generator=torch.Generator().manual_seed(3)))

    class Interrupts(L.Callback):
        pass

    def interrupt(self, trainer, module, *arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt

    setattr(Interrupts, hook, interrupt)

    def fit(callbacks=(), ckpt_path=None):
        module = WithoutToggling()
        trainer_ = trainer(HiFTStrategy(), callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        batches = BatchSampler(SequentialSampler(rows), 3, drop_last=False)
        trainer_.fit(
            module, TrainingLoader(rows, batches, torch.Generator(), 0, collate_fn=stacked), ckpt_path=ckpt_path
        )
        return module

    straight = fit()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_on_exception=True)
    with pytest.raises(SystemExit):
        fit([Interrupts(), saving])
    (path,) = tmp_path.glob("*.ckpt")
    assert_same(fit(ckpt_path=path).state_dict(), straight.state_dict())


def stacked(rows):
    return torch.stack(rows), torch.zeros(len(rows))


def test_a_copy_of_the_module_has_no_engine_in_it():
    class Copies(Manual):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert self.accumulating == (batch_idx == 0)
            assert not copy.deepcopy(self)._windows
            assert "_accumulation_windows" not in self.__getstate__()

    trainer(HiFTStrategy()).fit(Copies(accumulate_grad_batches=2), loader(make_batches(2)))


@pytest.mark.parametrize("batches", [1, 2])
def test_a_checkpoint_without_the_gradients_of_an_open_window_says_so(batches, tmp_path):
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == batches - 1:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    data = [(torch.randn(3, 4), torch.zeros(3)) for _ in range(4)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(HiFTStrategy(), callbacks=[Saves()]).fit(WindowsOfTwo(), loader(data))
    said = [str(each.message) for each in told if "wait for their step" in str(each.message)]
    assert len(said) == batches % 2
    assert all("another optimizer has been stepped since" in each for each in said)


def fit_with(training_step, automatic=False, **arguments):
    class Wrong(Manual):
        pass

    Wrong.training_step = training_step
    module = Wrong()
    module.automatic_optimization = automatic
    trainer(**arguments).fit(module, loader(make_batches(LAYERS)), loader(make_batches(1)))


def alternating_window(self, batch, batch_idx):
    self.hift_step(self.loss(batch), accumulate_grad_batches=2 + batch_idx)


def step_inside_a_window(self, batch, batch_idx):
    self.hift_step(self.loss(batch), accumulate_grad_batches=3)
    if batch_idx == 0:
        self.optimizers().step()


def backward_beside_it(self, batch, batch_idx):
    loss = self.loss(batch)
    self.manual_backward(loss, retain_graph=True)
    self.hift_step(loss)


@pytest.mark.parametrize(
    ("training_step", "message"),
    [
        (lambda self, batch, i: self.hift_step(self.loss(batch).expand(2)), r"loss shape \(2,\)"),
        (lambda self, batch, i: self.hift_step(None), "the loss None"),
        (lambda self, batch, i: self.hift_step(self.loss(batch), accumulate_grad_batches=0), "batches=0`"),
        (lambda self, batch, i: self.hift_step(self.loss(batch), gradient_clip_val=-1.0), "clip_val=-1.0`"),
        (
            lambda self, batch, i: self.hift_step(self.loss(batch), gradient_clip_algorithm="l1"),
            "algorithm='l1'`",
        ),
        (lambda self, batch, i: self.hift_step(self.loss(batch), optimizer=3), "`optimizer=3`"),
        (alternating_window, "from 2 to 3 in the middle"),
        (step_inside_a_window, "stepped outside of"),
        (backward_beside_it, "already has gradients"),
    ],
)
def test_wrong_stepping_is_refused_with_a_message(training_step, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit_with(training_step)


def test_calling_it_under_automatic_optimization_is_refused():
    with pytest.raises(MisconfigurationException, match="under automatic optimization"):
        fit_with(lambda self, batch, i: self.hift_step(self.loss(batch)), automatic=True)


def test_fused_clips_by_value_and_refuses_what_needs_all_gradients():
    by_value = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    fused, block = Manual(**by_value), Manual(**by_value)
    trainer(HiFTStrategy(update="fused")).fit(fused, loader(make_batches(LAYERS)))
    trainer(HiFTStrategy()).fit(block, loader(make_batches(LAYERS)))
    for left, right in zip(fused.parameters(), block.parameters(), strict=True):
        assert torch.equal(left, right)
    for arguments in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(MisconfigurationException, match="`update='fused'` frees each gradient"):
            trainer(HiFTStrategy(update="fused")).fit(Manual(**arguments), loader(make_batches(LAYERS)))


@pytest.mark.parametrize("strategy", [HiFTStrategy, lambda: "auto"], ids=["hift", "plain"])
@pytest.mark.parametrize("batches", [2, 6])
def test_a_window_that_an_error_has_left_open_is_not_gone_on_with_in_the_next_run(strategy, batches):
    class Interrupted(Manual):
        stops_at = batches

        def training_step(self, batch, batch_idx):
            if batch_idx == self.stops_at:
                raise KeyError
            assert self.accumulating == (batch_idx % 4 > 0)
            super().training_step(batch, batch_idx)

    module = Interrupted(accumulate_grad_batches=4)
    with pytest.raises(KeyError):
        trainer(strategy()).fit(module, loader(make_batches(8)))
    module.stops_at, module.stepped = None, []
    trainer(strategy()).fit(module, loader(make_batches(8)))
    assert module.stepped == [False, False, False, True] * 2


def test_calling_it_in_validation_is_refused():
    class InValidation(Manual):
        def validation_step(self, batch, batch_idx):
            self.hift_step(self.loss(batch))

    with pytest.raises(MisconfigurationException, match="outside of training"):
        trainer(num_sanity_val_steps=1).fit(InValidation(), loader(make_batches(1)), loader(make_batches(1)))


def test_several_optimizers_and_none_named_is_refused():
    class Unnamed(Adversarial):
        def training_step(self, batch, batch_idx):
            self.hift_step(self.discriminator(batch[0]).mean())

    with pytest.raises(MisconfigurationException, match="has 2 optimizers and `hift_step` was not told which"):
        trainer().fit(Unnamed(), loader([(torch.randn(3, 4), torch.zeros(3))]))
