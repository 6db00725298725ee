"""What `plan` refuses, and what it leaves alone."""

import re
from dataclasses import replace
from functools import partial, update_wrapper
from types import MethodType

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from torch.nn.functional import scaled_dot_product_attention
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import BatchEncoding

from hift_lightning import HiFTManualMixin, HiFTStrategy
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.planner import plan
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


def test_a_precision_that_cannot_be_planned_is_named():
    with pytest.raises(ConfigurationError, match=r"`precision='64-true'` cannot be planned; choose one of 32-true"):
        plan(SmallTransformer(), "hift", make_batches(1)[0], precision="64-true")


@pytest.mark.parametrize(("short", "name"), [(32, "32-true"), ("bf16", "bf16-mixed"), ("16", "16-mixed")])
def test_a_precision_has_all_of_lightnings_names(short, name):
    short, full = (plan(SmallTransformer(), "hift", make_batches(1)[0], precision=each) for each in (short, name))
    assert short.peak_bytes == full.peak_bytes


def test_a_shape_that_depends_on_values_is_told_in_a_sentence():
    class PicksRows(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[batch[:, 0] > 0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(
        ConfigurationError,
        match=r"`PicksRows` makes a tensor whose shape depends on values .* or give a number for `group_size`",
    ):
        plan(PicksRows(), "hift", torch.ones(3, 4))


def test_sparse_gradients_are_told_in_a_sentence():
    module = SmallTransformer()
    module.embedding.sparse = True
    with pytest.raises(ConfigurationError, match=r"A tensor is sparse, .* plan with `sparse=False`"):
        plan(module, "hift", make_batches(1)[0])
    assert plan(module, HiFTStrategy(frozen=["embedding.*"]), make_batches(1)[0]).peak_bytes > 0


def test_the_module_stays_as_it_was():
    module = SmallTransformer()
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    planned = plan(module, "hift", make_batches(1)[0])
    assert planned.numel == sum(p.numel() for p in module.parameters())
    for name, p in module.named_parameters():
        same, values, required_grad = before[name]
        assert p is same
        assert torch.equal(p, values)
        assert p.requires_grad == required_grad
    assert module._trainer is None


@pytest.mark.parametrize(
    ("nbytes", "unit", "size"),
    [(15.08 * 2**30, "GiB", "15.08"), (0.1 * 2**30 + 1, "GiB", "0.10"), (0.1 * 2**30 - 1, "MiB", "102.40")],
)
def test_a_plan_is_printed_as_a_table_in_a_unit_that_shows_its_size(nbytes, unit, size, capsys):
    planned = plan(SmallTransformer(), "hift", make_batches(1)[0])
    trace = replace(planned.peak.trace, peak_bytes=round(nbytes), roles_at_peak={"weights": round(nbytes)})
    print(replace(planned, blocks=(replace(planned.peak, trace=trace),)))
    first, title, *table = capsys.readouterr().out.splitlines()
    assert first == f"{planned.numel:,} parameters, all trained, in 1 block(s)"
    assert title.strip() == f"At the peak: in the step of `{planned.peak.name}`, in {trace.peak_phase}"
    words = [re.findall(r"[\w.]+", line) for line in table]
    assert [found for found in words if found] == [
        ["bytes", "on", "the", "device", "for", unit],
        ["weights", size],
        ["all", size],
    ]


def test_a_number_that_is_read_does_not_stop_planning():
    class ReadsLoss(SmallTransformer):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert isinstance(loss.item(), float)
            return loss

    assert plan(ReadsLoss(), "full", make_batches(1)[0]).peak_bytes > 0


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_module_that_ends_its_training_or_goes_on_does_not_disturb_planning(hook, value):
    class Decides(SmallTransformer):
        pass

    def decide(self, *args):
        self.trainer.should_stop = value

    setattr(Decides, hook, decide)
    batch = make_batches(1)[0]
    for strategy in ("full", "hift"):
        assert plan(Decides(), strategy, batch) == plan(SmallTransformer(), strategy, batch)


# --- modules as people write them -------------------------------------------------------------------------------------


class ByHand(SmallTransformer):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()
        self.optimizers().zero_grad()


class InWindows(HiFTManualMixin, SmallTransformer):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.hift_step(super().training_step(batch, batch_idx), accumulate_grad_batches=2)


class TwoOptimizers(ByHand):
    def configure_optimizers(self):
        return [torch.optim.AdamW(self.head.parameters()), torch.optim.AdamW(self.layers.parameters())]


class LeavesNaNOut(SmallTransformer):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if torch.isnan(loss) else loss


class StepsItsSchedule(ByHand):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=3)]


@pytest.mark.parametrize("strategy", ["hift", "full"])
def test_a_schedule_that_is_stepped_by_hand_does_not_disturb_planning(strategy):
    batch = make_batches(1)[0]
    assert plan(StepsItsSchedule(), strategy, batch).peak_bytes == plan(ByHand(), strategy, batch).peak_bytes


class AsksForALoggedValue(SmallTransformer):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert self.trainer.callback_metrics["train/loss"] > 0


@pytest.mark.parametrize("strategy", ["hift", "full"])
@pytest.mark.parametrize(
    ("module", "told"),
    [
        (InWindows, "`InWindows` does not step its optimizer once in each batch, as where it accumulates"),
        (TwoOptimizers, "`TwoOptimizers` steps 2 optimizers by hand"),
        (LeavesNaNOut, r"`LeavesNaNOut` had no loss while planning, .* `nonfinite='skip'`"),
        (AsksForALoggedValue, r"`AsksForALoggedValue` has failed while .*KeyError: 'train/loss'.*train with a number"),
    ],
)
def test_what_cannot_be_planned_is_told_in_a_sentence(strategy, module, told):
    with pytest.raises(ConfigurationError, match=told):
        plan(module(), strategy, make_batches(1)[0])


def test_a_layer_that_the_loss_does_not_use_is_planned_all_the_same():
    class HasMore(SmallTransformer):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Linear(4, 4)

    batch = make_batches(1)[0]
    unused = 4 * (4 * 4 + 4)
    assert plan(HasMore(), "hift", batch).peak_bytes == plan(SmallTransformer(), "hift", batch).peak_bytes + unused


class WithMetrics(SmallTransformer):
    """Has what modules have beside their loss, none of which is on the device in a step."""

    def __init__(self, make_optimizer=torch.optim.AdamW):
        super().__init__(make_optimizer)
        self.mean, self.accuracy = MeanMetric(), MulticlassAccuracy(3)
        self.several = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.several.update(torch.zeros_like(batch[1]), batch[1])
        assert len(self.lr_schedulers()) == 2
        assert self.accuracy(torch.zeros_like(batch[1]), batch[1]).shape == ()
        self.logger.experiment.add_text("of", "planning")
        return loss

    def configure_callbacks(self):
        return [EarlyStopping("train/loss")]

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        short = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=3)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [
            {"scheduler": short, "interval": "step"},
            {"scheduler": plateau, "interval": "step", "monitor": "train/loss"},
        ]


@pytest.mark.parametrize("strategy", ["hift", "full"])
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"lr": torch.tensor(1e-3)}], ids=str)
def test_metrics_loggers_callbacks_and_schedules_do_not_disturb_planning(strategy, settings):
    def make(parameters):
        return torch.optim.AdamW(parameters, **settings)

    batch = make_batches(1)[0]
    planned, plain = plan(WithMetrics(make), strategy, batch), plan(SmallTransformer(make), strategy, batch)
    assert planned.peak_bytes == pytest.approx(plain.peak_bytes, abs=1024)


@pytest.mark.parametrize("strategy", ["hift", "full"])
@pytest.mark.parametrize("place", ["attribute", "closure", "LightningCLI"])
def test_an_optimizer_that_was_made_with_the_module_is_planned(place, strategy):
    class KeepsASetting(torch.optim.AdamW):  # on itself, which is in no pickle of an optimizer
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.own = 1.0

        def step(self, closure=None):
            assert place == "attribute" or self.own
            return super().step(closure)

    class Holds(SmallTransformer):
        def configure_optimizers(self):
            return self.optimizer

    module = Holds()
    module.optimizer = optimizer = KeepsASetting(module.parameters(), lr=1e-2)
    if place != "attribute":
        del module.optimizer
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if place == "closure":
        module.configure_optimizers = lambda: ([optimizer], [schedule])
    if place == "LightningCLI":
        configure = partial(LightningCLI.configure_optimizers, optimizer=optimizer, lr_scheduler=schedule)
        module.configure_optimizers = MethodType(update_wrapper(configure, LightningCLI.configure_optimizers), module)
    batch = make_batches(1)[0]
    assert plan(module, strategy, batch).peak_bytes == plan(SmallTransformer(), strategy, batch).peak_bytes
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(module.parameters())


@pytest.mark.parametrize("of", ["module", "data"])
def test_hyperparameters_may_hold_a_tensor(of):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(make_batches(1))

    module, data = SmallTransformer(), Data()
    (module if of == "module" else data).save_hyperparameters({"weights": torch.ones(2)})
    trainer(HiFTStrategy(group_size="auto", memory_budget="2GiB"), max_steps=1).fit(module, data)


def test_group_size_auto_trains_a_module_that_asks_for_its_data():
    class Data(L.LightningDataModule):
        classes, made = 3, 0

        def setup(self, stage):
            self.made += 1
            self.batches = make_batches(2)

        def train_dataloader(self):
            return loader(self.batches)

    class AsksForData(SmallTransformer):
        def training_step(self, batch, batch_idx):
            assert self.trainer.datamodule.classes == 3
            return super().training_step(batch, batch_idx)

    trainer_ = trainer(HiFTStrategy(group_size="auto", memory_budget="2GiB"))
    trainer_.fit(AsksForData(), data := Data())
    assert trainer_.strategy.settings.group_size == LAYERS
    assert data.made == 1


@pytest.mark.parametrize(
    "shapes", [[(8, 4)] * 3, [(2, 8, 4)] * 3, [(1, 2, 2, 8, 4)] * 3, [(2, 2, 8, 4), (2, 2, 8, 4), (2, 2, 8, 6)]]
)
def test_attention_of_any_shape_is_planned(shapes):
    class Attends(SmallTransformer):
        def training_step(self, batch, batch_idx):
            query, key, value = (self.head.weight.new_ones(shape) * self.head.weight.sum() for shape in shapes)
            return super().training_step(batch, batch_idx) + scaled_dot_product_attention(query, key, value).sum()

    assert plan(Attends(), "full", make_batches(1)[0]).peak_bytes > 0


def test_a_batch_encoding_is_left_as_it_is():
    class TakesEncoding(SmallTransformer):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["input_ids"], batch["labels"]), batch_idx)

    inputs, labels = make_batches(1)[0]
    batch = BatchEncoding({"input_ids": inputs, "labels": labels})
    expected = plan(SmallTransformer(), "hift", (inputs, labels))
    assert plan(TakesEncoding(), "hift", batch).peak_bytes == expected.peak_bytes
    assert type(batch["input_ids"]) is torch.Tensor


@pytest.mark.parametrize("strategy", ["ddp", "hift_ddp", None, HiFTStrategy])
def test_a_strategy_that_is_none_of_these_is_refused(strategy):
    with pytest.raises(ConfigurationError, match=r"`strategy=.*` cannot be planned; give `HiFTStrategy\(...\)`"):
        plan(SmallTransformer(), strategy, make_batches(1)[0])


def test_an_error_in_forward_leaves_torch_as_it_was():
    class Fails(SmallTransformer):
        def training_step(self, batch, batch_idx):
            raise ValueError("of the user")

    with pytest.raises(ConfigurationError, match="ValueError: of the user"):
        plan(Fails(), "hift", make_batches(1)[0], precision="bf16-mixed")
    assert not torch.overrides._get_current_function_mode_stack()
    query = torch.ones(1, 1, 2, 2)
    assert torch.equal(scaled_dot_product_attention(query, query, query), query)
