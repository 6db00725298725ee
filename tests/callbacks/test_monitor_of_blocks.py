"""What the monitor measures of each block equals what is measured beside it, and costs no device memory."""

import csv
import gc
import math
from pathlib import Path
from statistics import fmean

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelPruning
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Adafactor

from hift_lightning import HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTManualMixin, HiFTStrategy
from hift_lightning.callbacks import ChangedParameters, HiFTMonitor
from hift_lightning.callbacks.block_table import _count, block_table
from hift_lightning.callbacks.block_watch import short_names
from hift_lightning.callbacks.update_ratio import UpdateRatio
from hift_lightning.engine.errors import ConfigurationError
from tests.processes import run
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer

STEPS = 2 * LAYERS + 1


class Witness(Callback):
    """Measures the same from copies of all weights (the masters, where there are some) and from plain gradients."""

    def __init__(self):
        self.gradient_norms, self.update_ratios = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = trainer.strategy.hift.master_state_dict()
        self.parts = trainer.strategy.hift.active_parts
        names = self.parts[0].parameters
        self.before = {name: state[name].to("cpu", torch.float64, copy=True) for name in names}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: p.grad.double() for name, p in pl_module.named_parameters() if p.grad is not None}
        for part in self.parts:
            own = [gradients[name] for name in part.own_parameters if name in gradients]
            self.gradient_norms.setdefault(part.index, []).append(math.sqrt(sum(g.square().sum().item() for g in own)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = trainer.strategy.hift.master_state_dict()
        for part in self.parts:
            old = torch.cat([self.before[name].flatten() for name in part.own_parameters])
            new = torch.cat([state[name].cpu().double().flatten() for name in part.own_parameters])
            self.update_ratios.setdefault(part.index, []).append(((new - old).norm() / old.norm()).item())


def fitted(strategy, steps=STEPS, callbacks=(), module=None, update_ratio_every=1, **arguments):
    monitor = HiFTMonitor(update_ratio_every=update_ratio_every)
    module = module or SmallTransformer()
    trainer(strategy, callbacks=[monitor, *callbacks], devices=1, **arguments).fit(module, loader(make_batches(steps)))
    return monitor


def test_an_optimizer_that_finds_its_own_rate_has_none():
    module = SmallTransformer()
    module.make_optimizer = Adafactor
    monitor = fitted(HiFTStrategy(), module=module)
    (watch,) = monitor._watches
    assert watch.rate is None
    assert all(record.rate is None and record.update_ratio.value > 0 for record in watch.records.values())


def close(numbers):
    return pytest.approx(numbers, rel=1e-5)


def of(mean):
    """How many numbers a mean is of, and the mean."""
    return mean.count, mean.value


def mean_of(numbers):
    return len(numbers), close(fmean(numbers)) if numbers else None


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row["epoch"]], [row for row in rows if not row["epoch"]]


def logging_to(folder):
    return {"logger": CSVLogger(folder, name="", version=""), "log_every_n_steps": 1}


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_ratio_and_norm_are_those_of_copies_made_beside_it(any_device, update):
    witness = Witness()
    monitor = fitted(
        HiFTStrategy(update=update), callbacks=[witness], accelerator=any_device.type,
        gradient_clip_val=None if update == "fused" else 0.01,
    )  # fmt: skip
    for index, record in monitor._watches[0].records.items():
        assert of(record.update_ratio) == mean_of(witness.update_ratios[index])
        assert of(record.gradient_norm) == mean_of([] if update == "fused" else witness.gradient_norms[index])
        assert record.page_in_ms.count == record.update_ratio.count
        assert record.page_in_ms.value > 0
        assert record.rate == 0.01


@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_what_is_always_active_is_measured_under_every_update(any_device, update):
    witness = Witness()
    strategy = HiFTStrategy(update=update, always_active=["norm.*", "head.*"])
    monitor = fitted(strategy, callbacks=[witness], accelerator=any_device.type)
    for index, record in monitor._watches[0].records.items():
        assert of(record.update_ratio) == mean_of(witness.update_ratios[index])
        assert of(record.gradient_norm) == mean_of([] if update == "fused" else witness.gradient_norms[index])


def test_what_is_always_active_is_measured_apart_from_the_blocks(tmp_path, capsys):
    witness = Witness()
    strategy = HiFTStrategy(always_active=["norm.*", "head.*"], order="bottom2up")
    monitor = fitted(strategy, callbacks=[witness], **logging_to(tmp_path))
    records = monitor._watches[0].records
    assert set(records) == set(witness.gradient_norms) == set(range(LAYERS))
    for index, record in records.items():
        assert of(record.gradient_norm) == mean_of(witness.gradient_norms[index])
        assert of(record.update_ratio) == mean_of(witness.update_ratios[index])
    assert records[LAYERS - 1].gradient_norm.count == STEPS

    steps, cycles = rows_of(tmp_path)
    norms = [math.hypot(witness.gradient_norms[0][0], witness.gradient_norms[LAYERS - 1][0])]
    assert [float(steps[0]["hift/grad_norm"])] == close(norms)
    active = sum(part.numel for part in (strategy.hift.plan.blocks[0], strategy.hift.plan.always_active))
    assert float(steps[0]["hift/active_params"]) == active
    first_cycle = witness.gradient_norms[LAYERS - 1][: LAYERS - 1]
    assert float(cycles[0]["hift_grad_norm/03_always_active"]) == close(fmean(first_cycle))
    of_blocks = [witness.update_ratios[index][0] for index in range(LAYERS - 1)]
    assert float(cycles[0]["hift/update_ratio"]) == close(fmean(of_blocks))

    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "always active" in line)
    assert row[:4] == ["always", "active", "83", str(STEPS)]


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_with_masters_the_ratio_is_that_of_the_masters(any_device, update):
    witness = Witness()
    monitor = fitted(
        HiFTStrategy(update=update, master_weights=True), callbacks=[witness], accelerator=any_device.type,
        precision="bf16-true",
    )  # fmt: skip
    for index, record in monitor._watches[0].records.items():
        assert of(record.update_ratio) == mean_of(witness.update_ratios[index])


def test_masters_in_files_are_measured_too(tmp_path):
    witness = Witness()
    strategy = HiFTStrategy(master_weights=True, offload=tmp_path)
    monitor = fitted(strategy, callbacks=[witness], precision="bf16-true")
    assert of(monitor._watches[0].records[1].update_ratio) == mean_of(witness.update_ratios[1])


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_measuring_does_not_raise_the_peak(device, update):
    def peak(*callbacks):
        gc.collect()
        before = device.allocated()
        device.reset_peak()
        arguments = {"accelerator": device.type, "devices": 1, "callbacks": list(callbacks)}
        trainer(HiFTStrategy(update=update), **arguments).fit(SmallTransformer(), loader(make_batches(STEPS)))
        return device.peak() - before

    with_ratio = peak(HiFTMonitor(update_ratio_every=1))
    assert with_ratio == peak(HiFTMonitor(update_ratio_every=0))
    assert with_ratio <= peak() + 2 * device.scalars  # Lightning keeps numbers that are logged on the device


def test_pieces_of_large_tensors_add_up(monkeypatch):
    monkeypatch.setattr("hift_lightning.callbacks.update_ratio.PIECE_NUMEL", 40)  # some rows of each matrix
    witness = Witness()
    monitor = fitted(HiFTStrategy(), callbacks=[witness])
    for index, record in monitor._watches[0].records.items():
        assert of(record.update_ratio) == mean_of(witness.update_ratios[index])


def test_norms_under_a_grad_scaler_are_those_without_it():
    plain = fitted(HiFTStrategy(), steps=LAYERS)
    # a fused optimizer unscales gradients inside its step
    for fused in (False, True):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)
        module = SmallTransformer(lambda parameters, fused=fused: torch.optim.AdamW(parameters, lr=1e-2, fused=fused))
        scaled = fitted(HiFTStrategy(), steps=LAYERS, module=module, plugins=plugin)
        for one, other in zip(plain._watches[0].records.values(), scaled._watches[0].records.values(), strict=True):
            assert one.gradient_norm.value == close(other.gradient_norm.value)


def test_a_sparse_gradient_has_a_norm():
    norms = []
    for sparse in (False, True):
        module = SmallTransformer(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        module.embedding.sparse = sparse
        norms.append(fitted(HiFTStrategy(), LAYERS, module=module)._watches[0].records[0].gradient_norm.value)
    assert norms[0] == close(norms[1])


def test_norm_and_rate_of_each_step_are_logged(tmp_path):
    witness = Witness()
    halving = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, LAYERS, 0.5)  # noqa: E731
    module = SmallTransformer(make_scheduler=halving)
    fitted(HiFTStrategy(order="bottom2up"), callbacks=[witness], module=module, **logging_to(tmp_path))
    steps, _ = rows_of(tmp_path)
    expected = [witness.gradient_norms[step % LAYERS][step // LAYERS] for step in range(STEPS)]
    assert [float(row["hift/grad_norm"]) for row in steps] == close(expected)
    assert [float(row["hift/lr"]) for row in steps] == close([0.01 * 0.5 ** (step // LAYERS) for step in range(STEPS)])
    assert {float(row["memory/weights_bytes"]) for row in steps} == {4.0 * sum(p.numel() for p in module.parameters())}
    gradients = [float(row["memory/gradients_bytes"]) for row in steps]
    assert gradients[:LAYERS] == [4.0 * block.numel for block in module.trainer.strategy.hift.plan.blocks]


def test_each_cycle_logs_the_means_of_every_block_once(tmp_path):
    witness = Witness()
    fitted(HiFTStrategy(steps_per_block=2), steps=3 * LAYERS, callbacks=[witness], **logging_to(tmp_path))
    _, cycles = rows_of(tmp_path)
    assert [int(row["step"]) for row in cycles] == [2 * LAYERS - 1, 3 * LAYERS - 1]  # the second one is cut short
    names = ["00_embeddings", "01_layers.0", "02_layers.1", "03_head"]
    for index, name in enumerate(names):
        assert float(cycles[0][f"hift_grad_norm/{name}"]) == close(sum(witness.gradient_norms[index][:2]) / 2)
        assert float(cycles[0][f"hift_update_ratio/{name}"]) == close(sum(witness.update_ratios[index][:2]) / 2)
        assert float(cycles[0][f"hift_lr/{name}"]) == close(0.01)
        assert float(cycles[0][f"hift_page_in_ms/{name}"]) > 0
    assert {name for name in cycles[1] if cycles[1][name] and name.startswith("hift_grad_norm")} == {
        f"hift_grad_norm/{name}" for name in names[2:]
    }
    assert [[float(cycle[f"hift_visits/{name}"]) for name in names] for cycle in cycles] == [[2] * 4, [2, 2, 4, 4]]
    ratios = [float(cycles[0][f"hift_update_ratio/{name}"]) for name in names]
    assert float(cycles[0]["hift/update_ratio"]) == close(sum(ratios) / LAYERS)


class Recording(Logger):
    """Somebody's logger, which keeps the names of what it is given."""

    name, version = "recording", 0

    def __init__(self):
        super().__init__()
        self.names = set()

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.names |= metrics.keys()


def test_any_logger_is_given_the_same_names(tmp_path):
    table, pages, own = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tensorboard"), Recording()
    fitted(HiFTStrategy(always_active=["norm.*"]), logger=[table, pages, own], log_every_n_steps=1)
    steps, _ = rows_of(Path(table.log_dir))
    assert own.names == {name for name in steps[0] if name != "step"}
    events = EventAccumulator(pages.log_dir).Reload()
    assert own.names == set(events.Tags()["scalars"]) - {"hp_metric"}
    blocks = ["00_embeddings", "01_layers.0", "02_layers.1", "03_head", "04_always_active"]
    of_blocks = {f"{what}/{name}" for what in ("hift_grad_norm", "hift_lr", "hift_visits") for name in blocks}
    of_blocks |= {f"hift_page_in_ms/{name}" for name in blocks[:-1]}
    roles = {f"memory/{role}_bytes" for role in ("weights", "gradients", "optimizer_state", "peak_device")}
    rotation = {f"hift/{what}" for what in ("block", "cycle", "lr", "grad_norm", "page_in_ms", "parked_bytes")}
    assert of_blocks | roles | rotation < own.names


def test_the_strategy_alone_logs_nothing():
    own = Recording()
    trainer(HiFTStrategy(), logger=own, log_every_n_steps=1).fit(SmallTransformer(), loader(make_batches(STEPS)))
    assert own.names <= {"epoch"}


def test_parameters_that_pruning_gives_another_name_are_measured(tmp_path):
    monitor = HiFTMonitor()
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.5)
    changed = ChangedParameters(tmp_path / "changed.json")
    trainer_ = trainer(HiFTStrategy(), max_epochs=2, callbacks=[monitor, pruning, changed])
    trainer_.fit(SmallTransformer(), loader(make_batches(LAYERS)))
    (watch,) = monitor._watches
    assert {record.visits for record in watch.engine.report().parts} == {2}
    assert all(record.update_ratio.value > 0 for record in watch.records.values())
    assert len(changed.steps) == 2 * LAYERS
    assert all(step["changed"] and not step["changed_outside_the_block"] for step in changed.steps[:LAYERS])


def test_the_table_has_the_most_bytes_of_each_role(capsys):
    monitor = fitted(HiFTStrategy())
    printed = " ".join(capsys.readouterr().out.split())
    of_roles = [monitor.numbers[f"memory/peak_{role}_bytes"] / 2**20 for role in ("weights", "gradients")]
    assert f"Most MiB on the device: weights {of_roles[0]:.1f}, gradients {of_roles[1]:.1f}, optimizer" in printed


@pytest.mark.parametrize(("every", "measured"), [(0, 0), (1, 3), (2, 2), (4, 1)])
@pytest.mark.parametrize("settings", [{}, {"steps_per_block": "once", "lr_update": "step"}])
def test_the_ratio_is_measured_in_one_of_so_many_updates_of_a_block(settings, every, measured):
    monitor = fitted(HiFTStrategy(**settings), steps=3 * LAYERS, update_ratio_every=every)
    assert {record.update_ratio.count for record in monitor._watches[0].records.values()} == {measured}


@pytest.mark.parametrize(("cycles", "measured"), [(1, 0), (2, 1), (4, 1), (6, 2)])
def test_an_update_at_rate_0_is_not_measured_and_the_next_one_of_the_block_is(cycles, measured):
    class WarmingUp(SmallTransformer):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step >= LAYERS))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

    monitor = fitted(HiFTStrategy(), steps=cycles * LAYERS, module=WarmingUp(), update_ratio_every=4)
    ratios = [record.update_ratio for record in monitor._watches[0].records.values()]
    assert {ratio.count for ratio in ratios} == {measured}
    assert all(ratio.value > 0 for ratio in ratios if measured)


def test_where_the_rate_stays_0_no_update_is_measured(monkeypatch):
    class Standing(SmallTransformer):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.0)

    begun = []
    monkeypatch.setattr(UpdateRatio, "begin", lambda self, parameters: begun.append(parameters))
    fitted(HiFTStrategy(), steps=4 * LAYERS, module=Standing(), update_ratio_every=2)
    assert begun == []


def test_a_step_that_is_left_out_has_no_norm_and_counts_for_no_block(tmp_path):
    class Spoilt(SmallTransformer):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 1 else 1.0)

    with pytest.warns(UserWarning, match="A step is left out"):
        monitor = fitted(
            HiFTStrategy(nonfinite="skip", order="bottom2up"), LAYERS, module=Spoilt(), **logging_to(tmp_path)
        )
    steps, _ = rows_of(tmp_path)
    assert [math.isnan(float(row["hift/grad_norm"])) for row in steps] == [False, True, False, False]
    assert [monitor._watches[0].records[index].update_ratio.count for index in range(LAYERS)] == [1, 1, 1, 0]
    assert [record.blocks for record in monitor._timeline.records] == [(0,), (), (1,), (2,)]


def test_accumulated_gradients_are_one_update_with_one_loss():
    witness, module = Witness(), SmallTransformer()
    monitor = fitted(HiFTStrategy(), 3 * LAYERS, module=module, callbacks=[witness], accumulate_grad_batches=3)
    for index, record in monitor._watches[0].records.items():
        assert of(record.gradient_norm) == mean_of(witness.gradient_norms[index])
    means = [sum(module.losses[i : i + 3]) / 3 for i in range(0, len(module.losses), 3)]
    assert [step.loss for step in monitor._timeline.records] == close(means)
    assert [step.last for step in monitor._timeline.records] == [1, 2, 3, 4]
    assert [step.blocks for step in monitor._timeline.records] == [(3,), (2,), (1,), (0,)]


@pytest.mark.parametrize(
    ("number", "written"),
    [(999, "999"), (1000, "1k"), (999_499, "999k"), (999_500, "1M"), (999_999, "1M"), (6_738_415_616, "6.74G")],
)
def test_parameters_are_counted_in_three_digits(number, written):
    assert _count(number) == written


def test_the_table_tells_what_is_not_known_under_fused(capsys):
    fitted(HiFTStrategy(update="fused"))
    printed = capsys.readouterr().out
    assert "With update=fused each gradient is used inside backward, so their norm is not known." in " ".join(
        printed.split()
    )
    row = next(line.split() for line in printed.splitlines() if "layers.0" in line)
    assert row[:5] == ["1", "layers.0", "2.22k", "2", "-"]


def test_a_run_that_goes_on_within_an_epoch_is_watched_too(tmp_path):
    batches, straight = make_batches(STEPS), Witness()
    fitted(HiFTStrategy(), callbacks=[straight])
    first = trainer("hift", max_steps=LAYERS + 1)
    first.fit(SmallTransformer(), loader(batches))
    first.save_checkpoint(tmp_path / "last.ckpt")
    monitor = HiFTMonitor(update_ratio_every=1)
    still_to_come = batches[LAYERS + 1 :] + batches[: LAYERS + 1]  # since a plain loader begins anew
    trainer("hift", devices=1, callbacks=[monitor]).fit(
        SmallTransformer(), loader(still_to_come), ckpt_path=tmp_path / "last.ckpt"
    )
    for index, record in monitor._watches[0].records.items():
        later = 2 if index == LAYERS - 1 else 1  # updates that the first run has made
        assert of(record.gradient_norm) == mean_of(straight.gradient_norms[index][later:])
        assert of(record.update_ratio) == mean_of(straight.update_ratios[index][later:])
    assert [step.last for step in monitor._timeline.records] == list(range(LAYERS + 2, STEPS + 1))


def test_under_fused_no_gradient_norm_is_logged(tmp_path):
    fitted(HiFTStrategy(update="fused"), **logging_to(tmp_path))
    steps, cycles = rows_of(tmp_path)
    assert not [name for name in steps[0] if "grad_norm" in name]
    assert float(cycles[0]["hift/update_ratio"]) > 0


class TwoNetworks(HiFTManualMixin, L.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.second = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.first, self.second)]


def test_several_optimizers_have_their_blocks_in_one_table():
    class Both(TwoNetworks):
        def training_step(self, batch, batch_idx):
            for optimizer, network in zip(self.optimizers(), (self.first, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(network(torch.ones(2, 4)).square().mean())
                optimizer.step()

    monitor = fitted(HiFTStrategy(), steps=4, module=Both())
    for watch in monitor._watches:
        assert [record.gradient_norm.count for record in watch.records.values()] == [2, 2]
        assert [record.update_ratio.count for record in watch.records.values()] == [2, 2]
    console = Console(record=True, width=80)
    console.print(block_table(monitor._watches, 1, 1, {}))
    assert len([line for line in console.export_text().splitlines() if "1.0e-01" in line]) == 4


class InTurns(TwoNetworks):
    """The first network's optimizer steps in even batches, the second's twice in odd ones."""

    def training_step(self, batch, batch_idx):
        for _ in range(1 + batch_idx % 2):
            network = (self.first, self.second)[batch_idx % 2]
            self.hift_step(network(torch.ones(2, 4)).square().mean(), optimizer=batch_idx % 2)


def test_of_several_optimizers_each_has_names_of_its_own_and_a_step_of_another_leaves_no_number(tmp_path):
    changes = ChangedParameters(tmp_path / "changed.json")
    monitor = fitted(HiFTStrategy(), steps=4, module=InTurns(), callbacks=[changes], **logging_to(tmp_path))
    names = [name for watch in monitor._watches for name in watch.names]
    assert names == ["first.0", "first.1", "second.0", "second.1"]
    steps, cycles = rows_of(tmp_path)
    assert [math.isnan(float(row["hift/grad_norm"])) for row in steps] == [False, True, False, True]
    assert [name for name in cycles[0] if name.startswith("hift_visits/")] == [
        "hift_visits/00_first.0", "hift_visits/00_second.0", "hift_visits/01_first.1", "hift_visits/01_second.1",
    ]  # fmt: skip
    assert [record.blocks for record in monitor._timeline.records] == [(1,), (), (0,), ()]
    assert not any(step["changed_outside_the_block"] for step in changes.steps)
    blocks = [step["block"] for step in changes.steps]
    assert blocks == ["first.1", "second.1, second.0", "first.0", "second.1, second.0"]


def test_a_search_for_the_rate_within_the_run_leaves_the_rest_watched(tmp_path):
    class Later(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    module = SmallTransformer()
    module.learning_rate = 0.01
    monitor = fitted(
        HiFTStrategy(), steps=LAYERS, module=module, max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path,
        callbacks=[Later(num_training_steps=3)], **logging_to(tmp_path),
    )  # fmt: skip
    steps, cycles = rows_of(tmp_path)
    assert len(steps) == 2 * LAYERS
    assert not any(math.isnan(float(row["hift/grad_norm"])) for row in steps)
    assert [float(row["hift_visits/00_embeddings"]) for row in cycles] == [1, 2]
    assert [record.gradient_norm.count for record in monitor._watches[0].records.values()] == [2] * LAYERS


RANKS = {
    "ddp": lambda: HiFTDDPStrategy(),
    "ddp, shared": lambda: HiFTDDPStrategy(shard_parked_state=True, update="streamed"),
    "ddp, fused": lambda: HiFTDDPStrategy(update="fused"),
    "fsdp2": lambda: HiFTFSDP2Strategy(),
}


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def measured_on_ranks(size, name):
    rank = torch.distributed.get_rank()
    own = slice(rank * size, (rank + 1) * size)
    batches = [(tokens[own], labels[own]) for tokens, labels in make_batches(STEPS)]
    monitor = HiFTMonitor(update_ratio_every=1)
    arguments = {"devices": 2, "callbacks": [monitor], "use_distributed_sampler": False}
    trainer(RANKS[name](), **arguments).fit(SmallTransformer(momentum), loader(batches))
    records = monitor._watches[0].records.values()
    return [(of(record.gradient_norm), of(record.update_ratio)) for record in records]


@pytest.mark.parametrize("name", RANKS)
def test_ranks_measure_what_one_device_does(name):
    alone = fitted(HiFTStrategy(), module=SmallTransformer(momentum))._watches[0].records.values()
    for measured in run(measured_on_ranks, 2, 2, name):
        for record, (norm, ratio) in zip(alone, measured, strict=True):
            expected = (0, None) if name == "ddp, fused" else pytest.approx(of(record.gradient_norm), rel=1e-4)
            assert norm == expected
            assert ratio == pytest.approx(of(record.update_ratio), rel=1e-4)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["net.body.embed", "net.body.layer.0", "head"], ["body.embed", "body.layer.0", "head"]),
        (["net.a.0 … net.a.1", "net.a.2"], ["a.0 … a.1", "a.2"]),
        (
            ["layers.0 … layers.1", "layers.2 … layers.3", "head"],
            ["layers.0 … layers.1", "layers.2 … layers.3", "head"],
        ),
        (["layer.0", "layer.1"], ["layer.0", "layer.1"]),
        (["a.0", "b.0"], ["a.0", "b.0"]),
        (["head"], ["head"]),
    ],
)
def test_names_leave_out_what_all_share(names, short):
    assert short_names(names) == short


def test_a_negative_number_of_cycles_is_refused():
    with pytest.raises(ConfigurationError, match="update_ratio_every=-1"):
        HiFTMonitor(update_ratio_every=-1)
