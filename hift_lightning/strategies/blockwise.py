"""What every HiFT strategy does, whatever the number of devices: the hooks between Lightning and the engine."""

import contextlib
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from hift_lightning.engine.conversion import parameters_stay_themselves, replaces_parameters
from hift_lightning.engine.errors import ConfigurationError, add_note, chain
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.layers import class_of
from hift_lightning.engine.lr import DelayedLRScheduler
from hift_lightning.engine.partition import partition
from hift_lightning.engine.report import Report
from hift_lightning.engine.rotation import ONCE
from hift_lightning.engine.settings import HiFTSettings, parse_bytes
from hift_lightning.engine.streams import device_module
from hift_lightning.progress import PreparationBar
from hift_lightning.strategies.checkpoints import BlockwiseCheckpoints
from hift_lightning.strategies.clipping import BlockClipping
from hift_lightning.strategies.exact_resume import ExactResume
from hift_lightning.strategies.first_batch import first_batch
from hift_lightning.strategies.interrupts import PatientInterrupt
from hift_lightning.strategies.refusals import (
    refuse_callbacks_that_freeze,
    refuse_optimizers,
    refuse_other_wrappers,
    refuse_what_needs_gradients,
)

_WANTS_A_FROZEN_WEIGHT = "One of the differentiated Tensors does not require grad"
"""What `torch.autograd.grad` says of one."""


class BlockwiseTraining(BlockwiseCheckpoints):
    """Mixed into a Lightning strategy, it trains one block of layers at a time.

    The engine drives itself by the optimizer's step hooks; here it is only built, started and ended at the right
    moments, and told of what optimizers do not see (a backward pass that the active block took no part in).

    Args:
        group_size: layers per block; ``"auto"`` takes at the start of ``fit`` the largest one that fits
            ``memory_budget``, and where one layer a block does not, ``update="streamed"``, activation checkpointing
            and ``update="fused"`` in addition. It is planned with the first training batch; where others are larger,
            call :meth:`choose_group_size` with the largest before ``fit``.
        memory_budget: bytes of the device's memory that ``"auto"`` may take, such as ``"24GiB"``; by default all that
            the device has.
        order: order of the blocks' turns: ``"bottom2up"``, ``"top2down"``, ``"random"``, or a registered one
            (:func:`~hift_lightning.engine.rotation.register_order`).
        lr_update: when a scheduler with ``interval="step"`` changes the rate. ``"cycle"``: when every block has had
            its turn, by as many scheduler steps as there were optimizer steps; ``"cycle_once"``: then, by one step,
            as the published code does; ``"step"``: at every optimizer step. Schedulers with ``interval="epoch"`` and
            ReduceLROnPlateau are left as they are.
        steps_per_block: optimizer steps before the next block has its turn; ``"once"`` divides the steps of the run
            among the blocks, so that each has one turn (wants ``lr_update="step"`` and automatic optimization). Steps
            that are left over, fewer than there are blocks, begin a second cycle; a run that is stopped early leaves
            the blocks untrained whose turn had not come.
        offload: where optimizer state is parked: ``"cpu"``, the path of a folder (files), ``"none"`` (it stays on the
            device), or a registered tier (:func:`~hift_lightning.engine.tiers.register_tier`).
        update: ``"block"`` pages all state of the block in and makes one optimizer step; ``"streamed"`` takes it piece
            by piece through a window; ``"fused"`` does so inside backward and frees each gradient at once (no norm
            clipping, no accumulation, no GradScaler; hooks that look at gradients after backward see none).
        window: bytes of parked state and masters that ``"streamed"`` and ``"fused"`` may have on the device.
        activation_checkpointing: compute activations anew in backward, layer by layer, never below the active block.
        master_weights: fp32 masters of 16-bit weights, paged with the block (the paper's Mixed^Hi); they are taken
            before ``precision="bf16-true"`` or ``"16-true"`` rounds the weights.
        parked_dtype: keep parked moments in this dtype, such as ``"bfloat16"``.
        nonfinite: what is done about NaN or inf in the loss or in a gradient. ``"raise"`` ends the run with weights and
            optimizer state as they were before the step (with ``update="fused"`` the block has been updated by then);
            ``"skip"`` leaves the step out: the block keeps its turn, and neither the rotation nor a delayed learning
            rate counts it. Overflows under a GradScaler stay the scaler's business.
        resume_plan: what happens when a checkpoint was made with another plan of blocks. ``"same"``: an error that
            shows both; ``"rebuild"``: weights, masters and optimizer state carry over, and the rotation begins at the
            start of a cycle of this plan. Scheduler steps that were held in the checkpoint's unfinished cycle are
            passed on at the end of the new cycle, together with its own.
        layers: shell-style patterns on parameter names that override the layers found: each makes one layer.
        frozen: shell-style patterns on parameter names that are never trained.
        always_active: what is trained in every step, with whichever block has its turn: a number of layers from the
            top, or shell-style patterns on parameter names. The top layer is the head, or the final norm where the head
            has the weights of the embeddings. Gradients and state of these layers are on the device in each step.
        seed: seed of the ``"random"`` order; with the others it may be ``None``.
        arguments: of the Lightning strategy.

    Raises:
        ConfigurationError: if a value cannot work.
    """

    _always_sets_up_itself = False
    """Whether Lightning's own `setup` will not do even where nothing is trained."""

    def __init__(
        self,
        *,
        group_size: int | str = 1,
        memory_budget: str | int | None = None,
        order: str = "top2down",
        lr_update: str = "cycle",
        steps_per_block: int | str = 1,
        offload: str | Path = "cpu",
        update: str = "block",
        window: str | int = "256MiB",
        activation_checkpointing: bool = False,
        master_weights: bool = False,
        parked_dtype: str | None = None,
        nonfinite: str = "raise",
        resume_plan: str = "same",
        layers: Sequence[str] | None = None,
        frozen: Sequence[str] | None = None,
        always_active: Sequence[str] | int | None = None,
        seed: int | None = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._asked = HiFTSettings(
            group_size=group_size,
            memory_budget=memory_budget,
            order=order,
            lr_update=lr_update,
            steps_per_block=steps_per_block,
            offload=offload,
            update=update,
            window=window,
            activation_checkpointing=activation_checkpointing,
            master_weights=master_weights,
            parked_dtype=parked_dtype,
            nonfinite=nonfinite,
            resume_plan=resume_plan,
            layers=layers,
            frozen=frozen,
            always_active=always_active,
            seed=seed,
        )
        self.settings = self._asked
        self._chosen_for: object = None
        self.engines = []
        self._delayed: list[DelayedLRScheduler] = []
        self._clipping: BlockClipping | None = None
        self._to_be_rounded: weakref.ref[LightningModule] | None = None
        self._rounded_before = False
        self._updates_at_start: list[int] = []
        self._interrupt = PatientInterrupt()

    @property
    def hift(self) -> HiFT | None:
        """The engine of the first optimizer, or ``None`` before ``fit``."""
        return self.engines[0] if self.engines else None

    def report(self) -> Report:
        """What each block is, how often it has had its turn, and where its optimizer state is now.

        Raises:
            MisconfigurationException: before ``fit`` has set the training up.
        """
        if self.hift is None:
            raise MisconfigurationException(
                "`report()` was called before `Trainer.fit`, or in a process that has started others for it, and the "
                "blocks are cut where it trains; call it there, or print "
                "`hift_lightning.engine.partition.partition(model)`."
            )
        return self.hift.report()

    def check_patterns(self, model: Module) -> None:
        """Find out before any long work whether each pattern of the settings matches a parameter.

        ``fit`` does so too, when the module is complete for certain.

        Args:
            model: a complete model.

        Raises:
            ConfigurationError: if one matches nothing.
        """
        own = self.settings
        partition(model, layers=own.layers, frozen=own.frozen, always_active=own.always_active)

    def choose_group_size(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Choose the largest group of layers that fits ``memory_budget``, and what else that takes, by planning.

        Under ``group_size="auto"``, ``fit`` does so too, with the first training batch, unless it has been done for a
        module of these shapes in this precision. Call it before where another batch is larger.

        Args:
            trainer: whose precision, accumulation and clipping hold.
            module: a complete module, on any device, "meta" among them.
            batch: a training batch as large as any.

        Raises:
            ConfigurationError: if nothing fits, and what the planner raises.
        """
        from hift_lightning.planner import StepPlanner, choose  # stands above the strategies that it plans

        rank_zero_info("HiFT: looking for the largest `group_size` that fits.")
        with PreparationBar("planning") as bar:
            step = StepPlanner(
                module,
                batch,
                trainer.precision,
                trainer.accumulate_grad_batches,
                trainer.gradient_clip_val,
                trainer.gradient_clip_algorithm,
                bar.is_at,
            )
            choice = choose(self._asked, self._memory_budget(), step)
        self.settings = choice.settings
        self._chosen_for = _what_is_planned(trainer, module)
        rank_zero_info(f"HiFT: {choice.reason}")

    def _memory_budget(self) -> int:
        if self._asked.memory_budget is not None:
            return parse_bytes("memory_budget", self._asked.memory_budget)
        memory_of = getattr(device_module(self.root_device), "mem_get_info", None)
        if memory_of is None:
            raise ConfigurationError(
                f"`group_size='auto'` takes the device's memory as its budget, and `{self.root_device}` does not tell "
                "how much it has; give `memory_budget`, such as `memory_budget='24GiB'`."
            )
        _, total = memory_of(self.root_device)
        return int(total)

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        refuse_other_wrappers(self.lightning_module, self.precision_plugin)
        if self.settings.master_weights:
            self._look_at_precision(self.lightning_module)
        training = trainer.state.fn == TrainerFn.FITTING
        if training:
            self._get_ready_to_train(trainer)
        elif not self._always_sets_up_itself:
            super().setup(trainer)
            return
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        self.prepare_model()
        if not (training and self.settings.master_weights):
            self.model = self.precision_plugin.convert_module(self.model)
        if training:
            # Optimizers come before the model reaches the device: Adagrad builds the state of all parameters in its
            # constructor, beside them.
            self.setup_optimizers(trainer)
            if self.settings.master_weights:  # which have now been taken from the weights before they are rounded
                self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.model = self._setup_model(self.model)
        self.setup_precision_plugin()
        # Lightning would now move all optimizer state to the device; it stays parked.

    def _get_ready_to_train(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        if self._asked.group_size == "auto" and self._chosen_for != _what_is_planned(trainer, self.lightning_module):
            self.choose_group_size(trainer, self.lightning_module, first_batch(trainer))
        refuse_callbacks_that_freeze(trainer)
        if self.settings.update == "fused":
            refuse_what_needs_gradients(trainer, self.lightning_module, self.precision_plugin)

    def _look_at_precision(self, module: LightningModule) -> None:
        """Find out whether an earlier call has rounded the weights."""
        self._rounded_before = self._to_be_rounded is not None and self._to_be_rounded() is module
        if any(parameter.dtype == torch.float32 for parameter in module.parameters()):
            self._to_be_rounded, self._rounded_before = weakref.ref(module), False

    def _warn_of_rounded_masters(self, module: LightningModule) -> None:
        if self._rounded_before and self._being_loaded is None:  # a checkpoint brings its own
            rank_zero_warn(
                "An earlier `fit`, `validate`, `test` or `predict` has rounded the weights of "
                f"`{class_of(module).__name__}`, and fp32 masters are made of the rounded ones; to have them of the "
                "weights as they were, call `fit` first, or make the module anew before it."
            )

    def prepare_model(self) -> None:
        """Change the model before its precision is set and optimizers are made of it; one device needs nothing."""

    def engine_arguments(self) -> dict[str, Any]:
        """Further arguments of :class:`HiFT`; one device needs none."""
        return {}

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        self._finish()  # optimizers made anew in training are for all parameters, not for the active ones
        super().setup_optimizers(trainer)
        module = self.lightning_module
        assert module is not None
        refuse_optimizers(self.optimizers, module)
        if self._being_loaded is None:
            self._steps_before = 0 if self.restore_checkpoint_after_setup else trainer.global_step
        self.engines = [
            HiFT(
                module,
                optimizer,
                self.settings,
                total_steps=self._total_steps(trainer),
                others=[other for other in self.optimizers if other is not optimizer],
                **self.engine_arguments(),
            )
            for optimizer in self.optimizers
        ]
        self._resume = ExactResume(trainer, self.engines, self.root_device)
        for config in self.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                config.scheduler = self.engine_of(config.scheduler.optimizer).delay(config.scheduler)
        # by `type`, since a delayed scheduler passes for the scheduler
        schedulers: list[Any] = [config.scheduler for config in self.lr_scheduler_configs]
        self._delayed = [scheduler for scheduler in schedulers if type(scheduler) is DelayedLRScheduler]

    def _total_steps(self, trainer: Trainer) -> int | None:
        """Optimizer steps of the run, where the length of a turn depends on them."""
        if self.settings.steps_per_block != ONCE:
            return None
        module = self.lightning_module
        assert module is not None
        if not module.automatic_optimization:
            raise ConfigurationError(
                f"`steps_per_block={ONCE!r}` divides the optimizer steps of the run among the blocks, and of "
                f"`{class_of(module).__name__}`, which optimizes by hand, their number is not known; give a number of "
                "steps a block."
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigurationError(
                f"`steps_per_block={ONCE!r}` divides the optimizer steps of the run among the blocks, and with "
                "`GradientAccumulationScheduler` their number is not known at its start; leave the callback out, or "
                "give a number of steps a block."
            )
        steps = trainer.estimated_stepping_batches
        if steps == float("inf") or steps < 1:  # Lightning gives -1 where a data loader has no length
            raise ConfigurationError(
                f"`steps_per_block={ONCE!r}` divides the optimizer steps of the run among the blocks, and this run has "
                "no end that is known; give the Trainer `max_steps`, or a number of steps a block."
            )
        left = int(steps) - self._steps_before
        return left if left > 0 else int(steps)

    @override
    def divide_steps(self) -> None:
        total_steps = self._total_steps(self._trainer)
        if total_steps is not None:
            for engine in self.engines:
                engine.divide(total_steps)

    @override
    def model_to_device(self) -> None:
        with parameters_stay_themselves(self.root_device):
            super().model_to_device()  # type: ignore[safe-super]

    @override
    def on_train_start(self) -> None:
        # Only now is anything frozen: summaries and optimizer filters have seen every parameter trainable.
        super().on_train_start()
        assert self.lightning_module is not None
        self._warn_of_rounded_masters(self.lightning_module)
        self._begin()
        for engine in self.engines:
            self._announce(engine)
        self._resume.train_starts()
        self._being_loaded = None

    def _begin(self) -> None:
        for engine in self.engines:
            if self.settings.update == "fused":
                value = self._trainer.gradient_clip_val
                engine.clip_value = value if value and value > 0 else None  # Lightning clips with none else
            engine.start()
        self._updates_at_start = [engine.updates for engine in self.engines]
        self._clipping = BlockClipping(self.precision_plugin, self.engines)
        self._clipping.start()
        self._interrupt.start()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self._trainer.training and self.engines:  # before hooks of the module may draw random numbers
            self._resume.batch_starts()
            self._drop_steps_of_replaced_schedulers()
            for engine in self.engines:
                engine.pass_on_held_rates()  # before a callback logs them
        return super().batch_to_device(batch, device, dataloader_idx)

    def _drop_steps_of_replaced_schedulers(self) -> None:
        """Keep a scheduler that a callback has put another one for (`StochasticWeightAveraging`) from going on."""
        stepped: list[Any] = [config.scheduler for config in self.lr_scheduler_configs]
        for scheduler in self._delayed:
            if all(each is not scheduler for each in stepped):
                scheduler.resume(held_steps=0)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if not any(engine.active for engine in self.engines):
            # a run within this one has ended, and the Trainer is back where it was: a search for the learning rate
            self._begin()
            self._resume.forget()
            self._being_loaded = None
        self._resume.batch_starts()
        self._interrupt.release()

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self.engines:  # not in `Trainer.validate` before any `fit`
            self._resume.validation_starts()
        self._interrupt.release()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self.engines:
            self._resume.validation_ends()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._interrupt.release()
        self._warn_of_idle_optimizers()
        self._finish()

    def _warn_of_idle_optimizers(self) -> None:
        for engine, updates in zip(self.engines, self._updates_at_start, strict=False):  # made anew, they may be others
            steps = engine.steps_without_gradient
            if engine.active and steps > 0 and engine.updates == updates and not engine.skipped_steps:
                rank_zero_warn(
                    f"HiFT: the optimizer `{type(engine.optimizer).__name__}` has made no update in this run of "
                    f"{steps} optimizer steps, so its {engine.plan.numel:,} parameters are as they were; return the "
                    "optimizer that steps the weights from `configure_optimizers`, and where you optimize by hand, "
                    "call `self.manual_backward(loss)` before its step."
                )

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if _WANTS_A_FROZEN_WEIGHT in str(exception) and any(engine.active for engine in self.engines):
            add_note(
                exception,
                "Under HiFT only the weights of the active block require a gradient; name those whose gradients the "
                "module asks for itself, as with `torch.autograd.grad`, in `always_active=[...]`.",
            )
        if isinstance(exception, torch.OutOfMemoryError) or replaces_parameters(self.root_device):
            # The traceback's frames hold on to the graph of the step, and so to its activations; and parameters that a
            # graph refers to could not be swapped in `teardown`.
            for link in chain(exception):
                traceback.clear_frames(link.__traceback__)
        self._finish()

    @override
    def teardown(self) -> None:
        self._finish()
        self._being_loaded = None
        with parameters_stay_themselves(self.root_device):
            super().teardown()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        training = [engine for engine in self.engines if engine.active]
        several = len(training) > 1 and "inputs" not in kwargs  # whose loss it is, is known at a step
        if training and not closure_loss.requires_grad and is_overridden("backward", self.lightning_module):
            # the module's own may go back through another tensor; a leaf, so that it may go back through this one too
            closure_loss = closure_loss.detach().requires_grad_()
        if training and not closure_loss.requires_grad:
            # no parameter of the active block took part in the loss, so there is nothing to go back through
            loss = closure_loss.detach()
        else:
            with averaging_later(training if several else []):
                loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if several:
            for engine in training:
                engine.note_backward()
        if len(training) == 1:
            self.after_backward(training[0], closure_loss)
        return loss

    def after_backward(self, engine: HiFT, loss: Tensor) -> None:
        """Tell an engine of a backward pass.

        Args:
            engine: whose optimizer will use the gradients.
            loss: of which backward was called, as it was before a GradScaler scaled it.

        Raises:
            NonfiniteError: see :meth:`HiFT.after_backward`.
        """
        engine.after_backward(loss, scaled=self._scales_gradients)

    @property
    def _scales_gradients(self) -> bool:
        return getattr(self.precision_plugin, "scaler", None) is not None

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | Module | None = None,
        **kwargs: Any,
    ) -> Any:
        engine = self.engine_of(optimizer)
        if not engine.active:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        assert self.lightning_module is not None
        self._interrupt.hold()
        if closure is do_nothing_closure:  # by hand
            # before a GradScaler looks at them, which would skip the step on some ranks only
            engine.average_gradients(scaled=self._scales_gradients)
            if engine.will_skip or not engine.may_have_gradients:
                # clipping by value and a GradScaler would fail on no gradients at all
                if not engine.pass_turn():
                    engine.count_step_without_gradient()
                return None

        def closure_for_reached_block() -> Any:
            result = closure()
            # `None` tells the AMP plugin that there are no gradients to unscale
            return result if engine.has_gradient else None

        try:
            result = super().optimizer_step(optimizer, closure_for_reached_block, model, **kwargs)
            engine.pass_turn()
            return result
        finally:
            engine.settle()  # a step that a GradScaler skipped, or that failed, has not come to the post-hook

    def _finish(self) -> None:
        self._interrupt.stop()
        if self._clipping is not None:
            self._clipping.stop()
            self._clipping = None
        for engine in reversed(self.engines):
            engine.finish()

    def _announce(self, engine: HiFT) -> None:
        plan, rotation, settings = engine.plan, engine.rotation, self.settings
        largest = plan.largest
        rank_zero_info(
            f"HiFT: {len(plan.blocks)} blocks from {len(plan.layers)} layers (group_size={settings.group_size}, "
            f"order={settings.order}); the largest, `{largest.name}`, has {largest.numel:,} of {plan.numel:,} "
            f"parameters ({largest.numel / plan.numel:.0%}); one cycle is {rotation.cycle_length} optimizer steps."
            + ("" if plan.always_active is None else f" {plan.always_active.numel:,} parameters are always active.")
        )
        done = self._trainer.global_step
        to_come = self._trainer.estimated_stepping_batches - done
        if to_come > 0 and engine.updates + to_come < rotation.cycle_length:
            rank_zero_warn(
                f"HiFT: {to_come:.0f} optimizer steps are {'left' if done else 'planned'} and one cycle takes "
                f"{rotation.cycle_length}, so {_unvisited(engine, engine.updates + int(to_come))} of the "
                f"{len(plan.blocks)} blocks will not be trained; train for longer, or use a larger `group_size`"
                + (" or a smaller `steps_per_block`." if rotation.steps_per_block > 1 else ".")
            )


@contextlib.contextmanager
def averaging_later(engines: Sequence[HiFT]) -> Iterator[None]:
    """Within it, backward passes leave gradients whose average over ranks is taken later, at the step at last."""
    before = [engine.averages_gradients for engine in engines]
    for engine in engines:
        engine.averages_gradients = False
    try:
        yield
    finally:
        for engine, averages in zip(engines, before, strict=True):
            engine.averages_gradients = averages


def _unvisited(engine: HiFT, steps: int) -> int:
    return sum(engine.rotation.visits(block.index, steps) == 0 for block in engine.plan.blocks)


def _what_is_planned(trainer: Trainer, module: LightningModule) -> object:
    """What a choice of the group size depends on, but for the batch."""
    steps = trainer.accumulate_grad_batches, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    return trainer.precision, steps, {name: parameter.shape for name, parameter in module.named_parameters()}
