"""``offload=<folder>`` under the Trainer: faults stop the run with a clear error, and nothing good is lost."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hift_lightning import HiFTStrategy
from hift_lightning.engine.tiers import Files
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

    assert_goes_on_from(checkpoint.best_model_path, HiFTStrategy(offload="cpu", update=update))


def assert_goes_on_from(path, strategy):
    """A run that resumes from the checkpoint ends as one that has never stopped."""
    batches = make_batches(2 * LAYERS)
    done = torch.load(path, weights_only=True)["global_step"]
    resumed, straight = SmallTransformer(), SmallTransformer()
    to_come = loader(
        batches[done:] + batches[:done]
    )  # Lightning takes the rest of an epoch from the loader's beginning
    trainer(strategy).fit(resumed, to_come, ckpt_path=path)
    trainer().fit(straight, loader(batches))
    for (name, p), q in zip(resumed.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.fixture
def file_size_limit():
    """A function that limits the size of files: beyond it the kernel refuses room, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if nbytes is None else nbytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_a_full_disk_stops_the_run_with_whole_weights_and_the_checkpoint_usable(update, file_size_limit, tmp_path):
    full_at = 2  # the turn of the lower layer, which has no file yet
    folder = tmp_path / "parked"
    folder.mkdir()

    class FillsDisk(SmallTransformer):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == full_at:
                file_size_limit(2500)  # bytes; the first moment of the first matrix has 3072
                self.weights = {name: p.detach().clone() for name, p in self.named_parameters()}

    module = FillsDisk()
    checkpoint = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1)
    trainer_ = trainer(HiFTStrategy(offload=folder, update=update), callbacks=[checkpoint], enable_checkpointing=True)
    with pytest.raises(OSError, match=r"no room for 3,072 bytes of parked state.*hift-parked-.*\.bin") as failure:
        trainer_.fit(module, loader(make_batches(2 * LAYERS)))
    file_size_limit(None)
    assert failure.value.errno == errno.EFBIG

    stepped = SmallTransformer()
    trainer(max_steps=full_at + 1, max_epochs=-1).fit(stepped, loader(make_batches(2 * LAYERS)))
    for (name, p), q in zip(module.named_parameters(), stepped.parameters(), strict=True):
        assert torch.equal(p, q) or torch.equal(p, module.weights[name]), name  # updated, or not yet
    assert_goes_on_from(checkpoint.best_model_path, HiFTStrategy(offload=folder, update=update))


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


def test_parked_files_are_for_their_owner_only(tmp_path):
    before = os.umask(0)
    try:
        trainer_ = trainer(HiFTStrategy(offload=tmp_path))
        trainer_.fit(SmallTransformer(), loader(make_batches(LAYERS)))
    finally:
        os.umask(before)
    (folder,) = tmp_path.iterdir()
    files = list(folder.iterdir())
    assert files
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    del trainer_


def test_state_that_was_loaded_into_files_stays_in_them_when_training_goes_on(tmp_path, monkeypatch):
    """A second copy would take the room of the whole state once more."""
    trainer_ = trainer(HiFTStrategy(offload=str(tmp_path)))
    trainer_.fit(SmallTransformer(), loader(make_batches(LAYERS)))
    trainer_.save_checkpoint(tmp_path / "stopped.ckpt")
    made = []

    def allocate(self, like, dtype, device):
        made.append(buffer := allocate_file(self, like, dtype, device))
        return buffer

    allocate_file = Files.allocate
    monkeypatch.setattr(Files, "allocate", allocate)
    module, resumed = SmallTransformer(), trainer(HiFTStrategy(offload=str(tmp_path)), max_epochs=2)
    resumed.fit(module, loader(make_batches(LAYERS)), ckpt_path=tmp_path / "stopped.ckpt")
    moments = 2 * len(list(module.parameters()))
    assert len(made) == moments
