"""`ChangedParameters`, and the preset that proves with it that a step changes its block and nothing else."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hift_lightning import HiFTStrategy
from hift_lightning.callbacks import ChangedParameters
from tests.application.running import run_application

LAYERS = {"layers.0": ["layers.0.weight", "layers.0.bias"], "layers.1": ["layers.1.weight", "layers.1.bias"]}


class TwoLayers(L.LightningModule):
    def __init__(self, disturb: Callable[["TwoLayers"], object] | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.disturb = disturb

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.layers(batch).square().mean()
        self.log("train/loss", loss)
        if self.disturb is not None:
            with torch.no_grad():
                self.disturb(self)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.0)


def changes(folder: Path, module: L.LightningModule, strategy: str | HiFTStrategy, accumulate: int = 1) -> list[dict]:
    path = folder / "changed.json"
    torch.manual_seed(0)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=accumulate,
        callbacks=[ChangedParameters(path)], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(16, 4), batch_size=4))
    return json.loads(path.read_text())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_changes_its_block_and_nothing_else(tmp_path: Path, accumulate: int) -> None:
    steps = changes(tmp_path, TwoLayers(), HiFTStrategy(order="top2down"), accumulate)
    assert [step["step"] for step in steps] == [1, 2]
    assert [step["changed"] for step in steps] == [LAYERS["layers.1"], LAYERS["layers.0"]]
    assert [step["block"] for step in steps] == ["layers.1", "layers.0"]
    for step in steps:
        assert step["changed_outside_the_block"] == step["unchanged_in_the_block"] == []
        assert step["loss"] > 0


class TwoOptimizers(TwoLayers):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor) -> None:
        for optimizer in self.optimizers():
            self.manual_backward(self.layers(batch).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.0) for layer in self.layers]


def test_the_blocks_of_several_optimizers_are_told_together(tmp_path: Path) -> None:
    first, *_ = changes(tmp_path, TwoOptimizers(), HiFTStrategy())
    assert first["block"] == "layers.0, layers.1"
    assert first["changed_outside_the_block"] == first["unchanged_in_the_block"] == []


def test_under_another_strategy_all_parameters_change_and_there_is_no_block(tmp_path: Path) -> None:
    for step in changes(tmp_path, TwoLayers(), "auto"):
        assert step["changed"] == LAYERS["layers.0"] + LAYERS["layers.1"]
        assert "block" not in step


def test_what_else_is_changed_and_what_is_not_is_told(tmp_path: Path) -> None:
    module = TwoLayers(lambda module: module.layers[0].bias.add_(1))
    module.layers[1].bias.register_hook(torch.zeros_like)
    first, _ = changes(tmp_path, module, HiFTStrategy(order="top2down"))
    assert first["changed_outside_the_block"] == ["layers.0.bias"]
    assert first["unchanged_in_the_block"] == ["layers.1.bias"]


def test_the_preset_of_llama_7b_steps_the_head_and_the_top_layer_and_tells_loss_changes_and_memory(
    tmp_path: Path,
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    small.update(num_attention_heads=4, num_key_value_heads=4)
    run = run_application(
        tmp_path, "experiment=llama7b_cpu", "hydra.run.dir=here", f"data.cache_dir={tmp_path}",
        *(f"model.network.config.{name}={number}" for name, number in small.items()),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    head, layer = json.loads((tmp_path / "here" / "changed_parameters.json").read_text())
    assert head["block"] == "head"
    assert layer["block"] == "network.model.layers.2"
    assert head["changed"] == ["network.lm_head.weight"]
    assert len(layer["changed"]) == 7
    for step, norms in ((head, 1), (layer, 2)):
        assert step["changed_outside_the_block"] == step["unchanged_in_the_block"] == []
        # scales of norms are 1, and an update of the size of the rate is below half a bf16 step there
        assert len(step["changed_in_its_master_only"]) == norms

    with (tmp_path / "here" / "log" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert losses == [head["loss"], layer["loss"]]
    metrics = json.loads((tmp_path / "here" / "metrics.json").read_text())
    assert metrics["train/loss"] == layer["loss"]
    assert metrics["steps"] == 2
    assert 0 < metrics["memory/peak_rss_anon_bytes"] < metrics["memory/peak_rss_bytes"]
    assert not list((tmp_path / "here").rglob("*.ckpt"))
    assert not list((tmp_path / "here").glob("hift-parked-*")), "the parked state is left"
