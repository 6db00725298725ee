"""Blocks take turns under the Trainer, every layer trains, and what cannot train is said."""

import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hift_lightning import HiFTManualMixin, HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.callbacks.block_table import block_table
from hift_lightning.callbacks.block_watch import watches_of
from hift_lightning.engine.errors import ConfigurationError
from tests.adversarial import Adversarial
from tests.blocks_seen import BOTTOM_UP, TOP_DOWN, BlocksSeen
from tests.comparing import assert_same
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


class Stream(IterableDataset):
    """Batches without a number of them."""

    def __iter__(self):
        return iter(make_batches(3 * LAYERS))


def fit(strategy="hift", batches=LAYERS, module=None, extra=(), **arguments):
    seen = BlocksSeen()
    module = module or SmallTransformer()
    trainer_ = trainer(strategy, callbacks=[seen, *extra], **arguments)
    trainer_.fit(module, loader(make_batches(batches)))
    return module, trainer_, seen.steps


def test_the_default_order_is_top_down_one_layer_a_step():
    _, _, steps = fit(batches=2 * LAYERS)
    assert steps == TOP_DOWN * 2


def test_steps_per_block_keeps_a_block_for_that_many_steps():
    _, _, steps = fit(HiFTStrategy(order="bottom2up", steps_per_block=2), batches=2 * LAYERS)
    assert steps == [block for block in BOTTOM_UP for _ in range(2)]


@pytest.mark.parametrize(
    ("batches", "arguments", "turn"),
    [(2 * LAYERS + 1, {}, 2), (LAYERS, {"max_epochs": 3}, 3), (4 * LAYERS, {"accumulate_grad_batches": 2}, 2)],
)
def test_once_gives_every_block_one_turn_in_the_run(batches, arguments, turn):
    strategy = HiFTStrategy(order="bottom2up", steps_per_block="once", lr_update="step")
    _, _, steps = fit(strategy, batches=batches, **arguments)
    assert steps[: LAYERS * turn] == [block for block in BOTTOM_UP for _ in range(turn)]
    assert strategy.hift.updates - strategy.hift.rotation.cycle_length == batches % LAYERS


def test_once_divides_the_steps_that_are_left(tmp_path):
    once = {"steps_per_block": "once", "lr_update": "step"}
    batches = loader(make_batches(LAYERS))
    twice = trainer(HiFTStrategy(**once))
    module = SmallTransformer()
    twice.fit(module, batches)
    twice.fit_loop.max_epochs = 4
    twice.fit(module, batches)
    assert {block.visits for block in twice.strategy.report().blocks} == {3}
    twice.save_checkpoint(tmp_path / "twice.ckpt")
    again = trainer(HiFTStrategy(**once), max_epochs=4)
    again.fit(SmallTransformer(), batches, ckpt_path=tmp_path / "twice.ckpt")  # its plan is the same
    assert again.strategy.hift.rotation.steps_per_block == 3
    plain = trainer("auto")
    plain.fit(SmallTransformer(), batches)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    resumed = trainer(HiFTStrategy(**once), max_epochs=3)
    resumed.fit(SmallTransformer(), batches, ckpt_path=tmp_path / "plain.ckpt")
    assert {block.visits for block in resumed.strategy.report().blocks} == {2}
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    again = trainer(HiFTStrategy(**once), max_epochs=3)
    again.fit(SmallTransformer(), batches, ckpt_path=tmp_path / "resumed.ckpt")
    assert again.strategy.hift.rotation.steps_per_block == 2


@pytest.mark.parametrize("longer", [{"max_epochs": 3}, {"max_epochs": 3, "group_size": 2}])
def test_once_with_a_rebuilt_plan_divides_the_steps_that_are_left(longer, tmp_path):
    longer = dict(longer)
    settings = {"steps_per_block": "once", "lr_update": "step", "group_size": longer.pop("group_size", 1)}
    batches = loader(make_batches(2 * LAYERS))
    shorter = trainer(HiFTStrategy(**{**settings, "group_size": 1}))
    shorter.fit(SmallTransformer(), batches)
    shorter.save_checkpoint(tmp_path / "shorter.ckpt")

    def go_on(name, **more):
        resumed = trainer(HiFTStrategy(**settings, **more), **longer)
        resumed.fit(SmallTransformer(), batches, ckpt_path=tmp_path / name)
        return resumed

    rebuilt = go_on("shorter.ckpt", resume_plan="rebuild")
    visits = 4 * settings["group_size"]
    assert {block.visits for block in rebuilt.strategy.report().blocks} == {visits}
    rebuilt.save_checkpoint(tmp_path / "rebuilt.ckpt")
    assert go_on("rebuilt.ckpt").strategy.hift.rotation.steps_per_block == visits  # the same plan


def test_once_wants_a_run_whose_steps_are_known():
    once = {"steps_per_block": "once", "lr_update": "step"}
    with pytest.raises(ConfigurationError, match="^`steps_per_block='once'` .* `GradientAccumulationScheduler`"):
        fit(HiFTStrategy(**once), extra=[GradientAccumulationScheduler({0: 2})])
    with pytest.raises(ConfigurationError, match="^`steps_per_block='once'` .* no end .* give the Trainer `max_steps`"):
        fit(HiFTStrategy(**once), max_epochs=-1)
    stream = DataLoader(Stream(), batch_size=None)
    with pytest.raises(ConfigurationError, match="^`steps_per_block='once'` .* no end .* give the Trainer `max_steps`"):
        trainer(HiFTStrategy(**once)).fit(SmallTransformer(), stream)
    endless = trainer(HiFTStrategy(**once), max_steps=2 * LAYERS)
    endless.fit(SmallTransformer(), stream)
    assert endless.strategy.hift.rotation.steps_per_block == 2

    class ByHand(SmallTransformer):
        automatic_optimization = False

    with pytest.raises(ConfigurationError, match="^`steps_per_block='once'` .* `ByHand`, which optimizes by hand"):
        fit(HiFTStrategy(**once), module=ByHand())


def test_rotation_counts_optimizer_steps_not_micro_batches():
    _, _, steps = fit(HiFTStrategy(order="bottom2up"), batches=3 * LAYERS, accumulate_grad_batches=3)
    assert steps == BOTTOM_UP


def test_a_partial_window_at_the_end_of_an_epoch_is_one_step():
    _, trainer_, steps = fit(batches=5, accumulate_grad_batches=3, max_epochs=2)
    assert steps == TOP_DOWN
    assert trainer_.strategy.hift.updates == 4


@pytest.mark.parametrize("group_size", [1, 2, 3, LAYERS])
def test_after_one_cycle_every_trainable_parameter_has_changed(group_size):
    before = {name: p.detach().clone() for name, p in SmallTransformer().named_parameters()}
    module, trainer_, _ = fit(HiFTStrategy(group_size=group_size), batches=-(-LAYERS // group_size))
    assert trainer_.strategy.hift.cycle == 1
    unchanged = [name for name, p in module.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_only_the_active_block_changes_in_a_step():
    before = {name: p.detach().clone() for name, p in SmallTransformer().named_parameters()}
    module, trainer_, _ = fit(batches=1)
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainer_.strategy.hift.plan.blocks[-1].parameters)


def test_frozen_patterns_are_never_trained_and_are_trainable_again_afterwards():
    before = SmallTransformer().embedding.weight.detach().clone()
    module, trainer_, steps = fit(HiFTStrategy(frozen=["embedding.*"]), batches=2 * LAYERS)
    assert torch.equal(module.embedding.weight, before)
    assert frozenset({"embedding"}) not in steps
    assert len(trainer_.strategy.hift.plan.blocks) == LAYERS - 1
    assert all(p.requires_grad for p in module.parameters())


def test_parameters_that_come_to_the_optimizer_while_training_are_refused():
    class Unfreezes(SmallTransformer):
        def __init__(self):
            super().__init__(lambda _: torch.optim.AdamW(p for p in self.parameters() if p.requires_grad))
            self.embedding.requires_grad_(False)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.embedding.requires_grad_(True)
                self.optimizers().add_param_group({"params": [self.embedding.weight]})

    trainer_ = trainer(max_epochs=2)
    with pytest.raises(ConfigurationError, match="1 parameters have come to the optimizer since the blocks were cut"):
        trainer_.fit(Unfreezes(), loader(make_batches(LAYERS)))
    assert trainer_.global_step == LAYERS


def test_a_strategy_goes_from_one_trainer_to_the_next(any_device):
    strategy = HiFTStrategy()
    for accelerator in (any_device.type, "auto"):  # which is the strategy's by then
        module = SmallTransformer()
        trainer(strategy, devices=1, accelerator=accelerator).fit(module, loader(make_batches(LAYERS)))
        assert strategy.hift.cycle == 1
        assert strategy.root_device.type == any_device.type


def test_a_parameter_that_the_user_froze_stays_frozen():
    module = SmallTransformer()
    module.embedding.weight.requires_grad_(False)
    module, _, steps = fit(module=module, batches=2 * LAYERS)
    assert frozenset({"embedding"}) not in steps
    assert not module.embedding.weight.requires_grad


def test_parameters_left_out_of_the_optimizer_are_named_and_do_not_train():
    class HeadOnly(SmallTransformer):
        def configure_optimizers(self):
            return torch.optim.SGD(self.head.parameters(), lr=0.1)

    told = r"\d+ parameters require a gradient but are in no param group.*embedding.*`frozen=\["
    with pytest.warns(UserWarning, match=told):
        module, _, steps = fit(module=HeadOnly(), batches=3)
    assert steps == [frozenset({"head"})] * 3
    assert all(p.requires_grad for p in module.parameters())


def test_the_start_of_fit_says_the_blocks_the_largest_and_the_cycle_in_one_line(capsys, caplog):
    with caplog.at_level("INFO"):
        _, trainer_, _ = fit()
    lines = [record.message for record in caplog.records if record.message.startswith("HiFT:")]
    lines += [line for line in capsys.readouterr().err.splitlines() if line.startswith("HiFT:") and not lines]
    assert len(lines) == 1
    largest = trainer_.strategy.hift.plan.largest
    assert f"{LAYERS} blocks" in lines[0]
    assert f"`{largest.name}`" in lines[0]
    assert f"one cycle is {LAYERS} optimizer steps" in lines[0]


def test_too_few_planned_steps_are_warned_of():
    with pytest.warns(UserWarning, match="2 optimizer steps are planned and one cycle takes 4, so 2 of the 4 blocks"):
        fit(batches=2)


def test_enough_planned_steps_are_not_warned_of():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(batches=LAYERS)
    assert not [w for w in caught if "will not be trained" in str(w.message)]


class WithUnusedLayer(SmallTransformer):
    """Its ``unused`` layer takes no part in the loss."""

    def __init__(self):
        super().__init__()
        self.unused = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_block_without_gradient_is_named_and_does_not_stop_the_rotation(precision):
    arguments = {}
    if precision == "16-mixed":
        arguments = {"plugins": L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    with pytest.warns(UserWarning, match=r"No gradient reached block \d+ \(`unused\.1`\)"):
        _, trainer_, steps = fit(module=WithUnusedLayer(), batches=12, **arguments)
    assert trainer_.strategy.hift.updates == 12
    assert {layer for step in steps for layer in step} == {"embedding", "layers.0", "layers.1", "head"}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_module_that_clips_by_itself_is_asked_to_where_there_is_something_to_clip(algorithm):
    class Clips(WithUnusedLayer):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            assert (gradient_clip_val, gradient_clip_algorithm) == (0.1, algorithm)
            getattr(torch.nn.utils, f"clip_grad_{algorithm}_")(self.parameters(), gradient_clip_val)
            clipped.append(trainer_.strategy.hift.block.name)

    clipped = []
    trainer_ = trainer(gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    with pytest.warns(UserWarning, match=r"No gradient reached block \d+ \(`unused\.1`\)"):
        trainer_.fit(Clips(), loader(make_batches(5)))
    assert trainer_.strategy.hift.updates == 5
    assert clipped == ["layers.1", "layers.0", "embeddings"]


def test_a_gradient_of_a_frozen_weight_that_the_module_asks_for_ends_with_the_remedy():
    class WeighsItsLoss(SmallTransformer):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            (gradient,) = torch.autograd.grad(loss, self.head.weight, retain_graph=True)
            return loss / gradient.norm()

    with pytest.raises(RuntimeError, match="does not require grad") as raised:
        fit(module=WeighsItsLoss())
    assert "`always_active=[...]`" in raised.value.__notes__[0]
    fit(HiFTStrategy(always_active=["head.*"]), module=WeighsItsLoss())


def test_a_modules_own_backward_is_called_of_a_loss_that_has_no_graph():
    class GoesBackByItself(SmallTransformer):
        def training_step(self, batch, batch_idx):
            self.kept = super().training_step(batch, batch_idx)
            return self.kept.detach()

        def backward(self, loss):
            self.kept.backward()

    own, plain = GoesBackByItself(), SmallTransformer()
    fit(module=own)
    fit(module=plain)
    assert_same(own.state_dict(), plain.state_dict())


def test_a_modules_own_backward_may_go_back_through_a_loss_that_does_not_reach_the_block():
    class GoesBackByItself(WithUnusedLayer):
        def backward(self, loss):
            loss.backward()

    with pytest.warns(UserWarning, match=r"No gradient reached block \d+ \(`unused\.1`\)"):
        _, trainer_, _ = fit(module=GoesBackByItself(), batches=5)
    assert trainer_.strategy.hift.updates == 5


class UnusedLayerByHand(HiFTManualMixin, WithUnusedLayer):
    """Steps by hand, clipping by value: through `hift_step`, or as Lightning's documentation does it.

    Args:
        of_the_mixin: whether by `hift_step`.
    """

    def __init__(self, of_the_mixin):
        super().__init__()
        self.automatic_optimization, self.of_the_mixin = False, of_the_mixin

    def training_step(self, batch, batch_idx):
        if self.of_the_mixin:
            self.hift_step(self.loss(batch), gradient_clip_val=0.1, gradient_clip_algorithm="value")
        else:
            self.manual_backward(self.loss(batch))
            self.optimizers().step()


@pytest.mark.parametrize("of_the_mixin", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_block_without_gradient_does_not_stop_a_loop_by_hand(of_the_mixin, scaled):
    arguments = {}
    if scaled:
        arguments = {"plugins": L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))}
    with pytest.warns(UserWarning, match=r"No gradient reached block \d+ \(`unused\.1`\)"):
        _, trainer_, steps = fit(module=UnusedLayerByHand(of_the_mixin), batches=12, **arguments)
    assert trainer_.strategy.hift.updates == 12
    assert {layer for step in steps for layer in step} == {"embedding", "layers.0", "layers.1", "head"}


def test_a_block_without_gradient_does_not_stop_one_of_several_optimizers():
    module = Adversarial()
    module.generator.append(nn.Linear(4, 4))  # whose output nothing uses
    module.generator.forward = lambda noise: nn.Sequential.forward(module.generator[:3], noise)
    trainer_ = trainer("hift")
    with pytest.warns(UserWarning, match=r"No gradient reached block \d+ \(`generator\.3`\)"):
        trainer_.fit(module, loader([torch.randn(2, 4) for _ in range(6)]))
    assert [engine.updates for engine in trainer_.strategy.engines] == [6, 6]


@pytest.mark.parametrize("first_alone", [False, True], ids=["both", "every second"])
def test_what_one_micro_batch_has_reached_the_step_has_reached(first_alone):
    class ReachedByOne(SmallTransformer):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if batch_idx % 2 or not first_alone else loss.detach()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No gradient reached")
        _, trainer_, steps = fit(module=ReachedByOne(), batches=4 * LAYERS, accumulate_grad_batches=2)
    assert steps == TOP_DOWN * 2
    assert trainer_.strategy.hift.updates == 2 * LAYERS


class ChangesOptimizers(L.Callback):
    """Calls a function in the middle of the second cycle."""

    def __init__(self, change):
        self.change = change

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == LAYERS + 1:
            self.change(trainer, pl_module)


@pytest.mark.parametrize("where", ["trainer", "strategy"])
@pytest.mark.parametrize("extra", [[], [HiFTMonitor()]], ids=["alone", "monitor"])
def test_an_optimizer_that_has_been_replaced_is_refused(where, extra):
    def replace(trainer, module):
        target = trainer if where == "trainer" else trainer.strategy
        target.optimizers = [torch.optim.SGD(module.parameters(), lr=0.1)]

    with pytest.raises(ConfigurationError, match=r"no blocks for the optimizer `SGD`.*`trainer\.strategy\.setup_opt"):
        fit(batches=3 * LAYERS, extra=[ChangesOptimizers(replace), *extra])


@pytest.mark.parametrize("extra", [[], [HiFTMonitor()]], ids=["alone", "monitor"])
@pytest.mark.parametrize("monitor_last", [False, True])
def test_optimizers_that_are_made_anew_in_training_are_for_all_layers(extra, monitor_last):
    change = ChangesOptimizers(lambda trainer, module: trainer.strategy.setup_optimizers(trainer))
    extra = [change, *extra] if monitor_last else [*extra, change]
    module, trainer_, steps = fit(batches=3 * LAYERS + 1, extra=extra)
    assert steps == [*TOP_DOWN, TOP_DOWN[0], *TOP_DOWN * 2]
    assert trainer_.strategy.hift.updates == 2 * LAYERS
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_loss_that_depends_on_nothing_is_an_error():
    class Detached(SmallTransformer):
        def training_step(self, batch, batch_idx):
            return self.loss(batch).detach()

    with pytest.raises(RuntimeError, match="No gradient reached any of the 4 blocks in 16 steps"):
        fit(module=Detached(), batches=20)


class TwoHeads(L.LightningModule):
    """Batches use one of its two heads in turn.

    Args:
        body: layers below them.
    """

    def __init__(self, body):
        super().__init__()
        self.body = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(body))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)) for _ in range(2))

    def training_step(self, batch, batch_idx):
        for layer in self.body:
            batch = layer(batch)
        return self.heads[batch_idx % 2](batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit_two_heads(body, steps=24, **arguments):
    """The warnings of blocks without gradient, and the heads that have not changed."""
    module = TwoHeads(body)
    before = [head[0].weight.detach().clone() for head in module.heads]
    trainer_ = trainer(HiFTStrategy(**arguments))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_.fit(module, loader([torch.randn(2, 4) for _ in range(steps)]))
    told = [str(each.message) for each in caught if "No gradient reached" in str(each.message)]
    return told, [i for i, head in enumerate(module.heads) if torch.equal(before[i], head[0].weight)], trainer_.strategy


def test_blocks_whose_turns_never_meet_the_batches_that_use_them_are_named_at_the_end():
    told, unchanged, strategy = fit_two_heads(body=2, steps=44)
    assert unchanged == [0, 1]
    assert "block 2 (`heads.0`, 11 steps), block 3 (`heads.1`, 11 steps) in this run, so nothing there was" in told[-1]
    assert all("`steps_per_block`" in each and "`always_active=[...]`" in each for each in told)
    # at the first turn, after ten steps, and at the end
    assert [sum(f"`heads.{head}`" in each for each in told) for head in (0, 1)] == [3, 3]
    report = strategy.report()
    assert [block.visits for block in report.blocks] == [11] * 4
    assert [block.without_gradient for block in report.blocks] == [0, 0, 11, 11]
    note = "No gradient reached block 3 (`heads.1`) in 11 visits of this run."
    assert str(report).endswith(note)
    assert note in block_table(watches_of(strategy.engines, ratio_every=0), 0, ranks=1, peaks={}).caption


def test_where_no_turn_ever_meets_such_a_batch_the_error_names_this_cause():
    with pytest.raises(RuntimeError, match=r"No gradient .* 2 blocks in 16 steps: .* or batches .*`steps_per_block`"):
        fit_two_heads(body=0)


@pytest.mark.parametrize(
    ("body", "remedy"),
    [(0, {"steps_per_block": 2}), (2, {"steps_per_block": 2}), (2, {"always_active": ["heads.*"]})],
)
def test_what_these_messages_name_trains_such_parts(body, remedy):
    told, unchanged, _ = fit_two_heads(body, **remedy)
    assert unchanged == []
    assert not any("so nothing there was trained" in each for each in told)


class StepsAnotherOptimizer(SmallTransformer):
    """Its weights are stepped by an optimizer that Lightning is not given, as Pyro's are."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.counts = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if loss.requires_grad:
            loss.backward()
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.Adam([self.counts])


def test_a_run_in_which_an_optimizer_has_updated_nothing_is_told_of():
    module = StepsAnotherOptimizer()
    with (
        pytest.warns(UserWarning, match=r"`optimizer\.step\(\)` was called 3 times in a row"),
        pytest.warns(UserWarning, match=r"optimizer `Adam` has made no update in this run of 6 optimizer steps"),
    ):
        trainer("hift").fit(module, loader(make_batches(6)))


def test_optimizers_that_are_made_anew_after_the_last_step_are_not_told_of():
    class MakesAnew(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.strategy.setup_optimizers(trainer)

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made no update")
        fit(batches=LAYERS, extra=[MakesAnew()])


def test_steps_that_a_grad_scaler_skips_are_no_idle_optimizer():
    class Overflows(SmallTransformer):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("inf")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made no update")
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        trainer("hift", plugins=[precision]).fit(Overflows(), loader(make_batches(2)))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_run_that_trains_is_not_told_of_idle_optimizers(by_hand):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made no update|.*times in a row|No gradient reached")
        if by_hand:
            trainer("hift").fit(Adversarial(), loader([torch.randn(2, 4) for _ in range(12)]))
        else:
            fit(batches=12)


def test_a_step_without_loss_keeps_the_turn():
    class SkipsSecond(SmallTransformer):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    _, trainer_, steps = fit(module=SkipsSecond(), batches=3)
    assert [step for step in steps if step] == TOP_DOWN[:2]
    assert trainer_.strategy.hift.updates == 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("order", "sideways"),
        ("group_size", 0),
        ("group_size", 1.5),
        ("lr_update", "never"),
        ("steps_per_block", 0),
        ("offload", "moon"),
        ("seed", "x"),
    ],
)
def test_a_bad_argument_is_refused_at_once_and_named(argument, value):
    with pytest.raises(ConfigurationError, match=f"`{argument}={value!r}`"):
        HiFTStrategy(**{argument: value})


@pytest.mark.parametrize("argument", ["frozen", "layers"])
def test_a_pattern_that_matches_nothing_is_refused_before_training(argument):
    with pytest.raises(ConfigurationError, match="nothing_like_this"):
        fit(HiFTStrategy(**{argument: ["*.nothing_like_this"]}))


def test_the_report_says_where_state_is():
    _, trainer_, _ = fit(batches=LAYERS + 1)
    report = trainer_.strategy.report()
    assert [block.visits for block in report.blocks] == [1, 1, 1, 2]
    for row, block in zip(report.blocks, trainer_.strategy.hift.plan.blocks, strict=True):
        # two moments of fp32 and a step count of 4 bytes for each parameter
        assert row.parked_bytes == 2 * block.nbytes + 4 * len(block.parameters)
        assert row.device_bytes == 0
    assert "layers.1" in str(report)


def test_a_report_before_fit_is_refused_with_the_remedy():
    with pytest.raises(MisconfigurationException, match="before `Trainer.fit`"):
        HiFTStrategy().report()


@pytest.mark.parametrize("strategy", ["hift", HiFTStrategy])
def test_several_devices_are_refused_in_one_sentence(strategy):
    strategy = strategy if isinstance(strategy, str) else strategy()
    with pytest.raises(MisconfigurationException, match="`devices=1`.*hift_ddp"):
        trainer(strategy, devices=2)


def test_registering_twice_is_harmless():
    import importlib

    import hift_lightning.strategies

    importlib.reload(hift_lightning.strategies)
    assert trainer("hift").strategy.strategy_name == "hift"
