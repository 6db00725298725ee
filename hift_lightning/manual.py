"""HiFT for LightningModules that optimize by hand (``automatic_optimization = False``)."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.layers import class_of
from hift_lightning.strategies.blockwise import BlockwiseTraining

if TYPE_CHECKING:
    _Base = LightningModule
else:
    _Base = object


@dataclass
class _AccumulationWindow:
    """The micro-batches of one optimizer step in the making."""

    size: int
    owner: object = None
    """The engine, or without HiFT the Trainer, that it was opened under; under another one it is of an earlier run."""
    seen: int = 0
    updates: int = 0
    """The engine's updates when the window was opened."""


class HiFTManualMixin(_Base):
    """One call a micro-batch does everything: backward, accumulation, clipping, step, rotation, schedulers.

    ::

        class MyModule(HiFTManualMixin, L.LightningModule):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                self.hift_step(self.loss(batch), accumulate_grad_batches=4, gradient_clip_val=1.0)

    With several optimizers each is rotated over its own parameters, and a loss goes back only into the
    parameters of the optimizer that is named. The module runs unchanged under Lightning's own strategies
    too, other than DeepSpeed's.
    """

    def hift_step(
        self,
        loss: Tensor,
        *,
        optimizer: int | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
    ) -> bool:
        """Go back through the loss and, when the accumulation window is full, step.

        The window also closes at the last batch of an epoch, as under automatic optimization. Schedulers whose
        configuration has ``"interval": "step"`` are stepped after the optimizer, held through a cycle as
        ``lr_update`` says; the others stay in your hands. Gradients are freed after the step.

        Args:
            loss: a scalar, of one micro-batch; it is divided by ``accumulate_grad_batches`` here.
            optimizer: index of the optimizer in ``configure_optimizers``; may be left out if there is one.
            accumulate_grad_batches: micro-batches in one optimizer step.
            gradient_clip_val: the largest norm, or value, of the gradients of the active block; ``None`` does not
                clip. Under a GradScaler the unscaled gradients are clipped.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Returns:
            Whether the optimizer was stepped, or its step skipped (by a GradScaler, or because of NaN or inf).

        Raises:
            MisconfigurationException: if it is called in a way that cannot train as meant; the message says how.
        """
        self._check_call(loss, accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm)
        index, chosen = self._choose_optimizer(optimizer)
        engine = self._engine_of(chosen.optimizer)
        window = self._open_window(index, accumulate_grad_batches, engine)
        if engine is not None and engine.settings.update == "fused":
            self._check_fused(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm)
            engine.clip_value, gradient_clip_val = gradient_clip_val, None

        several = len(self.trainer.optimizers) > 1
        trained = [p for g in chosen.param_groups for p in g["params"] if p.requires_grad]
        strategy = self.trainer.strategy
        window.seen += 1
        steps_now = window.seen == window.size or self.trainer.is_last_batch
        sends_later = isinstance(strategy, ParallelStrategy) and not steps_now
        with strategy.block_backward_sync() if sends_later else contextlib.nullcontext():  # type: ignore[attr-defined]
            self.manual_backward(loss / window.size, **({"inputs": trained} if several else {}))
            if several and engine is not None and isinstance(strategy, BlockwiseTraining):
                strategy.after_backward(engine, loss)
        if not steps_now:
            return False

        self._step(chosen, engine, gradient_clip_val, gradient_clip_algorithm)
        self._windows[index] = _AccumulationWindow(window.size)
        for config in self.trainer.lr_scheduler_configs:
            if (
                config.scheduler.optimizer is chosen.optimizer
                and config.interval == "step"
                and not config.reduce_on_plateau
            ):
                scheduler: Any = config.scheduler
                scheduler.step()
        return True

    @property
    def accumulating(self) -> bool:
        """Whether a window of micro-batches is open in this run: gradients wait for their optimizer's step."""
        strategy = self.trainer.strategy
        owners = strategy.engines if isinstance(strategy, BlockwiseTraining) else (self.trainer,)
        return any(window.seen > 0 and window.owner in owners for window in self._windows.values())

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients of an open window, which Lightning would free before a validation within it."""
        if not self.accumulating:
            super().on_validation_model_zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_accumulation_windows"}  # they hold the engine

    @property
    def _windows(self) -> dict[int, _AccumulationWindow]:
        windows: dict[int, _AccumulationWindow] = self.__dict__.setdefault("_accumulation_windows", {})
        return windows

    def _step(self, chosen: LightningOptimizer, engine: HiFT | None, clip_val: float | None, algorithm: str) -> None:
        def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=clip_val, gradient_clip_algorithm=algorithm)

        if clip_val is None:
            chosen.step()
        else:
            # the optimizer's own hook runs after a GradScaler has unscaled the gradients
            handle = chosen.optimizer.register_step_pre_hook(clip)
            if engine is not None:
                engine.update_after_hooks()
            try:
                chosen.step()
            finally:
                handle.remove()
        chosen.optimizer.zero_grad()

    def _check_call(self, loss: Any, accumulate: Any, clip_val: float | None, algorithm: str) -> None:
        name = class_of(self).__name__
        if self.automatic_optimization:
            raise MisconfigurationException(
                f"`{name}.hift_step` was called under automatic optimization, where Lightning steps too; set "
                "`self.automatic_optimization = False` in `__init__`, or return the loss and drop the mixin."
            )
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"`{name}.hift_step` was called under `DeepSpeedStrategy`, whose engine accumulates, clips and steps "
                "by itself; use `strategy='hift_ddp'` or `'hift_fsdp2'`."
            )
        if not self.trainer.training or not torch.is_grad_enabled():
            raise MisconfigurationException(
                f"`{name}.hift_step` was called outside of training; call it in `training_step` only."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise MisconfigurationException(
                f"`{name}.hift_step` was given the loss {got}, and it takes a tensor with one element; reduce it, "
                "for example with `loss.mean()`."
            )
        if not isinstance(accumulate, int) or accumulate < 1:
            raise MisconfigurationException(
                f"`accumulate_grad_batches={accumulate!r}` in `{name}.hift_step` must be an integer of at least 1."
            )
        if clip_val is not None and clip_val <= 0:
            raise MisconfigurationException(
                f"`gradient_clip_val={clip_val!r}` in `{name}.hift_step` must be above 0; `None` does not clip."
            )
        if algorithm not in ("norm", "value"):
            raise MisconfigurationException(
                f"`gradient_clip_algorithm={algorithm!r}` in `{name}.hift_step` must be 'norm' or 'value'."
            )

    def _check_fused(self, accumulate: int, clip_val: float | None, algorithm: str) -> None:
        if accumulate > 1 or (clip_val is not None and algorithm == "norm"):
            raise MisconfigurationException(
                f"`{class_of(self).__name__}.hift_step` was to accumulate over {accumulate} batches and clip by "
                f"{algorithm if clip_val is not None else 'nothing'}, but `update='fused'` frees each gradient inside "
                "backward; use `update='streamed'`, or one batch a step and clipping by value."
            )

    def _choose_optimizer(self, index: int | None) -> tuple[int, LightningOptimizer]:
        optimizers = self.optimizers()
        if not isinstance(optimizers, list):
            optimizers = [optimizers]
        if index is None and len(optimizers) > 1:
            raise MisconfigurationException(
                f"`{class_of(self).__name__}` has {len(optimizers)} optimizers and `hift_step` was not told which one "
                f"this loss is for; pass `optimizer=` 0 to {len(optimizers) - 1}."
            )
        index = index or 0
        if not 0 <= index < len(optimizers):
            raise MisconfigurationException(
                f"`optimizer={index}` in `{class_of(self).__name__}.hift_step` is not one of the {len(optimizers)} "
                f"that `configure_optimizers` returned; pass 0 to {len(optimizers) - 1}."
            )
        chosen = optimizers[index]
        assert isinstance(chosen, LightningOptimizer)
        return index, chosen

    def _engine_of(self, optimizer: Optimizer) -> HiFT | None:
        strategy = self.trainer.strategy
        return strategy.engine_of(optimizer) if isinstance(strategy, BlockwiseTraining) else None

    def _open_window(self, index: int, size: int, engine: HiFT | None) -> _AccumulationWindow:
        window = self._windows.get(index)
        owner = engine or self.trainer
        if window is None or window.seen == 0 or window.owner is not owner:
            window = self._windows[index] = _AccumulationWindow(size, owner, updates=engine.updates if engine else 0)
            if engine is not None and len(self.trainer.optimizers) == 1 and engine.has_gradient:
                raise MisconfigurationException(
                    f"Block `{engine.block.name}` already has gradients when `{class_of(self).__name__}.hift_step` "
                    "begins an optimizer step, so they would count twice; it runs the backward pass itself, so call "
                    "neither `manual_backward` nor `loss.backward` beside it."
                )
            return window
        if window.size != size:
            raise MisconfigurationException(
                f"`accumulate_grad_batches` went from {window.size} to {size} in the middle of an optimizer step; "
                "change it only when `hift_step` has returned True."
            )
        if engine is not None and engine.updates != window.updates:
            raise MisconfigurationException(
                f"The optimizer was stepped outside of `{class_of(self).__name__}.hift_step` after {window.seen} of "
                f"{window.size} micro-batches, and the next block has its turn; let `hift_step` do the stepping."
            )
        return window
