"""Lightning's callbacks under HiFT, unchanged."""

import re
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as C
from lightning.pytorch.loggers import CSVLogger

from hift_lightning import HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from tests.blocks_seen import TOP_DOWN, BlocksSeen
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


def fit(callbacks, batches=2 * LAYERS, module=None, strategy="hift", **arguments):
    seen = BlocksSeen()
    module = module or SmallTransformer()
    trainer_ = trainer(strategy, callbacks=[seen, *callbacks], **arguments)
    data = make_batches(batches)
    trainer_.fit(module, loader(data), loader(data[:2]))
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    return module, trainer_, seen.steps


def test_early_stopping_stops():
    stopper = C.EarlyStopping("val_loss", patience=1, min_delta=1e9)
    _, trainer_, steps = fit([stopper], max_epochs=9)
    assert trainer_.current_epoch == 2
    assert steps == TOP_DOWN * 4


def test_learning_rate_monitor_logs_the_rate_used(tmp_path):
    def make_scheduler(optimizer):
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2 * LAYERS)

    logger = CSVLogger(tmp_path)
    module = SmallTransformer(make_scheduler=make_scheduler)
    monitor = C.LearningRateMonitor("step")
    module, trainer_, _ = fit([monitor], module=module, logger=logger, log_every_n_steps=1)
    rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("lr-AdamW")
    logged = [float(value) for row in rows[1:] if (value := row.split(",")[column])]
    assert logged == pytest.approx(module.rates)
    assert logged == pytest.approx([1e-2] * LAYERS + [0.5e-2] * LAYERS)


def test_model_checkpoint_keeps_the_best_and_a_plain_module_loads_it(tmp_path):
    checkpoint = C.ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    module, _, _ = fit([checkpoint], enable_checkpointing=True)
    again = SmallTransformer()
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    for left, right in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)


def test_gradient_accumulation_scheduler_changes_the_window():
    scheduler = C.GradientAccumulationScheduler({0: 1, 1: 4})
    _, trainer_, steps = fit([scheduler], max_epochs=2)
    assert trainer_.strategy.hift.updates == len(steps) == 2 * LAYERS + 2
    assert steps == (TOP_DOWN * 3)[: 2 * LAYERS + 2]


def test_stochastic_weight_averaging_averages_every_layer():
    averaging = C.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1)
    module, _, steps = fit([averaging], max_epochs=4)
    before = SmallTransformer()
    assert [step for step in steps if step] == TOP_DOWN * 8
    for left, right in zip(module.parameters(), before.parameters(), strict=True):
        assert not torch.equal(left, right)


def test_a_schedule_that_stochastic_weight_averaging_replaces_within_a_cycle_ends():
    def make_scheduler(optimizer):
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8 * LAYERS)

    averaging = C.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
    module = SmallTransformer(make_scheduler=make_scheduler)
    fit([averaging], module=module, strategy=HiFTStrategy(steps_per_block=5), max_epochs=4)  # a cycle is 20 steps
    averaged = module.rates[4 * LAYERS :]
    assert averaged == pytest.approx([1e-3] * len(averaged))
    assert averaged


def test_ema_weight_averaging_equals_an_average_kept_by_hand():
    class Trail(C.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    trail = Trail()
    module, _, steps = fit([trail, C.EMAWeightAveraging(decay=0.5)])
    assert steps == TOP_DOWN * 2
    average = [p.clone() for p in trail.weights[0]]
    for weights in trail.weights[1:]:
        average = [a.lerp(w, 0.5) for a, w in zip(average, weights, strict=True)]
    for left, right in zip(module.parameters(), average, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("bar", [C.TQDMProgressBar, C.RichProgressBar])
def test_progress_bars_run(bar, capsys):
    _, _, steps = fit([bar()], enable_progress_bar=True)
    assert steps == TOP_DOWN * 2


class RichBarThatDrawsEachStep(C.RichProgressBar):
    """Rich draws from a thread, so many times a second, which on a busy machine is not in every step."""

    def refresh(self, hard: bool = False) -> None:
        super().refresh(hard=True)


@pytest.mark.parametrize("bar", [C.TQDMProgressBar, RichBarThatDrawsEachStep])
def test_progress_bars_show_block_and_cycle(bar, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    fit([bar(), HiFTMonitor()], enable_progress_bar=True)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", "".join(capsys.readouterr()))
    for block in range(LAYERS):
        assert re.search(rf"hift/block[=:] ?{block}\.0.*hift/cycle[=:] ?[01]\.0", shown)


def test_the_model_summary_shows_every_parameter_trainable():
    class Summary(C.ModelSummary):
        @staticmethod
        def summarize(summary_data, total_parameters, trainable_parameters, *args, **kwargs):
            Summary.seen = (total_parameters, trainable_parameters)

    module, _, _ = fit([Summary()], enable_model_summary=True)
    total = sum(p.numel() for p in module.parameters())
    assert Summary.seen == (total, total)


def test_the_learning_rate_finder_gives_the_run_back_as_it_was(tmp_path):
    class WithRate(SmallTransformer):
        def __init__(self):
            super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr=self.lr))
            self.lr = 1e-3

    finder = C.LearningRateFinder(num_training_steps=25, max_lr=0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        module, trainer_, steps = fit([finder], batches=7 * LAYERS, module=WithRate(), default_root_dir=tmp_path)
    assert not any("the run goes on with" in str(each.message) for each in told)
    assert len(finder.optimal_lr.results["lr"]) >= 20
    assert trainer_.strategy.hift.updates == 7 * LAYERS
    assert steps == TOP_DOWN * 7  # the finder's own steps ran without the recorder, and were taken back
    assert {int(s["step"]) for s in trainer_.optimizers[0].state.values()} == {7}


def test_callbacks_that_freeze_layers_are_refused_with_the_reason():
    class Finetuning(C.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.embedding)

        def finetune_function(self, pl_module, epoch, optimizer):
            pass

    with pytest.raises(MisconfigurationException, match="`Finetuning` freezes and unfreezes layers"):
        fit([Finetuning()])


def test_an_on_exception_checkpoint_is_complete(tmp_path):
    class Stops(SmallTransformer):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.global_step == LAYERS + 1:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit([C.OnExceptionCheckpoint(tmp_path)], module=Stops(), enable_checkpointing=True)
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["hift"]["engines"][0]["updates"] == LAYERS + 1
    assert len(saved["optimizer_states"][0]["state"]) == len(list(SmallTransformer().parameters()))
