"""A run that is stopped in a validation or right after it does it once: not left out, and not again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint

from tests.comparing import assert_same
from tests.resuming import Case, Stop, StopsAt, raise_stop, samples
from tests.small_transformer import SmallTransformer, loader, make_batches, trainer


class DrawsInValidation(SmallTransformer):
    """Trains and validates with random numbers, as a VAE or a diffusion model does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch_idx, torch.rand(1).item()))
        return super().training_step(batch, batch_idx) * (1 + self.seen[-1][1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch) + torch.rand(1))


def run(*callbacks: Callback, ckpt_path: Any = None, **arguments: Any) -> tuple[DrawsInValidation, Any]:
    torch.manual_seed(11 if ckpt_path is None else 12)
    module = DrawsInValidation()
    saves = any(isinstance(each, (ModelCheckpoint, OnExceptionCheckpoint)) for each in callbacks)
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "enable_checkpointing": saves, **arguments}
    trainer_ = trainer(callbacks=list(callbacks), **settings)
    trainer_.fit(module, samples(Case(batches=8)), loader(make_batches(2, seed=5)), ckpt_path=ckpt_path)
    return module, trainer_


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
    def never_better() -> EarlyStopping:
        return EarlyStopping("val_loss", patience=3, min_delta=1e9)

    arguments = {"val_check_interval": 4, "max_epochs": 5}
    whole, whole_trainer = run(never_better(), **arguments)
    callbacks = [never_better(), StopsAt(hook, 2, raise_stop)]
    with pytest.raises(Stop):
        run(
            *(callbacks if stopper_first else reversed(callbacks)),
            OnExceptionCheckpoint(tmp_path, "stopped"),
            **arguments,
        )
    resumed, resumed_trainer = run(never_better(), ckpt_path=tmp_path / "stopped.ckpt", **arguments)
    assert resumed_trainer.global_step == whole_trainer.global_step == 16
    assert resumed.seen == whole.seen[8:]
    assert_same(resumed.state_dict(), whole.state_dict())
