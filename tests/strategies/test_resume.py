"""A run that is stopped, in any way and at any moment, and resumed equals one that never stopped, difference 0.0."""

import itertools
import os
import random
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import DataLoader

from hift_lightning.strategies.interrupts import PatientInterrupt
from tests.resuming import (
    SCHEDULERS,
    Case,
    Stop,
    StopsAt,
    Traced,
    assert_goes_on,
    newest,
    raise_stop,
    run,
    samples,
)
from tests.small_transformer import LAYERS, SmallTransformer, loader, make_batches, trainer
from tests.strategies.test_optimizers import OPTIMIZERS

_straight: dict[str, tuple[Traced, Any]] = {}


def straight_run(case: Case, folder: Path) -> tuple[Traced, Any]:
    """The run that never stops; made once a case."""
    if (key := repr(case)) not in _straight:
        _straight[key] = run(case, folder)
    return _straight[key]


def assert_exact(case: Case, folder: Path, *stops: Callback) -> None:
    """Stopped by each of these in turn and resumed each time, the last run ends as the straight one."""
    ckpt_path = None
    stopped = []
    for number, stop in enumerate(stops):
        saved = folder / f"saved{number}"
        stopped.append(run(case, folder, ckpt_path=ckpt_path, callbacks=[stop, saving(saved)])[0])
        ckpt_path = newest(saved)
    assert_goes_on(straight_run(case, folder), run(case, folder, ckpt_path=ckpt_path), *stopped)


def saving(folder: Path, **arguments: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_on_exception=True, save_top_k=-1 if arguments else 1, **arguments)


def kill(number: int) -> Any:
    return lambda trainer: os.kill(os.getpid(), number)


WAYS = {"exception": raise_stop, "SIGINT": kill(signal.SIGINT), "SIGTERM": kill(signal.SIGTERM)}
# hook, and how often it has been called before the run stops there
MOMENTS = {
    "on_after_batch_transfer": 9,
    "on_train_batch_start": 9,
    "on_before_zero_grad": 4,
    "on_before_backward": 11,
    "on_after_backward": 12,
    "on_before_optimizer_step": 5,
    "on_train_batch_end": 10,
    "on_validation_start": 2,
    "on_validation_batch_end": 3,
    "on_validation_end": 2,
    "on_train_epoch_end": 2,
    "on_train_epoch_start": 2,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hook", MOMENTS)
def test_stopped_in_any_hook_it_goes_on_exactly(hook: str, way: str, tmp_path: Path) -> None:
    case = Case(scheduler="plateau", accumulate=3, val_check_interval=2)
    assert_exact(case, tmp_path, StopsAt(hook, MOMENTS[hook], WAYS[way]))


@pytest.mark.parametrize("moment", range(4, 7))
@pytest.mark.parametrize("way", WAYS)
def test_stopped_within_an_accumulation_window_it_does_the_whole_window_again(
    moment: int, way: str, tmp_path: Path
) -> None:
    case = Case(accumulate=3)
    assert_exact(case, tmp_path, StopsAt("on_train_batch_end", moment, WAYS[way]))
    done = torch.load(newest(tmp_path / "saved0"), weights_only=True)
    assert done["global_step"] == moment // 3
    assert done["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == moment // 3 * 3


@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_checkpoint_of_a_run_goes_on_exactly(
    scheduler: str, accumulate: int, by_steps: bool, tmp_path: Path
) -> None:
    # as after SIGKILL: the run has not been told that it would end
    case = Case(
        scheduler=scheduler, accumulate=accumulate, by_steps=by_steps, val_check_interval=2, epochs=2, batches=4
    )
    straight = straight_run(case, tmp_path)
    at_steps = saving(tmp_path / "steps", every_n_train_steps=1)
    at_epochs = saving(tmp_path / "epochs", every_n_epochs=1, save_on_train_epoch_end=True)
    stopped, _ = run(case, tmp_path, callbacks=[at_steps, at_epochs])
    paths = [*(tmp_path / "steps").glob("*.ckpt"), *(tmp_path / "epochs").glob("*.ckpt")]
    assert len(paths) == case.steps + case.epochs
    for path in paths:
        if torch.load(path, weights_only=True)["global_step"] == case.steps and (
            by_steps or path.parent.name == "epochs"
        ):
            continue  # there is nothing left to do
        assert_goes_on(straight, run(case, tmp_path, ckpt_path=path), stopped)


@pytest.mark.parametrize("then_by_steps", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_stopped_by_max_steps_it_goes_on_within_the_epoch(accumulate: int, then_by_steps: bool, tmp_path: Path) -> None:
    case = Case(scheduler="plateau", accumulate=accumulate, by_steps=then_by_steps, epochs=2, batches=4)
    straight = straight_run(case, tmp_path)
    for steps in range(1, case.steps):
        stopped, stopped_trainer = run(case, tmp_path, max_steps=steps, callbacks=[saving(tmp_path / f"{steps}")])
        assert stopped_trainer.global_step == steps
        stopped_trainer.save_checkpoint(tmp_path / "after.ckpt")
        for path in (tmp_path / "after.ckpt", newest(tmp_path / f"{steps}")):
            assert_goes_on(straight, run(case, tmp_path, ckpt_path=path), stopped)


def test_after_several_resumes_it_is_still_exact(tmp_path: Path) -> None:
    case = Case(scheduler="plateau", accumulate=2, strategy={"steps_per_block": 2})
    assert_exact(
        case,
        tmp_path,
        StopsAt("on_after_backward", 4, raise_stop),
        StopsAt("on_train_batch_end", 4, WAYS["SIGINT"]),  # the last batch of an epoch
        StopsAt("on_train_batch_end", 2, WAYS["SIGTERM"]),
        StopsAt("on_before_optimizer_step", 1, raise_stop),
        StopsAt("on_train_epoch_end", 1, raise_stop),
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_every_optimizer(optimizer: str, tmp_path: Path) -> None:
    assert_exact(Case(optimizer, epochs=2), tmp_path, StopsAt("on_before_optimizer_step", 6, raise_stop))


@pytest.mark.parametrize(
    "strategy",
    [
        {"order": "bottom2up"},
        {"order": "random", "seed": 3},
        {"group_size": 2},
        {"group_size": 3, "steps_per_block": 2},
        {"steps_per_block": 3},
        {"steps_per_block": "once", "lr_update": "step"},
        {"lr_update": "cycle_once"},
        {"lr_update": "step"},
        {"offload": "none"},
        {"offload": "folder"},
        {"update": "streamed", "window": "8KiB", "offload": "folder"},
        {"update": "streamed"},
        {"update": "fused"},
        {"update": "fused", "offload": "folder"},
        {"parked_dtype": "bfloat16"},
        {"parked_dtype": "bfloat16", "offload": "folder", "update": "streamed"},
        {"activation_checkpointing": True},
        {"frozen": ["embedding*"]},
    ],
    ids=str,
)
def test_with_every_setting(strategy: dict[str, Any], tmp_path: Path) -> None:
    case = Case(strategy=in_folder(strategy, tmp_path), epochs=2)
    assert_exact(case, tmp_path, StopsAt("on_train_batch_start", 6, raise_stop))


def in_folder(strategy: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {**strategy, "offload": str(folder)} if strategy.get("offload") == "folder" else strategy


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("masters", [False, True])
def test_in_every_precision(precision: str, masters: bool, tmp_path: Path) -> None:
    if masters and precision not in ("bf16-true", "16-true"):
        pytest.skip("masters are of 16-bit weights")
    # fp16 has no room for AdamW's eps
    optimizer = "SGD with momentum" if precision == "16-true" and not masters else "AdamW"
    case = Case(optimizer, precision=precision, strategy={"master_weights": masters}, epochs=2)
    assert_exact(case, tmp_path, StopsAt("on_train_batch_end", 6, raise_stop))


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"update": "streamed", "window": "8KiB"},
        {"update": "fused", "parked_dtype": "bfloat16"},
        {"offload": "none"},
        {"offload": "folder", "update": "streamed", "master_weights": True},
    ],
    ids=str,
)
def test_on_an_accelerator(strategy: dict[str, Any], any_device: Any, tmp_path: Path) -> None:
    precision = "bf16-true" if strategy.get("master_weights") else "32-true"
    case = Case(
        strategy=in_folder(strategy, tmp_path), precision=precision, accelerator=any_device.type, accumulate=1, epochs=2
    )
    assert_exact(case, tmp_path, StopsAt("on_before_backward", 6, raise_stop))


@pytest.mark.parametrize("optimizer", ["Adafactor", "Adagrad", "Muon-like", "AdamW amsgrad", "AdamW fused"])
def test_streamed_with_state_of_any_shape(optimizer: str, tmp_path: Path) -> None:
    # how an optimizer may be cut is tried at the first update, when the resumed run has state and the other one none
    strategy = {"update": "streamed", "offload": str(tmp_path), "parked_dtype": "bfloat16"}
    case = Case(optimizer, epochs=2, strategy=strategy)
    assert_exact(case, tmp_path, StopsAt("on_before_backward", 5, raise_stop))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_moments_parked_in_bf16_come_back_in_the_dtype_of_16_bit_weights(precision: str, tmp_path: Path) -> None:
    case = Case("SGD with momentum", precision=precision, epochs=2, strategy={"parked_dtype": "bfloat16"})
    assert_exact(case, tmp_path, StopsAt("on_before_backward", 6, raise_stop))


def test_with_gradient_clipping_and_workers(tmp_path: Path) -> None:
    case = Case(clip=0.5, workers=2, epochs=2, accumulate=2)
    assert_exact(case, tmp_path, StopsAt("on_train_batch_start", 6, raise_stop))


def broken(case: Case, batch: int) -> Any:
    """Samples of which one batch cannot be made."""
    data = samples(case)
    collate, numbers = data._loader.collate_fn, itertools.count()

    def collate_others(rows: Any) -> Any:
        if next(numbers) == batch:
            raise Stop
        return collate(rows)

    data._loader.collate_fn = collate_others
    return data


@pytest.mark.parametrize("stop", [3, Case.batches, Case.batches + 1])
@pytest.mark.parametrize("batch", [0, 2, Case.batches])
def test_a_batch_that_cannot_be_made(batch: int, stop: int, tmp_path: Path) -> None:
    """In a run, at the beginning of an epoch, and where a run goes on: `stop` is the batch before which it stopped."""
    case = Case(epochs=3)
    first, second = tmp_path / "first", tmp_path / "second"
    stopped, _ = run(case, tmp_path, callbacks=[StopsAt("on_train_batch_start", stop + 1, raise_stop), saving(first)])
    again, _ = run(case, tmp_path, ckpt_path=newest(first), data=broken(case, batch), callbacks=[saving(second)])
    resumed = run(case, tmp_path, ckpt_path=newest(second))
    assert_goes_on(straight_run(case, tmp_path), resumed, stopped, again)


@pytest.mark.parametrize("batches", [6, 9, 16])
def test_windows_that_a_callback_changes_from_epoch_to_epoch(batches: int, tmp_path: Path) -> None:
    def windows() -> Callback:
        return GradientAccumulationScheduler({0: 3, 1: 2, 2: 4})

    stop = StopsAt("on_train_batch_start", batches, raise_stop)
    stopped, _ = run(Case(), tmp_path, callbacks=[windows(), stop, saving(tmp_path / "saved")])
    resumed = run(Case(), tmp_path, callbacks=[windows()], ckpt_path=newest(tmp_path / "saved"))
    assert_goes_on(run(Case(), tmp_path, callbacks=[windows()]), resumed, stopped)


@pytest.mark.parametrize("batches", [10, 18])
def test_within_an_epoch_it_goes_on_at_the_rate_of_weight_averaging(batches: int, tmp_path: Path) -> None:
    def averaging() -> Callback:
        return StochasticWeightAveraging(1e-3, swa_epoch_start=2, annealing_epochs=2)

    case = Case(scheduler="none")
    stop = StopsAt("on_train_batch_start", batches, raise_stop)
    stopped, _ = run(case, tmp_path, callbacks=[averaging(), stop, saving(tmp_path / "saved")])
    resumed = run(case, tmp_path, callbacks=[averaging()], ckpt_path=newest(tmp_path / "saved"))
    assert_goes_on(run(case, tmp_path, callbacks=[averaging()]), resumed, stopped)


def test_the_random_numbers_are_restored_and_read_with_weights_only(tmp_path: Path) -> None:
    _, stopped = run(Case(), tmp_path, max_steps=4)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    stopped.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["hift"]["resume"]["random_state"]
    assert torch.equal(saved["torch"], states[0])
    assert saved["python"] == states[1]
    assert saved["numpy"][1] == states[2][1].tolist()


# --- steps that cannot be gone on from --------------------------------------------------------------------------------


class Breaks(torch.optim.AdamW):
    """Fails once when some of the block's weights have been changed."""

    next_time = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if Breaks.next_time:
            Breaks.next_time = False
            raise Stop
        return loss


@pytest.mark.parametrize("update", ["block", "streamed", "fused"])
def test_no_checkpoint_is_written_when_weights_and_state_do_not_belong_together(
    update: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "breaks", lambda parameters: Breaks(parameters, lr=1e-2))
    case = Case("breaks", strategy={"update": update, "offload": str(tmp_path)})
    breaks = StopsAt("on_before_backward", 6, lambda trainer: setattr(Breaks, "next_time", True))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        callbacks = [breaks, saving(tmp_path / "saved", every_n_train_steps=2)]
        stopped, _ = run(case, tmp_path, callbacks=callbacks)
    assert len(stopped.trace) == 6
    assert ["No checkpoint is saved" in str(one.message) for one in told].count(True) == 1
    resumed = run(case, tmp_path, ckpt_path=newest(tmp_path / "saved"))
    assert_goes_on(run(case, tmp_path), resumed, stopped)


def test_a_step_that_the_trainer_did_not_count_is_not_saved(tmp_path: Path) -> None:
    class FailsAfterStep(SmallTransformer):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.trainer.global_step == 5:
                raise Stop

    callback = saving(tmp_path / "saved", every_n_train_steps=2)
    with pytest.warns(UserWarning, match="No checkpoint is saved"), pytest.raises(Stop):
        trainer(callbacks=[callback], enable_checkpointing=True).fit(FailsAfterStep(), loader(make_batches(9)))
    assert torch.load(newest(tmp_path / "saved"), weights_only=True)["hift"]["engines"][0]["updates"] == 4


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_a_first_ctrl_c_waits_for_the_release_and_a_second_does_not() -> None:
    interrupt = PatientInterrupt()
    interrupt.start()
    try:
        interrupt.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.release()
        interrupt.release()
        interrupt.hold()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        interrupt.stop()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_stays() -> None:
    def mine(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGINT, mine)
    try:
        trainer(max_steps=1, max_epochs=-1).fit(SmallTransformer(), loader(make_batches(2)))
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handler_is_pythons_again_after_fit_and_after_an_exception() -> None:
    trainer(max_steps=1, max_epochs=-1).fit(SmallTransformer(), loader(make_batches(2)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(Stop):
        trainer(callbacks=[StopsAt("on_train_batch_end", 1, raise_stop)]).fit(
            SmallTransformer(), loader(make_batches(2))
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- data loaders -----------------------------------------------------------------------------------------------------


class Sees(SmallTransformer):
    """Notes the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch[0].flatten().tolist())
        return super().training_step(batch, batch_idx)


def plain_loader(shuffle: bool) -> DataLoader[Any]:
    return DataLoader(make_batches(7), batch_size=None if not shuffle else 1, shuffle=shuffle, collate_fn=first)


def first(rows: Any) -> Any:
    return rows[0] if isinstance(rows, list) else rows


@pytest.mark.parametrize("shuffle", [False, True])
def test_with_a_plain_loader_it_sees_the_data_that_a_plain_trainer_sees_and_one_warning_says_so(
    shuffle: bool, tmp_path: Path
) -> None:
    seen, told = {}, {}
    for strategy in ("hift", "auto"):
        stopped = trainer(strategy, max_epochs=3, callbacks=[StopsAt("on_train_batch_end", 11, raise_stop)])
        with pytest.raises(Stop):
            stopped.fit(Sees(), plain_loader(shuffle))
        stopped.save_checkpoint(tmp_path / "mid.ckpt")
        torch.manual_seed(1)
        module = Sees()
        with warnings.catch_warnings(record=True) as told[strategy]:
            warnings.simplefilter("always")
            trainer(strategy, max_epochs=3).fit(module, plain_loader(shuffle), ckpt_path=tmp_path / "mid.ckpt")
        seen[strategy] = module.seen
    assert len(seen["hift"]) == 3 + 7
    assert seen["hift"][:3] == seen["auto"][:3]
    if not shuffle:  # later epochs are shuffled with the restored random numbers
        assert seen["hift"] == seen["auto"]
    (message,) = [text for one in told["hift"] if "epoch" in (text := str(one.message)) and "resum" in text]
    assert "after 4 batches of epoch 1" in message
    assert "`DataLoader` has no `state_dict` and `load_state_dict`, so it begins the epoch's data anew" in message
    assert "resume from the end of an epoch, or use a loader that has both" in message


@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_with_a_plain_loader_it_goes_on_exactly_from_the_end_of_an_epoch_without_a_warning(
    shuffle: bool, by_steps: bool, tmp_path: Path
) -> None:
    case = Case(by_steps=by_steps)
    stopped, stopped_trainer = run(case, tmp_path, max_steps=7, data=plain_loader(shuffle))
    stopped_trainer.save_checkpoint(tmp_path / "end.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resum")
        resumed = run(case, tmp_path, ckpt_path=tmp_path / "end.ckpt", data=plain_loader(shuffle))
    assert_goes_on(run(case, tmp_path, data=plain_loader(shuffle)), resumed, stopped)


def test_a_loader_with_a_state_gives_no_warning(tmp_path: Path) -> None:
    _, stopped = run(Case(), tmp_path, max_steps=4)
    stopped.save_checkpoint(tmp_path / "mid.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resum")
        run(Case(), tmp_path, ckpt_path=tmp_path / "mid.ckpt")


class Shuffled:
    """A loader as users write them: its state is that of its generator at the beginning of a pass, and a position."""

    def __init__(self) -> None:
        self.batches = make_batches(7)
        self.generator = torch.Generator().manual_seed(0)
        self.began, self.given, self.first = self.generator.get_state(), 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        self.began = self.generator.get_state()
        order = torch.randperm(len(self.batches), generator=self.generator).tolist()
        self.given, self.first = self.first, 0
        for index in order[self.given :]:
            self.given += 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, Any]:
        return {"began": self.began, "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["began"])
        self.first = self.given = state["given"]


@pytest.mark.parametrize("moment", [3, 9, 12])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_train_batch_end"])
def test_a_users_loader_with_a_state_of_its_own_goes_on_exactly_within_an_epoch(
    hook: str, moment: int, tmp_path: Path
) -> None:
    case = Case(accumulate=2)
    stop = StopsAt(hook, moment, raise_stop)
    stopped, _ = run(case, tmp_path, data=Shuffled(), callbacks=[stop, saving(tmp_path / "saved")])
    resumed = run(case, tmp_path, data=Shuffled(), ckpt_path=newest(tmp_path / "saved"))
    assert_goes_on(run(case, tmp_path, data=Shuffled()), resumed, stopped)


def test_the_samples_are_stateful() -> None:
    assert LAYERS == 4
    assert samples(Case()).state_dict() == {"epoch": 0, "batches": 0, "of": 7, "seed": 3}


def test_other_values_of_the_optimizer_than_the_checkpoints_are_told(tmp_path: Path) -> None:
    def run(told: bool, scheduled: bool, path: Path | None = None, **values: Any) -> None:
        module = SmallTransformer(
            lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-2, **values}),
            (lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=30)) if scheduled else None,
        )
        trainer_ = trainer(max_epochs=1 if path is None else 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_.fit(module, loader(make_batches(6)), ckpt_path=path)
        said = [str(each.message) for each in caught if "the run goes on with" in str(each.message)]
        assert [all(key in each for key in values) for each in said] == [True] * told
        trainer_.save_checkpoint(tmp_path / "last.ckpt")

    for scheduled in (False, True):
        run(False, scheduled)
        (tmp_path / "last.ckpt").rename(tmp_path / "first.ckpt")
        run(False, scheduled, tmp_path / "first.ckpt")
        run(scheduled, scheduled, tmp_path / "first.ckpt", lr=2e-2)  # otherwise it may have been set by hand
        run(True, scheduled, tmp_path / "first.ckpt", weight_decay=0.5)
        run(True, scheduled, tmp_path / "first.ckpt", betas=(0.0, 0.9))
        run(True, scheduled, tmp_path / "first.ckpt", betas=(0.0, 0.9), weight_decay=0.5)
