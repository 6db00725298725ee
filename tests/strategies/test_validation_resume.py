"""A run that is stopped in a validation or right after it does it once: not left out, and not again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from torch.utils.data import BatchSampler, RandomSampler

from hift_lightning.data.loading import TrainingLoader
from tests.comparing import assert_same
from tests.resuming import Case, Stop, StopsAt, raise_stop, samples
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer


class DrawsInValidation(SmallTransformer):
    """Trains and validates with random numbers, as a VAE or a diffusion model does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []
        self.validated_after: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, torch.rand(1).item()))
        return super().training_step(batch, batch_idx) * (1 + self.seen[-1][1])

    def on_validation_epoch_end(self) -> None:
        self.validated_after.append(self.trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + torch.rand(1))


def run(
    *callbacks: Callback, module: DrawsInValidation | None = None, ckpt_path: Any = None, **arguments: Any
) -> tuple[DrawsInValidation, Any]:
    module = DrawsInValidation() if module is None else module
    torch.manual_seed(11 if ckpt_path is None else 12)
    saves = any(isinstance(each, (ModelCheckpoint, OnExceptionCheckpoint)) for each in callbacks)
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": saves, **arguments}
    trainer_ = trainer(callbacks=list(callbacks), **settings)
    trainer_.fit(module, samples(Case(batches=8)), loader(make_batches(2, seed=5)), ckpt_path=ckpt_path)
    return module, trainer_


def never_better() -> EarlyStopping:
    return EarlyStopping("val_loss", patience=3, min_delta=1e9)


def after_validations(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, filename="{step}", save_on_train_epoch_end=False)


def test_saved_at_the_end_of_a_validation_it_goes_on_with_the_random_numbers_after_it(tmp_path: Path) -> None:
    whole, _ = run(after_validations(tmp_path), val_check_interval=4)
    resumed, _ = run(ckpt_path=tmp_path / "step=4.ckpt", val_check_interval=4)
    assert resumed.seen == whole.seen[4:]
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("stopper_first", [False, True])
@pytest.mark.parametrize("hook", ["on_validation_epoch_end", "on_validation_end"])
def test_a_validation_over_which_a_callback_fails_is_done_anew_and_counted_once(
    hook: str, stopper_first: bool, tmp_path: Path
) -> None:
    arguments = {"val_check_interval": 4, "max_epochs": 5}
    whole, whole_trainer = run(never_better(), **arguments)
    callbacks = [never_better(), StopsAt(hook, 2, raise_stop)]
    if not stopper_first:
        callbacks.reverse()
    with pytest.raises(Stop):
        run(*callbacks, OnExceptionCheckpoint(tmp_path, "stopped"), **arguments)
    resumed, resumed_trainer = run(never_better(), ckpt_path=tmp_path / "stopped.ckpt", **arguments)
    assert resumed_trainer.global_step == whole_trainer.global_step == 16
    assert resumed.validated_after == whole.validated_after[1:]
    assert resumed.seen == whole.seen[8:]
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("moment", [3, 4, 7])
def test_a_validation_within_an_accumulation_window_is_not_done_again_with_the_window(
    moment: int, tmp_path: Path
) -> None:
    arguments = {"accumulate_grad_batches": 4, "val_check_interval": 2, "max_epochs": 3}
    whole, _ = run(never_better(), **arguments)
    stopped = []
    for number, stop_at in enumerate((moment, 2)):  # the second time within the window that is done again
        path = tmp_path / f"{number - 1}.ckpt" if number else None
        module = DrawsInValidation()
        stop = StopsAt("on_train_batch_end", stop_at, raise_stop)
        with pytest.raises(Stop):
            run(
                never_better(),
                stop,
                OnExceptionCheckpoint(tmp_path, f"{number}"),
                module=module,
                ckpt_path=path,
                **arguments,
            )
        stopped += module.validated_after
    resumed, _ = run(never_better(), ckpt_path=tmp_path / "1.ckpt", **arguments)
    assert stopped + resumed.validated_after == whole.validated_after == [2, 4, 6, 8]
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert_same(resumed.state_dict(), whole.state_dict())


def test_saved_at_the_end_of_a_validation_within_a_window_it_is_not_done_again(tmp_path: Path) -> None:
    arguments = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    whole, _ = run(after_validations(tmp_path), **arguments)
    resumed, _ = run(ckpt_path=tmp_path / "step=1.ckpt", **arguments)
    assert whole.validated_after == [3, 6, 11, 14]
    assert resumed.validated_after == [6, 11, 14]
    assert resumed.seen == whole.seen[2:]
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_batch_end", "on_validation_end"])
def test_stopped_in_a_validation_of_averages_it_goes_on_with_the_weights(hook: str, tmp_path: Path) -> None:
    def averaging() -> Callback:
        return EMAWeightAveraging(decay=0.5)

    whole, _ = run(averaging())
    with pytest.raises(Stop):
        run(averaging(), StopsAt(hook, 1, raise_stop), OnExceptionCheckpoint(tmp_path, "stopped"))
    resumed, _ = run(averaging(), ckpt_path=tmp_path / "stopped.ckpt")
    assert resumed.losses == whole.losses[8:]
    assert_same(resumed.state_dict(), whole.state_dict())


class SaveAt(Callback):
    """Saves when so many batches of the run are done."""

    def __init__(self, folder: Path, *batches: int) -> None:
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if (done := trainer.fit_loop.epoch_loop.total_batch_idx + 1) in self.batches:
            trainer.save_checkpoint(self.folder / f"{done}.ckpt")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_a_validation_has_measured_is_known_at_the_end_of_the_epoch(accumulate: int, tmp_path: Path) -> None:
    def at_end_of_epoch() -> EarlyStopping:
        return EarlyStopping("val_loss", patience=5, check_on_train_epoch_end=True)

    arguments = {"accumulate_grad_batches": accumulate, "val_check_interval": 6}
    whole, _ = run(SaveAt(tmp_path, 7), at_end_of_epoch(), **arguments)
    resumed, _ = run(at_end_of_epoch(), ckpt_path=tmp_path / "7.ckpt", **arguments)
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("batches", [3, 4, 7])
def test_saved_before_the_first_batch_of_a_resumed_run_it_goes_on_as_from_the_first_checkpoint(
    batches: int, tmp_path: Path
) -> None:
    def save_again(trainer: Any) -> None:
        trainer.save_checkpoint(tmp_path / "again.ckpt")

    arguments = {"accumulate_grad_batches": 4, "val_check_interval": 2}
    whole, _ = run(SaveAt(tmp_path, batches), never_better(), **arguments)
    again = StopsAt("on_train_start", 1, save_again)
    run(never_better(), again, ckpt_path=tmp_path / f"{batches}.ckpt", **arguments)
    resumed, _ = run(never_better(), ckpt_path=tmp_path / "again.ckpt", **arguments)
    assert resumed.validated_after == [done for done in whole.validated_after if done >= batches]
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    assert_same(resumed.state_dict(), whole.state_dict())


def test_stopped_before_the_first_batch_of_a_window_done_again_its_validations_are_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unreadable(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise Stop

    readable = samples

    def unreadable(case: Case) -> TrainingLoader:
        whole = readable(case)
        generator = torch.Generator()
        batches = BatchSampler(RandomSampler(range(len(whole.dataset)), generator=generator), 4, drop_last=False)  # type: ignore[arg-type]
        return TrainingLoader(Unreadable(whole.dataset), batches, generator, 3)  # type: ignore[arg-type, call-overload]

    arguments = {"accumulate_grad_batches": 4, "val_check_interval": 2, "max_epochs": 1}
    whole, _ = run(SaveAt(tmp_path, 3), never_better(), **arguments)
    with monkeypatch.context() as broken:
        broken.setattr("tests.strategies.test_validation_resume.samples", unreadable)
        with pytest.raises(Stop):
            run(never_better(), OnExceptionCheckpoint(tmp_path, "again"), ckpt_path=tmp_path / "3.ckpt", **arguments)
    resumed, _ = run(never_better(), ckpt_path=tmp_path / "again.ckpt", **arguments)
    assert whole.validated_after == [2, 4, 6, 8]
    assert resumed.validated_after == [4, 6, 8]
    assert_same(resumed.state_dict(), whole.state_dict())


def test_a_validation_that_fails_before_it_begins_is_done_when_the_run_goes_on(tmp_path: Path) -> None:
    class Reloads(DrawsInValidation):
        fails_at = 0
        calls = 0

        def val_dataloader(self) -> Any:
            self.calls += 1
            if self.calls == self.fails_at:
                raise Stop
            return loader(make_batches(2, seed=5))

    def fit(fails_at: int, *callbacks: Callback, ckpt_path: Any = None) -> Reloads:
        module = Reloads()
        module.fails_at = fails_at
        torch.manual_seed(11 if ckpt_path is None else 12)
        settings = {"num_sanity_val_steps": 0, "reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}
        trainer_ = trainer(callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **settings)
        trainer_.fit(module, samples(Case(batches=8)), ckpt_path=ckpt_path)
        return module

    whole = fit(0)
    with pytest.raises(Stop):
        fit(2, OnExceptionCheckpoint(tmp_path, "stopped"))
    resumed = fit(0, ckpt_path=tmp_path / "stopped.ckpt")
    assert whole.validated_after == [8, 16, 24]
    assert resumed.validated_after == [16, 24]
    assert_same(resumed.state_dict(), whole.state_dict())
