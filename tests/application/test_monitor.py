"""The numbers that the monitor counts and logs."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from hift_lightning import HiFTStrategy
from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.engine.measure import bytes_by_role

WIDTH, LAYERS = 8, 4
LAYER_BYTES = 4 * (WIDTH * WIDTH + WIDTH)
WEIGHT_BYTES = 4 * WIDTH * WIDTH
COUNTER_BYTES = 4  # of each Adam step counter


class Stack(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(64, WIDTH))  # type: ignore[arg-type]

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fitted(folder: Path, strategy: Any, **arguments: Any) -> tuple[HiFTMonitor, L.Trainer]:
    monitor = HiFTMonitor()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        callbacks=[monitor],
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(Stack())
    return monitor, trainer


def rows(folder: Path) -> list[dict[str, str]]:
    import csv

    with (folder / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["epoch"]]  # those of a cycle have none


def test_full_fine_tuning_holds_weights_gradients_and_two_moments_of_everything(tmp_path: Path) -> None:
    monitor, _ = fitted(tmp_path, "auto", max_steps=3)
    everything, counters = LAYERS * LAYER_BYTES, 2 * LAYERS * COUNTER_BYTES
    numbers = monitor.numbers
    assert numbers["memory/peak_weights_bytes"] == everything
    assert numbers["memory/peak_gradients_bytes"] == everything
    assert numbers["memory/peak_optimizer_state_bytes"] == 2 * everything + counters
    assert numbers["memory/peak_device_bytes"] == 4 * everything + counters
    assert numbers["memory/parked_bytes"] == 0
    assert numbers["time/step_ms_mean"] > 0
    assert not any(name.startswith("hift/") for name in [*numbers, *rows(tmp_path)[0]])


def test_under_hift_only_the_active_layer_has_gradients_and_moments_on_the_device(tmp_path: Path) -> None:
    monitor, _ = fitted(tmp_path, HiFTStrategy(), max_steps=2 * LAYERS + 1)
    everything, counters = LAYERS * LAYER_BYTES, 2 * COUNTER_BYTES
    numbers = monitor.numbers
    assert numbers["memory/peak_weights_bytes"] == everything
    assert numbers["memory/peak_gradients_bytes"] == LAYER_BYTES
    assert numbers["memory/peak_optimizer_state_bytes"] == 2 * LAYER_BYTES + counters
    assert numbers["memory/peak_device_bytes"] == everything + 3 * LAYER_BYTES + counters
    assert numbers["memory/parked_bytes"] == 2 * everything + LAYERS * counters
    assert numbers["hift/blocks"] == LAYERS
    assert numbers["hift/cycles"] == 2


def test_masters_and_state_that_is_updated_in_pieces_are_counted_too(tmp_path: Path) -> None:
    masters = HiFTStrategy(master_weights=True)
    numbers = fitted(tmp_path, masters, max_steps=2 * LAYERS, precision="bf16-true")[0].numbers
    weights, counters = LAYERS * LAYER_BYTES / 2, 2 * COUNTER_BYTES
    assert numbers["memory/peak_weights_bytes"] == weights
    assert numbers["memory/peak_optimizer_state_bytes"] == 3 * LAYER_BYTES + counters  # two moments and the master
    assert numbers["memory/peak_device_bytes"] == weights + 3.5 * LAYER_BYTES + counters
    assert numbers["memory/parked_bytes"] == 3 * LAYERS * LAYER_BYTES + LAYERS * counters


@pytest.mark.parametrize(("window", "held"), [("1MiB", 2 * WEIGHT_BYTES + COUNTER_BYTES), (64, 64)])
@pytest.mark.parametrize("update", ["streamed", "fused"])
def test_of_state_that_goes_through_a_window_so_much_counts(
    update: Any, window: Any, held: int, tmp_path: Path
) -> None:
    strategy = HiFTStrategy(update=update, window=window)
    numbers = fitted(tmp_path, strategy, max_steps=2 * LAYERS)[0].numbers
    assert numbers["memory/peak_optimizer_state_bytes"] == held
    gradients = LAYER_BYTES if update == "streamed" else 0
    assert numbers["memory/peak_device_bytes"] == LAYERS * LAYER_BYTES + gradients + held


def test_block_and_cycle_of_each_step_are_logged(tmp_path: Path) -> None:
    _, trainer = fitted(tmp_path, HiFTStrategy(order="bottom2up"), max_steps=LAYERS + 2)
    logged = rows(tmp_path)
    assert [float(row["hift/block"]) for row in logged] == [0, 1, 2, 3, 0, 1]
    assert [float(row["hift/cycle"]) for row in logged] == [0, 0, 0, 0, 1, 1]
    assert {float(row["hift/active_params"]) for row in logged} == {LAYER_BYTES / 4}
    parked = [float(row["hift/parked_bytes"]) for row in logged]
    assert parked[0] > 0
    assert parked == sorted(parked)
    assert float(logged[-1]["memory/peak_device_bytes"]) > 4 * LAYER_BYTES
    assert {"hift/block", "hift/cycle"} <= set(trainer.progress_bar_metrics)


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_the_time_of_paging_in_is_that_of_the_last_update(tmp_path: Path, update: Any) -> None:
    fitted(tmp_path, HiFTStrategy(update=update), max_steps=LAYERS)
    assert all(0 < float(row["hift/page_in_ms"]) < 1000 for row in rows(tmp_path))


def test_the_time_of_a_step_is_that_of_all_its_batches(tmp_path: Path) -> None:
    import time

    class Slow(Stack):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return super().training_step(batch, batch_idx)

    monitor = HiFTMonitor()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, accumulate_grad_batches=3, callbacks=[monitor], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Slow())
    assert 60 <= monitor.numbers["time/step_ms_mean"] < 600


def test_a_second_fit_counts_anew_and_leaves_no_hook(tmp_path: Path) -> None:
    monitor, trainer = fitted(tmp_path, "auto", max_steps=3)
    assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == 0
    trainer.fit_loop.epoch_loop.max_steps = 4
    before = trainer.global_step
    trainer.fit(Stack())
    assert monitor._steps == trainer.global_step - before


def test_the_hook_is_gone_after_an_exception(tmp_path: Path) -> None:
    class Broken(Stack):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("broken")

    trainer = L.Trainer(
        accelerator="cpu", callbacks=[HiFTMonitor()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Broken())
    assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == 0


def test_a_storage_counts_once_however_many_tensors_look_at_it() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    model.register_buffer("view", model[0].weight.detach()[:2])
    model[0].weight.grad = torch.ones(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    assert bytes_by_role(model, optimizer) == {"weights": 64, "gradients": 64, "optimizer_state": 64, "parked": 0}
    assert bytes_by_role(model, optimizer, lambda parameter: True) == {
        "weights": 64, "gradients": 64, "optimizer_state": 0, "parked": 64,
    }  # fmt: skip
