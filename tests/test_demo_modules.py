"""The modules that Lightning ships as demos train under ``"hift"`` as they are, from where Lightning keeps them."""

import lightning as L
import pytest
import torch
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel, RandomDataset
from lightning.pytorch.demos.lstm import LightningLSTM
from torch.utils.data import DataLoader

import hift_lightning  # noqa: F401  (registers "hift")


@pytest.fixture(autouse=True)
def text_where_the_demos_look_for_it(tmp_path, monkeypatch):
    """They download a text unless it lies in ``./data``."""
    (tmp_path / "data").mkdir()
    lines = "\n".join(f"the {i} th line of a text with {i * 7 % 13} and {i * 5 % 11} in it" for i in range(60))
    (tmp_path / "data" / "wikitext-2.txt").write_text(lines)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("make_module", "layers"),
    [
        (BoringModel, 1),
        (ManualOptimBoringModel, 1),
        (DemoModel, 1),
        (lambda: LightningTransformer(vocab_size=200), 6),
        (lambda: LightningLSTM(vocab_size=200), 3),
    ],
    ids=["BoringModel", "ManualOptimBoringModel", "DemoModel", "LightningTransformer", "LightningLSTM"],
)
def test_demo_module_trains_unmodified(make_module, layers):
    torch.manual_seed(0)
    module = make_module()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer = L.Trainer(strategy="hift", max_steps=layers, accelerator="cpu", logger=False, enable_checkpointing=False)
    loaders = {"train_dataloaders": DataLoader(RandomDataset(32, 64))} if isinstance(module, DemoModel) else {}
    trainer.fit(module, **loaders)
    assert len(trainer.strategy.hift.plan.layers) == layers
    assert trainer.strategy.hift.cycle == 1
    assert [name for name, p in module.named_parameters() if torch.equal(p, before[name])] == []
