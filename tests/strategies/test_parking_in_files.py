"""``offload=<folder>`` under the Trainer: faults stop the run with a clear error, and nothing good is lost."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hift_lightning import HiFTStrategy
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer


class BreaksFiles(SmallTransformer):
    """Does something to the parked files after the first cycle."""

    def __init__(self, folder, break_file):
        super().__init__()
        self.folder, self.break_file = folder, break_file

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == LAYERS:
            for path in Path(self.folder).rglob("*.bin"):
                self.break_file(path)
            self.weights = {name: p.detach().clone() for name, p in self.named_parameters()}


@pytest.mark.parametrize("update", ["block", "streamed"])
@pytest.mark.parametrize(
    ("break_file", "message"),
    [(os.unlink, "a file of parked state is gone"), (lambda path: os.truncate(path, 4), "is too short")],
    ids=["deleted", "shortened"],
)
def test_a_lost_file_stops_the_run_with_the_weights_intact_and_the_checkpoint_usable(
    update, break_file, message, tmp_path
):
    folder = tmp_path / "parked"
    folder.mkdir()
    module = BreaksFiles(folder, break_file)
    checkpoint = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=LAYERS)
    trainer_ = trainer(HiFTStrategy(offload=folder, update=update), callbacks=[checkpoint], enable_checkpointing=True)
    with pytest.raises(OSError, match=message):
        trainer_.fit(module, loader(make_batches(2 * LAYERS)))
    for name, p in module.named_parameters():
        assert torch.equal(p, module.weights[name]), name

    resumed = trainer(HiFTStrategy(offload="cpu"), max_steps=2 * LAYERS, max_epochs=-1)
    resumed.fit(SmallTransformer(), loader(make_batches(2 * LAYERS)), ckpt_path=checkpoint.best_model_path)
    assert resumed.strategy.hift.updates == 2 * LAYERS


def test_files_are_gone_after_the_run(tmp_path):
    import gc

    trainer_ = trainer(HiFTStrategy(offload=tmp_path))
    trainer_.fit(SmallTransformer(), loader(make_batches(LAYERS)))
    assert list(tmp_path.rglob("*.bin"))
    del trainer_
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("update", ["block", "streamed"])
def test_moments_parked_in_bf16_take_half_the_bytes_and_are_computed_on_in_fp32(update):
    module = SmallTransformer()
    trainer_ = trainer(HiFTStrategy(parked_dtype="bfloat16", update=update))
    trainer_.fit(module, loader(make_batches(3 * LAYERS)))
    expected = SmallTransformer()
    exact = trainer()
    exact.fit(expected, loader(make_batches(3 * LAYERS)))
    weights = sum(p.nbytes for p in module.parameters())
    steps = 4 * len(list(module.parameters()))
    assert trainer_.strategy.hift.residency.parked_bytes == weights + steps
    assert exact.strategy.hift.residency.parked_bytes == 2 * weights + steps
    assert module.losses != expected.losses
    assert module.losses == pytest.approx(expected.losses, rel=0.05)
