"""What every HiFT strategy does, whatever the number of devices: the hooks between Lightning and the engine."""

import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer, _MockOptimizer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import LRSchedulerConfig
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.errors import ConfigurationError, ParkedStateError, chain
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.lr import DelayedLRScheduler
from hift_lightning.engine.partition import partition
from hift_lightning.engine.report import Report
from hift_lightning.engine.residency import (
    parameters_stay_themselves,
    replaces_parameters,
    state_dict_with_masters,
)
from hift_lightning.engine.resume import check_weights
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.engine.streams import device_module
from hift_lightning.engine.update import parse_bytes
from hift_lightning.strategies.first_batch import first_batch
from hift_lightning.strategies.interrupts import PatientInterrupt
from hift_lightning.strategies.resume import ExactResume

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


class BlockwiseTraining(_Base):
    """Mixed into a Lightning strategy, it trains one block of layers at a time.

    The engine drives itself by the optimizer's step hooks; here it is only built, started and ended at the right
    moments, and told of what optimizers do not see (a backward pass that the active block took no part in).
    """

    settings: HiFTSettings
    engines: list[HiFT]
    """One engine an optimizer; empty before ``fit``."""
    _interrupt: PatientInterrupt
    _resume: ExactResume

    @property
    def hift(self) -> HiFT | None:
        """The engine of the first optimizer, or ``None`` before ``fit``."""
        return self.engines[0] if self.engines else None

    def report(self) -> Report:
        """What each block is, how often it has been updated, and where its optimizer state is now.

        Raises:
            MisconfigurationException: before ``fit`` has set the training up.
        """
        if self.hift is None:
            raise MisconfigurationException(
                "`report()` was called before `Trainer.fit`, and the blocks are cut at the start of it; call it "
                "later, or print `hift_lightning.engine.partition.partition(model)`."
            )
        return self.hift.report()

    def check_patterns(self, model: Module) -> None:
        """Find out before any long work whether each pattern of ``frozen`` and ``layers`` matches a parameter.

        ``fit`` does so too, when the module is complete for certain.

        Args:
            model: a complete model.

        Raises:
            ConfigurationError: if one matches nothing.
        """
        partition(model, layers=self.settings.layers, frozen=self.settings.frozen)

    def choose_group_size(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Choose the largest group of layers that fits ``memory_budget``, and what else that takes, by planning.

        Under ``group_size="auto"``, ``fit`` does so too, with the first training batch. Call it before where another
        batch is larger.

        Args:
            trainer: whose precision, accumulation and clipping hold.
            module: a complete module, on any device, "meta" among them.
            batch: a training batch as large as any.

        Raises:
            ConfigurationError: if nothing fits, and what the planner raises.
        """
        from hift_lightning.planner import StepPlanner, choose  # stands above the strategies that it plans

        step = StepPlanner(
            module,
            batch,
            trainer.precision,
            trainer.accumulate_grad_batches,
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
        )
        rank_zero_info("HiFT: looking for the largest `group_size` that fits.")
        choice = choose(self.settings, self._memory_budget(), step)
        self.settings = choice.settings
        rank_zero_info(f"HiFT: {choice.reason}")

    def _memory_budget(self) -> int:
        if self.settings.memory_budget is not None:
            return parse_bytes("memory_budget", self.settings.memory_budget)
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
        if trainer.state.fn != TrainerFn.FITTING:
            super().setup(trainer)
            return
        if self.settings.group_size == "auto":
            assert self.lightning_module is not None
            self.choose_group_size(trainer, self.lightning_module, first_batch(trainer))
        _refuse_callbacks_that_freeze(trainer)
        if self.settings.update == "fused":
            _refuse_what_needs_gradients(trainer, self.precision_plugin)
        assert self.accelerator is not None
        assert self.model is not None
        self.accelerator.setup(trainer)
        if not self.settings.master_weights:
            self.model = self.precision_plugin.convert_module(self.model)
        # Optimizers come before the model reaches the device: Adagrad builds the state of all parameters in its
        # constructor, beside them.
        self.setup_optimizers(trainer)
        if self.settings.master_weights:  # which have now been taken from the weights before they are rounded
            self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self.model = self._setup_model(self.model)
        self.setup_precision_plugin()
        # Lightning would now move all optimizer state to the device; it stays parked.

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = self.lightning_module
        assert module is not None
        _refuse_optimizers(self.optimizers, module)
        self.engines = [
            HiFT(
                module,
                optimizer,
                self.settings,
                others=[other for other in self.optimizers if other is not optimizer],
            )
            for optimizer in self.optimizers
        ]
        self._resume = ExactResume(trainer, self.engines, self.root_device)
        for config in self.lr_scheduler_configs:
            if config.interval == "step" and not config.reduce_on_plateau:
                config.scheduler = self.engine_of(config.scheduler.optimizer).delay(config.scheduler)

    @override
    def model_to_device(self) -> None:
        with parameters_stay_themselves(self.root_device):
            super().model_to_device()  # type: ignore[safe-super]

    @override
    def on_train_start(self) -> None:
        # Only now is anything frozen: summaries and optimizer filters have seen every parameter trainable.
        super().on_train_start()
        for engine in self.engines:
            if self.settings.update == "fused":
                engine.clip_value = self._trainer.gradient_clip_val
            engine.start()
            self._announce(engine)
        self._interrupt.start()
        self._resume.train_starts()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
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
        self._finish()

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if isinstance(exception, torch.OutOfMemoryError) or replaces_parameters(self.root_device):
            # The traceback's frames hold on to the graph of the step, and so to its activations; and parameters that a
            # graph refers to could not be swapped in `teardown`.
            for link in chain(exception):
                traceback.clear_frames(link.__traceback__)
        self._finish()

    @override
    def teardown(self) -> None:
        self._finish()
        with parameters_stay_themselves(self.root_device):
            super().teardown()

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        training = [engine for engine in self.engines if engine.active]
        if not closure_loss.requires_grad and training:
            # no parameter of the active block took part in the loss, so there is nothing to go back through
            loss = closure_loss.detach()
        else:
            loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        if len(training) == 1:  # with several optimizers, which one a loss is for is known at its step only
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
        engine.after_backward(loss, scaled=getattr(self.precision_plugin, "scaler", None) is not None)

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
        if engine.will_skip and not self.lightning_module.automatic_optimization:
            engine.pass_turn()
            return None

        self._interrupt.hold()
        clip_val = self._trainer.gradient_clip_val

        def closure_for_reached_block() -> Any:
            result = closure()
            if engine.has_gradient:
                return result
            # torch's clipping fails on no gradients at all; `None` tells the AMP plugin that there are none to unscale
            self._trainer.gradient_clip_val = None
            return None

        try:
            result = super().optimizer_step(optimizer, closure_for_reached_block, model, **kwargs)
            engine.pass_turn()
            return result
        finally:
            self._trainer.gradient_clip_val = clip_val
            engine.settle()  # a step that a GradScaler skipped, or that failed, has not come to the post-hook

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """The user's, and otherwise one that needs no memory of its own and checks what it loads."""
        if self._checkpoint_io is None:
            self._checkpoint_io = StreamingCheckpointIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):  # keeps what it was made with
            self._checkpoint_io.checkpoint_io = StreamingCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    def master_state_dict(self) -> dict[str, Any]:
        """The module's state dict, with the fp32 master in place of every weight that has one.

        See :meth:`HiFT.master_state_dict <hift_lightning.engine.hift.HiFT.master_state_dict>`.

        Raises:
            MisconfigurationException: before ``fit`` has set the training up.
        """
        if self.lightning_module is None or not self.engines:
            raise MisconfigurationException(
                "`master_state_dict()` was called before `Trainer.fit`, and masters are made at the start of it; call "
                "it later, or `state_dict()` of the module."
            )
        return state_dict_with_masters(self.lightning_module, [engine.residency for engine in self.engines])

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.engine_of(optimizer).residency.synchronize()
        return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self.engines:
            try:
                self._complete(checkpoint)
            except ParkedStateError as error:
                if not self._ending:
                    raise
                # it must not hide the error that ends the run
                rank_zero_warn(f"No checkpoint is saved of where the run has ended: {error}")
                return
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _complete(self, checkpoint: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.residency.check_files()
            if (told := engine.half_updated) is None:
                continue
            if self._ending or engine.active:
                raise ParkedStateError(told)
            rank_zero_warn(f"A checkpoint is saved of weights that are updated in part: {told}")
        checkpoint["hift"] = {
            "engines": [engine.state_dict() for engine in self.engines],
            "held_lr_steps": [
                delayed.held_steps if delayed else 0 for delayed in map(_delayed, self.lr_scheduler_configs)
            ],
        }
        if not self._resume.complete(checkpoint):
            raise ParkedStateError(
                "The run stopped between an update and the end of its batch, so weights and the Trainer's counters do "
                "not belong together; go on from the last checkpoint before it."
            )

    @property
    def _ending(self) -> bool:
        """Whether callbacks are being told of the error that ends the run."""
        return self._trainer.state.status == TrainerStatus.INTERRUPTED and any(engine.active for engine in self.engines)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only is not False)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ConfigurationError(
                f"`{checkpoint_path}` is no checkpoint of a Trainer: it has no `state_dict`; give the path of a file "
                "that `Trainer.save_checkpoint` or `ModelCheckpoint` wrote."
            )
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        check_weights(self.lightning_module, checkpoint["state_dict"], strict)
        if isinstance(self.precision_plugin, DoublePrecision):  # otherwise they would be rounded to 32 bits on the way
            self.precision_plugin.convert_module(self.lightning_module)
        super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.engines):
            raise ConfigurationError(
                f"The checkpoint has the state of {len(states)} optimizers and this run has {len(self.engines)}; "
                "resume with the optimizers that it was made with."
            )
        saved = checkpoint.get("hift")
        positions = [None] * len(states) if saved is None else saved["engines"]
        for engine, position, state in zip(self.engines, positions, states, strict=True):
            engine.check_state_dict(position, state)
        for engine, position, state in zip(self.engines, positions, states, strict=True):
            engine.load_optimizer_state_dict(state, position and position.get("parked_dtype"))
            if position is not None:  # otherwise made without HiFT: the rotation begins here
                engine.load_state_dict(position)
                if not engine.has_plan_of(position):
                    rank_zero_info(
                        f"HiFT: the checkpoint was made with another plan, after {position['updates']} updates; with "
                        "`resume_plan=rebuild` its weights, masters and optimizer state carry over, and the rotation "
                        f"begins with block `{engine.block.name}`."
                    )
        if saved is None:
            return
        # like Lightning, which leaves a scheduler as it is that the checkpoint knows nothing of
        for config, held_steps in zip(self.lr_scheduler_configs, saved["held_lr_steps"], strict=False):
            if delayed := _delayed(config):
                delayed.resume(held_steps)
        if "resume" in saved:  # checkpoints of earlier versions have none
            self._resume.load(saved["resume"])

    def engine_of(self, optimizer: Optimizer) -> HiFT:
        """The engine that rotates this optimizer.

        Args:
            optimizer: one that ``configure_optimizers`` returned, or Lightning's wrapper of it.
        """
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return next(engine for engine in self.engines if engine.optimizer is optimizer)

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _finish(self) -> None:
        self._interrupt.stop()
        for engine in reversed(self.engines):
            engine.finish()

    def _announce(self, engine: HiFT) -> None:
        plan, rotation, settings = engine.plan, engine.rotation, self.settings
        largest = plan.largest
        rank_zero_info(
            f"HiFT: {len(plan.blocks)} blocks from {len(plan.layers)} layers (group_size={settings.group_size}, "
            f"order={settings.order}); the largest, `{largest.name}`, has {largest.numel:,} of {plan.numel:,} "
            f"parameters ({largest.numel / plan.numel:.0%}); one cycle is {rotation.cycle_length} optimizer steps."
        )
        steps = self._trainer.estimated_stepping_batches
        if engine.updates < steps < rotation.cycle_length:
            rank_zero_warn(
                f"HiFT: {steps:.0f} optimizer steps are planned and one cycle takes {rotation.cycle_length}, so "
                f"{_unvisited(engine, int(steps))} of the {len(plan.blocks)} blocks will not be trained; train for "
                "longer, or use a larger `group_size` or a smaller `steps_per_block`."
            )


def _delayed(config: LRSchedulerConfig) -> DelayedLRScheduler | None:
    scheduler: object = config.scheduler
    return scheduler if isinstance(scheduler, DelayedLRScheduler) else None


def _unvisited(engine: HiFT, steps: int) -> int:
    return sum(engine.rotation.visits(block.index, steps) == 0 for block in engine.plan.blocks)


def _refuse_callbacks_that_freeze(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"The callback `{type(callback).__name__}` freezes and unfreezes layers and adds param groups while "
                "training, and HiFT decides at the start which block requires a gradient when; remove the callback, "
                "or name what is never to be trained in `HiFTStrategy(frozen=[...])`."
            )


def _refuse_what_needs_gradients(trainer: Trainer, precision: Precision) -> None:
    norm = trainer.gradient_clip_val and trainer.gradient_clip_algorithm in (None, GradClipAlgorithmType.NORM)
    windows = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if norm:
        what = f"`gradient_clip_val={trainer.gradient_clip_val}` clips by norm"
    elif trainer.accumulate_grad_batches > 1 or windows:
        what = "gradients are accumulated over batches"
    elif getattr(precision, "scaler", None) is not None:
        what = f"`precision={precision.precision!r}` has a GradScaler that looks for overflows"
    else:
        return
    raise MisconfigurationException(
        f"`update='fused'` frees each gradient inside backward, and {what}, which needs all of them after it; use "
        "`update='streamed'`, or clip by value without accumulation in fp32 or bf16."
    )


def _refuse_optimizers(optimizers: list[Optimizer], module: LightningModule) -> None:
    if not optimizers or any(isinstance(optimizer, _MockOptimizer) for optimizer in optimizers):
        raise MisconfigurationException(
            f"`{type(module).__name__}.configure_optimizers` returned no optimizer, so HiFT has nothing to rotate; "
            "return one, or train without `strategy='hift'`."
        )
    seen: set[Tensor] = set()
    for optimizer in optimizers:
        parameters = {p for group in optimizer.param_groups for p in group["params"]}
        if seen & parameters:
            raise MisconfigurationException(
                f"{len(seen & parameters)} parameters are in more than one optimizer of "
                f"`{type(module).__name__}.configure_optimizers`, so their block would have two turns at once; give "
                "each parameter to one optimizer."
            )
        seen |= parameters
