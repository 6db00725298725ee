"""Where a run stopped, written down so that it goes on as if it never had.

Lightning restores weights, optimizers, schedulers and its counters. It leaves out, or does otherwise than a run that
goes straight on (2.6):

- the states of the random number generators are not saved;
- a checkpoint from the middle of a batch or of an accumulation window has the data loader too far ahead, and no
  gradients: the batches of the open window are lost. Here it becomes one of the last completed optimizer step, after
  which nothing but random numbers and positions has changed;
- a checkpoint from before a batch's validation is resumed without that validation, one from an epoch's end without the
  ReduceLROnPlateau that steps there, and after a resume within an epoch this one is passed over too. Here the Trainer's
  own methods do what was still to be done;
- an epoch that `max_steps` ends counts as a whole one. Here it goes on where it was.
"""

import contextlib
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import RestartStage as EpochRestart
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.loops.training_epoch_loop import RestartStage as BatchRestart
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_warn

from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.streams import device_module


@dataclass
class _Boundary:
    """The beginning of the first batch after a completed optimizer step."""

    batches: int
    """Batches of the epoch before it."""
    total_batches: int
    """Batches of the run before it."""
    updates: list[int]
    """Updates that each engine had performed."""
    loaders: list[dict[str, Any]]
    """States of the data loaders that have one, before this batch was fetched."""
    random_state: dict[str, Any]


class ExactResume:
    """Completes checkpoints so that a resumed run equals one that never stopped, and resumes from them.

    Args:
        trainer: while it fits.
        engines: those of the strategy.
        device: where the model is, for its random numbers.
    """

    def __init__(self, trainer: Trainer, engines: Sequence[HiFT], device: torch.device) -> None:
        self._trainer = trainer
        self._engines = engines
        self._device = device
        self._boundary: _Boundary | None = None
        self._start: _Boundary | None = None  # of a batch, where the gradients that wait may be another net's
        self._begun: int | None = None  # the batch in hand, counted over the run
        self._loaders: list[dict[str, Any]] = []
        self._record: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None
        self._counts_before_validation: dict[str, dict[str, Any]] = {}  # of EarlyStopping
        # the random numbers after each validation since the boundary, by the batches of the run before it
        self._validated: dict[int, dict[str, Any]] = {}
        self._validated_before_stop: dict[int, dict[str, Any]] = {}  # of those to come in a window that is done again
        self._state_at_batch_start: dict[str, Any] | None = None
        self._state_at_validation_start: dict[str, Any] | None = None

    # --- while training ---------------------------------------------------------------------------------------------

    def batch_starts(self) -> None:
        """Note where the run could go on from, unless gradients of earlier batches wait for their step.

        It may be told of a batch twice: as it comes from the loader, and when Lightning begins with it.
        """
        if self._begun == self._total_batches:
            return
        self._begun = self._total_batches
        if self._state_at_batch_start is not None:
            set_random_state(self._state_at_batch_start, self._device)
            self._state_at_batch_start = None
        self._pass_over_validations()
        loaders, self._loaders = self._loaders, self._loader_states()
        waiting = any(engine.within_step for engine in self._engines)
        if waiting and len(self._engines) == 1:
            return
        self._start = self._here(loaders)
        if not waiting:
            self._boundary = self._start
            self._validated.clear()

    def _pass_over_validations(self) -> None:
        """Leave out the validations of a window that is done again which had been done before the run stopped."""
        done = self._total_batches
        if (after := self._validated_before_stop.pop(done, None)) is not None:
            set_random_state(after, self._device)
            self._validated[done] = after
        if done + 1 in self._validated_before_stop:
            self._trainer.fit_loop.epoch_loop._skip_next_val = True

    def forget(self) -> None:
        """Forget what was noted and loaded, where the Trainer has gone back to where it was by itself."""
        self._record = self._boundary = self._start = self._begun = None
        self._validated, self._validated_before_stop = {}, {}

    def validation_starts(self) -> None:
        """Note for a checkpoint from within the validation, which is done anew then, what it will have changed."""
        if self._state_at_validation_start is not None:
            set_random_state(self._state_at_validation_start, self._device)
            self._state_at_validation_start = None
        self._before_validation = random_state(self._device)
        stoppers = [each for each in self._trainer.callbacks if isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]
        self._counts_before_validation = {stopper.state_key: stopper.state_dict() for stopper in stoppers}

    def validation_ends(self) -> None:
        """Forget what was noted at its start, and note that it is done."""
        self._before_validation, self._counts_before_validation = None, {}
        self._validated[self._total_batches] = random_state(self._device)

    def _here(self, loaders: list[dict[str, Any]]) -> _Boundary:
        return _Boundary(
            self._batches.processed,
            self._total_batches,
            [engine.updates for engine in self._engines],
            loaders,
            random_state(self._device),
        )

    @property
    def _epochs(self) -> _ProcessedTracker:
        """Lightning's counts of epochs."""
        return _processed(self._trainer.fit_loop.epoch_progress.current)

    @property
    def _batches(self) -> _ProcessedTracker:
        """Lightning's counts of the batches of this epoch."""
        return _processed(self._trainer.fit_loop.epoch_loop.batch_progress.current)

    @property
    def _total_batches(self) -> int:
        """Batches of the run that have been processed."""
        return _processed(self._trainer.fit_loop.epoch_loop.batch_progress.total).processed

    # --- saving -----------------------------------------------------------------------------------------------------

    def complete(self, checkpoint: dict[str, Any]) -> bool:
        """Write into a checkpoint what Lightning leaves out of it.

        Args:
            checkpoint: as Lightning made it; its progress is set back if a batch or an accumulation window is open.

        Returns:
            Whether a run can go on from it; it cannot if an update has been completed and its batch has not.
        """
        if self._record is not None:  # nothing has been done since it was loaded
            checkpoint["hift"]["resume"] = self._record
            return True
        fit = self._trainer.fit_loop
        batches, epochs = self._batches, self._epochs
        in_batch = batches.ready != batches.processed or self._begun == self._total_batches
        in_window = any(engine.within_step for engine in self._engines)
        if batches.started != batches.ready and not in_window and not self._noted_this_batch():
            self._boundary = self._here(self._loaders)  # a callback has it before the strategy
        updates = [engine.updates for engine in self._engines]
        boundary = self._boundary
        if in_batch and (boundary is None or boundary.updates != updates):
            boundary = self._start
        updated = boundary is None or boundary.updates != updates
        if in_batch and updated:
            return False
        set_back = in_batch or (in_window and not updated)
        batches_over = not set_back and fit.epoch_loop._num_ready_batches_reached()
        within_epoch = epochs.started == epochs.ready > 0 and not (batches_over and epochs.processed == epochs.ready)
        to_do = "nothing" if set_back else self._still_to_do(within_epoch)
        batches_done = self._total_batches
        if set_back:
            assert boundary is not None
            _set_back(checkpoint, boundary)
            state, batches_done = boundary.random_state, boundary.total_batches
        else:
            before_validation = None if to_do == "end_of_batch_after_validation" else self._before_validation
            state = self._state_at_batch_start or before_validation or random_state(self._device)
        if self._trainer.validating and not self._validation_is_over and "callbacks" in checkpoint:
            checkpoint["callbacks"].update(self._counts_before_validation)
        from_step = set_back and boundary is self._boundary
        if in_window and not from_step and self._accumulates_by_hand():
            waiting = next(engine for engine in self._engines if engine.within_step)
            rank_zero_warn(
                f"A checkpoint is saved while gradients of block `{waiting.block.name}` wait for their step and "
                "another optimizer has been stepped since they began; they are not in it, so a run that goes on from "
                "it accumulates them anew. Save where no optimizer is within its accumulation."
            )
        checkpoint["hift"]["resume"] = {
            "within_epoch": within_epoch,
            "epoch": epochs.ready - 1 if within_epoch else epochs.processed,
            "at_batch_start": set_back or self._state_at_batch_start is not None,
            "ranks": self._trainer.world_size,
            "batches_in_epoch": self._trainer.num_training_batches,
            "to_do": to_do,
            "monitored": self._monitored(),
            "random_state": _plain(state),
            "validated": self._validated_after(batches_done),
        }
        return True

    def _monitored(self) -> dict[str, torch.Tensor]:
        """The metrics that schedules and callbacks look at, at the end of an epoch too, after the validation."""
        monitors: set[str | None] = {config.monitor for config in self._trainer.lr_scheduler_configs}
        monitors.update(getattr(callback, "monitor", None) for callback in self._trainer.callbacks)  # type: ignore[attr-defined]
        return {name: metric.cpu() for name, metric in self._trainer.callback_metrics.items() if name in monitors}

    def _validated_after(self, batches: int) -> dict[int, dict[str, Any]]:
        """The validations that have been done since, or had been in the run that this one goes on from."""
        validated = {**self._validated, **self._validated_before_stop}
        if self._trainer.validating and self._validation_is_over:
            validated[self._total_batches] = random_state(self._device)
        return {done: _plain(after) for done, after in validated.items() if done > batches}

    def _accumulates_by_hand(self) -> bool:
        """Whether gradients wait for a step of `hift_step`; others may be left over, as those of a GAN's other net."""
        from hift_lightning.manual import HiFTManualMixin  # which imports the strategies

        module = self._trainer.lightning_module
        return isinstance(module, HiFTManualMixin) and module.accumulating

    def _noted_this_batch(self) -> bool:
        return self._boundary is not None and self._boundary.total_batches == self._total_batches

    def _still_to_do(self, within_epoch: bool) -> str:
        """What a run that goes straight on does next and the resumed one would not."""
        batches, epochs = self._batches, self._epochs
        if not within_epoch:
            return "end_of_epoch" if epochs.completed < epochs.processed else "nothing"
        if batches.completed < batches.processed:
            return "end_of_batch"
        if not self._trainer.validating:
            return "nothing"
        if self._validation_is_over:
            return "end_of_batch_after_validation"
        # where the last batch is that of the validation before, this one's data loader has drawn nothing yet
        return "end_of_batch" if self._validated_last_batch and self._before_validation is None else "validation"

    @property
    def _validation_is_over(self) -> bool:
        """Whether callbacks are being told the metrics, or have been, and none has failed over it.

        Where one has, those after it have not been told, so the validation is done anew.
        """
        failed = self._trainer.state.status == TrainerStatus.INTERRUPTED and self._before_validation is not None
        # Lightning takes the outputs out between `on_validation_epoch_end` and `on_validation_end`
        outputs = self._trainer.fit_loop.epoch_loop.val_loop._logged_outputs
        # one that has not begun has those of the one before it
        begun = self._before_validation is not None or self._total_batches in self._validated
        return begun and self._validated_last_batch and not outputs and not failed

    @property
    def within_validation(self) -> bool:
        """Whether a validation has begun and batches of it are left."""
        return self._before_validation is not None and not self._validated_last_batch

    @property
    def _validated_last_batch(self) -> bool:
        progress = self._trainer.fit_loop.epoch_loop.val_loop.batch_progress
        return progress.is_last_batch and progress.current.ready == progress.current.completed

    # --- resuming ---------------------------------------------------------------------------------------------------

    def load(self, record: dict[str, Any]) -> None:
        """Set Lightning's restored progress to where the run stopped.

        Args:
            record: what :meth:`complete` wrote.
        """
        self._record = record
        fit = self._trainer.fit_loop
        # also after a whole epoch: otherwise Lightning does not load the states of data loaders
        _set_restarting(fit, True)
        behind = self._epochs.processed - record["epoch"]
        for epochs in map(_processed, (fit.epoch_progress.current, fit.epoch_progress.total)):
            epochs.processed -= behind
            epochs.completed = epochs.processed
            epochs.ready = epochs.started = epochs.processed + record["within_epoch"]
        batches = fit.epoch_loop.batch_progress
        for count in map(_processed, (batches.current, batches.total)):
            count.ready = count.started = count.completed = count.processed
        if fit._combined_loader is not None:
            # made early, as by `trainer.estimated_stepping_batches`; then Lightning leaves its state unloaded
            fit._load_combined_loader_states()
            iter(self._fetcher)

    def train_starts(self) -> None:
        """Do what was still to be done when the run stopped, and restore the random numbers."""
        if self._record is not None:
            record, self._record = self._record, None
            self._validated_before_stop = record.get("validated", {})
            self._count_for_these_ranks(record)
            self._go_on(record)
        self._loaders = self._loader_states()

    def _count_for_these_ranks(self, record: dict[str, Any]) -> None:
        """Count the batches done as each of another number of ranks would have, where an epoch has more or fewer."""
        ranks, length = record["ranks"], record["batches_in_epoch"]
        if ranks == self._trainer.world_size or length == self._trainer.num_training_batches:
            return
        self._validated_before_stop = {}
        count = self._batches
        count.processed = count.processed * ranks // self._trainer.world_size
        count.ready = count.started = count.completed = count.processed

    def _go_on(self, record: dict[str, Any]) -> None:
        fit, batch_loop = self._trainer.fit_loop, self._trainer.fit_loop.epoch_loop
        untouched = random_state(self._device)
        set_random_state(record["random_state"], self._device)
        self._trainer.callback_metrics.update(record["monitored"])
        if record["within_epoch"]:
            for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
                # they act when an epoch starts, and Lightning does not call that hook within one
                if isinstance(callback, (GradientAccumulationScheduler, StochasticWeightAveraging)):
                    callback.on_train_epoch_start(self._trainer, self._trainer.lightning_module)
        # Lightning takes it for a restart until the epoch is over, and passes over ReduceLROnPlateau at its end
        fit._restarting = False
        _set_restarting(batch_loop.val_loop, False)
        batch_loop.val_loop.reset_restart_stage()
        within_epoch = self._do_what_was_left(record)
        if within_epoch and batch_loop.batch_progress.current.ready:
            self._go_on_within_epoch(record, untouched)
        else:
            self._begin_pass(record, within_epoch)

    def _do_what_was_left(self, record: dict[str, Any]) -> bool:
        """Do what was still to be done of a batch or an epoch; tell whether the run goes on within an epoch."""
        fit, batch_loop = self._trainer.fit_loop, self._trainer.fit_loop.epoch_loop
        if record["to_do"] == "end_of_epoch":
            epochs = fit.epoch_progress.current
            epochs.completed -= 1
            batch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            epochs.completed += 1
        elif record["to_do"] != "nothing":
            batch_loop._skip_next_val = record["to_do"] == "end_of_batch_after_validation"
            if record["to_do"] == "validation":
                self._state_at_validation_start = record["random_state"]
            batch_loop.on_advance_end(self._fetcher)
        within_epoch: bool = record["within_epoch"]
        if within_epoch and batch_loop._num_ready_batches_reached():
            fit.on_advance_end()
            within_epoch = False
        if not within_epoch:
            fit._restart_stage = EpochRestart.NONE
        return within_epoch

    def _go_on_within_epoch(self, record: dict[str, Any], untouched: dict[str, Any]) -> None:
        """Go on with the batch after those that were done; `untouched` are the random numbers before the resume."""
        loader, batch_loop = self._trainer.fit_loop._combined_loader, self._trainer.fit_loop.epoch_loop
        # so restarted, the loop adds a step to the logged ones and fetches the next batch
        batch_loop._restart_stage = BatchRestart.NONE
        batch_loop._batches_that_stepped -= 1
        now = random_state(self._device)
        assert loader is not None
        if record["at_batch_start"] or not all(getattr(one, "draws_as_before", False) for one in loader.flattened):
            # not before the batch is fetched: a loader that begins anew may draw random numbers then
            self._state_at_batch_start = now
            set_random_state(untouched, self._device)
        else:  # it draws as the run that went straight on: nothing, or for a pass that begins with this batch
            self._set_before_fetch(now)
        self._warn_of_loaders_without_state()

    def _begin_pass(self, record: dict[str, Any], within_epoch: bool) -> None:
        """Begin with the first batch of a pass over the data."""
        fit = self._trainer.fit_loop
        _set_restarting(fit.epoch_loop, False)
        now = random_state(self._device)
        # a `TrainingLoader` tells that it was fetching the first batch of a pass
        passes_over = any("begun" not in state for state in self._loader_states())
        if fit.epoch_progress.current.ready > within_epoch and passes_over:
            # they were saved at the end of a pass, which has to be over before the next one
            with contextlib.suppress(StopIteration):
                next(self._fetcher)
        set_random_state(now, self._device)
        iter(self._fetcher)  # again, since a pass may begin by drawing random numbers
        if record["at_batch_start"]:
            self._state_at_batch_start = record["random_state"]

    @property
    def _fetcher(self) -> _DataFetcher:
        fetcher = self._trainer.fit_loop._data_fetcher
        assert fetcher is not None
        return fetcher

    def _set_before_fetch(self, state: dict[str, Any]) -> None:
        """Set the random numbers right before the next batch is fetched; Lightning may draw some until then."""
        loop = self._trainer.fit_loop.epoch_loop

        def set_once() -> None:
            if loop.__dict__.pop("_on_before_fetch", None) is not None:  # the fetcher goes on to call this function
                set_random_state(state, self._device)
            loop._on_before_fetch()

        loop._on_before_fetch = set_once  # type: ignore[method-assign]

    def _warn_of_loaders_without_state(self) -> None:
        loader = self._trainer.fit_loop._combined_loader
        assert loader is not None
        without = [type(one).__name__ for one in loader.flattened if not isinstance(one, _Stateful)]
        if not without:
            return
        # Lightning's own words for it do not say what happens to the data
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before", PossibleUserWarning)
        batches = self._trainer.fit_loop.epoch_loop.batch_progress.current.ready
        rank_zero_warn(
            f"The run goes on after {batches} batches of epoch {self._trainer.current_epoch}, but the data loader "
            f"`{without[0]}` has no `state_dict` and `load_state_dict`, so it begins the epoch's data anew, as under "
            "any strategy; resume from the end of an epoch, or use a loader that has both, such as "
            "`hift_lightning.data.loading.TrainingLoader`."
        )

    def _loader_states(self) -> list[dict[str, Any]]:
        loader = self._trainer.fit_loop._combined_loader
        return [] if loader is None else loader._state_dicts()


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators that a training step may draw from: torch's, Python's, numpy's and the device's."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if hasattr(module := device_module(device), "get_rng_state"):
        state["device"] = module.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators' states; arguments as :func:`random_state` returned and took them."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    if "device" in state and hasattr(module := device_module(device), "set_rng_state"):
        module.set_rng_state(state["device"], device)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """In primitives and tensors only, which is what ``torch.load(weights_only=True)`` reads."""
    name, keys, position, has_gauss, cached = state["numpy"]
    return {**state, "numpy": (name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached))}


def _set_back(checkpoint: dict[str, Any], boundary: _Boundary) -> None:
    """Let the checkpoint be from the beginning of the batch that the boundary is before."""
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for key, done in (("current", boundary.batches), ("total", boundary.total_batches)):
        progress[key] = {"ready": done + 1, "started": done, "processed": done, "completed": done}
    if boundary.loaders:
        loops["state_dict"]["combined_loader"] = boundary.loaders


def _processed(tracker: object) -> _ProcessedTracker:
    assert isinstance(tracker, _ProcessedTracker)  # Lightning declares their base class
    return tracker


def _set_restarting(loop: _Loop, restarting: bool) -> None:
    # not by `loop.restarting = ...`: what the fit loop makes of that depends on `max_steps`
    loop._restarting = restarting
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _set_restarting(child, restarting)
