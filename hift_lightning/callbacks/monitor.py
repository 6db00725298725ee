"""A callback that tells where the rotation is, what it does to each block and what a step costs."""

import importlib.util
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from hift_lightning.callbacks.block_table import block_table
from hift_lightning.callbacks.block_watch import BlockWatch, watches_of
from hift_lightning.callbacks.timelines import StepRecord, Timeline, draw
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.measure import ON_DEVICE, ROLES, bytes_by_role
from hift_lightning.engine.settings import check_switch


class HiFTMonitor(L.Callback):
    """Log the rotation and what it does to each block, and count time and bytes, at every optimizer step.

    Under a HiFT strategy it logs `hift/block` and `hift/cycle` (also to the progress bar), `hift/active_params`,
    `hift/grad_norm` (of all that is active, before Lightning clips it), `hift/lr`, `hift/page_in_ms`,
    `hift/parked_bytes` and `hift/skipped_steps`; and at the end of each cycle its means: `hift/update_ratio` over all
    blocks, and for each block, and for what is always active, `hift_grad_norm/<block>`, `hift_update_ratio/<block>`,
    `hift_lr/<block>`, `hift_page_in_ms/<block>` and the updates so far, `hift_visits/<block>`.
    At the end of `fit`, also one that an error or Ctrl-C has ended, it prints a table of the blocks. Under every
    strategy it logs `memory/peak_device_bytes` of the run so far and `memory/weights_bytes`, `memory/gradients_bytes`
    and `memory/optimizer_state_bytes` of the step.

    The update ratio is the norm of an update over that of the weights before it. Measuring it takes a copy of the
    active block's weights (or masters) in host memory, two transfers of them and a wait for the device, which is why it
    is done in one of `update_ratio_every` updates of a block; the device needs 4 MiB for it, when gradients are gone.
    An update at rate 0, as in the first cycle of a warm-up, does not count, and the block's next one is measured
    instead. It is not measured where ranks split the masters of a block (`shard_parked_state` with `master_weights`).
    With `update="fused"` gradients are used inside backward, so there is no gradient norm.

    Bytes are counted from live tensors before the optimizer's step and at its end, when gradients and paged-in state
    are there together, and under HiFT again between steps, when the most is parked. State and masters that are updated
    in pieces count as the optimizer's state, with all of the window that holds them. Activations are not counted, nor
    with `update="fused"` the gradient in use. The time of a step is that of its batches, without the loading of data,
    validation and checkpoints. What is kept for the pictures does not grow with the run: after 2,000 steps a point
    stands for two of them, after 4,000 for four, and so on.

    Args:
        folder: where `block_timeline.png` (under HiFT) and `memory_timeline.png` are written when the table is printed;
            `None`: no pictures.
        pictures: `None` draws them where matplotlib is installed, `False` never, and `True` is an error where they
            cannot be.
        update_ratio_every: updates of a block from one whose ratio is measured to the next; 0: none.

    Raises:
        ConfigurationError: pictures are wanted, and matplotlib is not installed or no folder is given; or
            `update_ratio_every` is negative.
    """

    def __init__(
        self, folder: str | Path | None = None, pictures: bool | None = None, update_ratio_every: int = 4
    ) -> None:
        if pictures and importlib.util.find_spec("matplotlib") is None:
            raise ConfigurationError(
                "`pictures=True` of `HiFTMonitor` needs matplotlib, which is not installed; run "
                "`pip install matplotlib`, or use `pictures=None`, which leaves them out."
            )
        if pictures and folder is None:
            raise ConfigurationError("`pictures=True` of `HiFTMonitor` has no place to draw to; give `folder`.")
        if pictures is not None:
            check_switch("pictures", pictures)
        if not isinstance(update_ratio_every, int) or update_ratio_every < 0:
            raise ConfigurationError(
                f"`update_ratio_every={update_ratio_every}` of `HiFTMonitor` is not possible; give 1 to measure in "
                "each cycle, more to do so less often, or 0 for never."
            )
        self.folder = None if folder is None else Path(folder)
        self.pictures = pictures
        self.update_ratio_every = update_ratio_every
        self._handles: list[RemovableHandle] = []
        self._ends: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._peak: dict[str, int] = {}
        self._in_step: dict[str, int] = {}
        self._rotation: dict[str, int] = {}
        self._watches: list[BlockWatch] = []
        self._timeline = Timeline()
        self._losses: list[Tensor] = []
        self._unread_loss: Tensor | None = None
        self._seconds = 0.0
        self._steps = 0
        self._batch_began = 0.0
        self._first_step = self._last_step = 0
        self._before_update: dict[str, int] = {}
        self._has_to_show = False

    @property
    def numbers(self) -> dict[str, float]:
        """What was measured in the last `fit`, by name.

        `time/step_ms_mean` (milliseconds), `memory/peak_device_bytes` (weights, gradients and state that were
        on the device at one time), `memory/peak_<role>_bytes`, `memory/parked_bytes`, and under HiFT
        `hift/blocks`, `hift/cycles` (cycles completed) and `hift/skipped_steps` (steps left out because of NaN or inf).
        """
        numbers: dict[str, float] = dict(self._rotation)
        if self._steps:
            numbers["time/step_ms_mean"] = 1000 * self._seconds / self._steps
        for name, count in self._peak.items():
            numbers["memory/parked_bytes" if name == "parked" else f"memory/peak_{name}_bytes"] = count
        return numbers

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._forget()  # a second fit counts anew
        self._first_step = self._last_step = trainer.global_step
        self._has_to_show = True

        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._count_bytes(trainer, pl_module)
            engines = getattr(trainer.strategy, "engines", [])
            held = sum(engine.held_in_pieces for engine in engines if engine.optimizer is optimizer)
            if held:
                self._take_in({**self._before_update, "optimizer_state": held})

        # callbacks come before the strategy here, so this hook runs before the strategy's own, which frees the
        # gradients and parks the state
        self._handles = [optimizer.register_step_post_hook(count) for optimizer in trainer.optimizers]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._follow_engines(trainer)
        if self._watches:
            hift = self._watches[0].engine
            pl_module.log_dict(
                {"hift/block": float(hift.block.index), "hift/cycle": float(hift.cycle)}, prog_bar=True, batch_size=1
            )
            pl_module.log("hift/active_params", float(sum(part.numel for part in hift.active_parts)), batch_size=1)
        self._batch_began = time.perf_counter()

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        for watch in self._watches:
            if watch.fused:
                watch.begin_update()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._before_update = self._count_bytes(trainer, pl_module)
        # the device has been waited for just now, in the search for NaN
        self._read_loss()
        self._follow_engines(trainer)
        self._watch(trainer)
        if self._watches and not (watch := self._watch_of(optimizer)).fused:
            watch.begin_update(_scale_of_gradients(trainer, optimizer))

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._batch_began
        self._steps = trainer.global_step - self._first_step
        if self._watches:
            self._count_bytes(trainer, pl_module)  # between steps, when the most is parked
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, Tensor):
                # Lightning has divided it, so that the gradients of micro-batches add up to a mean
                parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                self._losses.append(loss.detach() * parts)
            self._log_rotation(trainer, pl_module)
        if trainer.global_step > self._last_step:
            self._end_step(trainer, pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # here, and not in `on_train_end`, since the strategy has parked everything by now
        try:
            self._show(trainer)
        except OSError as error:  # the training is done, and is not to be lost for a picture
            rank_zero_warn(f"HiFTMonitor could not write its pictures to `{self.folder}` ({error.strerror}).")

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()
        # not when `test` or `validate` ends with it, nor before the first step
        if not self._has_to_show or not self._timeline.records:
            return
        try:
            self._end(trainer)
            self._show(trainer)
        except Exception as failure:  # the user is to see what has ended the training, and not this
            # not by a logger, which on a full disk shows its own failure too
            print(f"HiFTMonitor could not show what it had measured until then: {failure!r}", file=sys.stderr)

    def _end(self, trainer: L.Trainer) -> None:
        self._remove_hooks()
        self._read_loss()
        for watch in self._watches:  # a cycle that was cut short counts for the last step
            last_step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
            _log_cycle(trainer, watch.take_cycle(unfinished=True), last_step)

    def _show(self, trainer: L.Trainer) -> None:
        self._has_to_show = False
        if not trainer.is_global_zero:
            return
        if self._watches:
            console = Console()
            with console.capture() as table:
                console.print(block_table(self._watches, self.update_ratio_every, trainer.world_size, self._peak))
            print(table.get(), end="")  # above a progress bar of rich, which a console of its own would write over
        if self.folder is not None and self.pictures is not False and self._timeline.records:
            self._draw(self.folder)

    def _remove_hooks(self) -> None:
        for handle in (*self._handles, *self._ends):
            handle.remove()
        self._handles, self._ends = [], []

    def _follow_engines(self, trainer: L.Trainer) -> None:
        """Watch the strategy's engines, and count anew where they are new, as optimizers made in training are."""
        engines = getattr(trainer.strategy, "engines", [])
        if [watch.engine for watch in self._watches] != engines:
            self._watches = watches_of(engines, self.update_ratio_every)

    def _watch(self, trainer: L.Trainer) -> None:
        def end_update(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            watch = self._watch_of(optimizer)
            watch.end_update()
            _log_cycle(trainer, watch.take_cycle(), trainer.fit_loop.epoch_loop._batches_that_stepped)

        # behind the strategy's own hooks, which are new where it has begun again, as after a search for the rate
        for handle in self._ends:
            handle.remove()
        self._ends = [watch.engine.optimizer.register_step_post_hook(end_update) for watch in self._watches]

    def _watch_of(self, optimizer: Optimizer) -> BlockWatch:
        return next(watch for watch in self._watches if watch.engine.optimizer is optimizer)

    def _log_rotation(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        hift = self._watches[0].engine
        skipped_steps = sum(watch.engine.skipped_steps for watch in self._watches)
        self._rotation = {
            "hift/blocks": len(hift.plan.blocks),
            "hift/cycles": hift.cycle,
            "hift/skipped_steps": skipped_steps,
        }
        pl_module.log("hift/skipped_steps", float(skipped_steps), batch_size=1)
        pl_module.log("hift/page_in_ms", hift.page_in_ms, batch_size=1)
        pl_module.log("hift/parked_bytes", float(self._peak.get("parked", 0)), batch_size=1)

    def _end_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step_before, self._last_step = self._last_step, trainer.global_step
        if not self._in_step:  # no optimizer was called
            self._count_bytes(trainer, pl_module)
        pl_module.log("memory/peak_device_bytes", float(self._peak["device"]), batch_size=1)
        for role in ON_DEVICE:
            pl_module.log(f"memory/{role}_bytes", float(self._in_step[role]), batch_size=1)
        if self._watches:
            watch = self._watches[0]
            if watch.rate is not None:
                pl_module.log("hift/lr", watch.rate, batch_size=1)
            if not watch.fused:  # NaN where a step was left out, rather than the norm of the one before
                norm = math.nan if watch.gradient_norm is None else watch.gradient_norm
                pl_module.log("hift/grad_norm", norm, batch_size=1)
        blocks = tuple(self._watches[0].updated) if self._watches else ()
        self._timeline.add(StepRecord(step_before, self._last_step, blocks, self._in_step))
        for watch in self._watches:
            watch.end_step()
        self._in_step = {}
        if self._losses:
            self._unread_loss, self._losses = torch.stack(self._losses).mean(), []

    def _read_loss(self) -> None:
        """Take the loss of the step before, which does not make the host wait for this one's."""
        if self._unread_loss is not None:
            self._timeline.add_loss(float(self._unread_loss))
            self._unread_loss = None

    def _draw(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        watch = self._watches[0] if self._watches else None
        names = [] if watch is None else watch.block_names
        try:
            pictures = draw(self._timeline.records, names, folder)
        except ImportError:
            rank_zero_info(
                "HiFTMonitor draws no pictures, since matplotlib is not installed; they come with "
                "`pip install matplotlib`."
            )
            return
        print("pictures:", ", ".join(map(os.path.relpath, pictures)))

    def _count_bytes(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int]:
        engines = getattr(trainer.strategy, "engines", [])

        def is_parked(parameter: Tensor) -> bool:
            return any(engine.residency.is_parked(parameter) for engine in engines)

        counts = dict.fromkeys(ROLES, 0)
        for position, optimizer in enumerate(trainer.optimizers):
            for role, count in bytes_by_role(pl_module, optimizer, is_parked).items():
                if position == 0 or role in ("optimizer_state", "parked"):
                    counts[role] += count
        counts["parked"] += sum(engine.residency.master_bytes for engine in engines)
        self._take_in(counts)
        return counts

    def _take_in(self, counts: dict[str, int]) -> None:
        counts["device"] = sum(counts[role] for role in ON_DEVICE)
        self._peak = _most(counts, self._peak)
        self._in_step = _most(counts, self._in_step)


def _most(counts: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {role: max(count, before.get(role, 0)) for role, count in counts.items()}


def _log_cycle(trainer: L.Trainer, numbers: dict[str, float], step: int) -> None:
    if numbers:
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)


def _scale_of_gradients(trainer: L.Trainer, optimizer: Optimizer) -> float:
    """What the gradients are still multiplied by, where an optimizer divides them itself inside its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
