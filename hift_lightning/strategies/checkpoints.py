"""What a HiFT strategy writes into a checkpoint, and how a run goes on from one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from hift_lightning.checkpoint_io import StreamingCheckpointIO
from hift_lightning.engine.compatibility import check_weights
from hift_lightning.engine.errors import ConfigurationError, ParkedStateError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.masters import state_dict_with_masters, take_wider
from hift_lightning.strategies.exact_resume import ExactResume

if TYPE_CHECKING:
    _Base = Strategy
else:
    _Base = object


_RESUME_END = "_CheckpointConnector.resume_end"
"""The barrier at which all ranks of a Trainer have loaded all of a checkpoint."""


class BlockwiseCheckpoints(_Base):
    """Mixed into a Lightning strategy, it saves and loads the state of its engines without putting it on the device."""

    engines: list[HiFT]
    """One engine an optimizer; empty before ``fit``."""
    _resume: ExactResume
    _being_loaded: _PATH | None = None
    """The checkpoint that a run goes on from, until training has begun."""
    _is_loaded = False
    """Whether all of it is in place."""
    _steps_before: int = 0
    """Optimizer steps of the run before the rotation began: of an earlier `fit`, without HiFT, or by another plan."""

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

        See :meth:`HiFT.master_state_dict <hift_lightning.engine.hift.HiFT.master_state_dict>`. With
        ``shard_parked_state`` all ranks of a machine call it together, and the first has all masters; under
        ``hift_fsdp2`` all ranks do, and the first has all weights.

        Raises:
            MisconfigurationException: before ``fit`` has set the training up.
        """
        if self.lightning_module is None or not self.engines:
            raise MisconfigurationException(
                "`master_state_dict()` was called before `Trainer.fit`, and masters are made at the start of it; call "
                "it later, or `state_dict()` of the module."
            )
        masters = {parameter: master for engine in self.engines for parameter, master in engine.masters().items()}
        return state_dict_with_masters(self.lightning_module, masters)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.engine_of(optimizer).residency.synchronize()
        return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if self.engines or self._being_loaded is not None:
            try:
                self._refuse_half_loaded()
                self._complete(checkpoint)
            except ParkedStateError as error:
                if not self._ending:
                    raise
                # it must not hide the error that ends the run
                rank_zero_warn(f"No checkpoint is saved of where the run has ended: {error}")
                return
        self._write(checkpoint, filepath, storage_options)

    def _write(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None) -> None:
        """Save a complete checkpoint; one with all of it in this process goes Lightning's way."""
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _complete(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hift"] = {"steps_before": self._steps_before}
        self._make_ready(checkpoint)
        if "current_model_state" in checkpoint and self._resume.within_validation:
            # `WeightAveraging` has exchanged weights and averages for the validation, and takes each for the other
            averages, weights = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = averages, weights
        checkpoint["hift"]["engines"] = [engine.state_dict() for engine in self.engines]

    def _refuse_half_loaded(self) -> None:
        if self._being_loaded is None:
            return
        if self._ending:
            raise ParkedStateError(f"it has ended before all of `{self._being_loaded}` was loaded.")
        if not self._is_loaded:
            raise ParkedStateError(
                f"A checkpoint is saved before all of `{self._being_loaded}` is loaded; save it later, and leave out "
                "what saves one at the start of `fit` (`LearningRateFinder`) where a run goes on."
            )

    def _make_ready(self, checkpoint: dict[str, Any]) -> None:
        """Find out whether a run can go on from what is in memory, and write down where.

        Raises:
            ParkedStateError: if it cannot.
        """
        for engine in self.engines:
            engine.residency.check_files()
            if (told := engine.half_updated) is None:
                continue
            if self._ending or engine.active:
                raise ParkedStateError(told)
            rank_zero_warn(f"A checkpoint is saved of weights that are updated in part: {told}")
        if not self._resume.complete(checkpoint) and "optimizer_states" in checkpoint:  # else it is of weights alone
            if self._ending:
                raise ParkedStateError(
                    "The run stopped between an update and the end of its batch, so weights and the Trainer's counters "
                    "do not belong together; go on from the last checkpoint before it."
                )
            raise ParkedStateError(
                "A checkpoint is saved between an update and the end of its batch, where weights and the Trainer's "
                "counters do not belong together; save it in `on_train_batch_end`, or with `weights_only=True`."
            )

    @property
    def _ending(self) -> bool:
        """Whether callbacks are being told of the error that ends the run."""
        unfinished = self._being_loaded is not None or any(engine.active for engine in self.engines)
        return self._trainer.state.status == TrainerStatus.INTERRUPTED and unfinished

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = self._read(checkpoint_path, weights_only is not False)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ConfigurationError(
                f"`{checkpoint_path}` is no checkpoint of a Trainer: it has no `state_dict`; give the path of a file "
                "that `Trainer.save_checkpoint` or `ModelCheckpoint` wrote."
            )
        if self._goes_on_from(checkpoint_path):
            if "optimizer_states" not in checkpoint:
                raise ConfigurationError(
                    f"`{checkpoint_path}` has weights alone (`save_weights_only`), and a run goes on from a whole "
                    "checkpoint; give one, or begin anew from these weights (`load_from_checkpoint`; of the "
                    "application, `hift-export` and `model.pretrained`)."
                )
            self._being_loaded, self._is_loaded = checkpoint_path, False
            saved = checkpoint.get("hift")
            self._steps_before = checkpoint["global_step"] if saved is None else saved["steps_before"]
        return checkpoint

    def _goes_on_from(self, checkpoint_path: _PATH) -> bool:
        """Whether it is the Trainer that loads it, to train, and not a callback of the user's or a script."""
        state = self._trainer.state
        starts = state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING
        return starts and checkpoint_path == self._trainer.ckpt_path and not any(each.active for each in self.engines)

    @override
    def barrier(self, name: str | None = None) -> None:
        super().barrier(name)  # type: ignore[safe-super]
        if name == _RESUME_END:
            self._is_loaded = True

    def _read(self, checkpoint_path: _PATH, weights_only: bool) -> dict[str, Any]:
        """Load what :meth:`_write` saved."""
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        check_weights(self.lightning_module, checkpoint["state_dict"], strict)
        if isinstance(self.precision_plugin, DoublePrecision):  # otherwise they would be rounded to 32 bits on the way
            self.precision_plugin.convert_module(self.lightning_module)
        super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get("hift")
        positions = [None] * len(self.engines) if saved is None else saved["engines"]
        # a module may empty the list, to begin with new optimizers
        states = checkpoint["optimizer_states"] or [None] * len(positions)
        if len(states) != len(self.engines):
            raise ConfigurationError(
                f"The checkpoint was made with {len(states)} optimizers and this run has {len(self.engines)}; "
                "resume with the optimizers that it was made with."
            )
        if self._being_loaded is not None and self.restore_checkpoint_after_setup:
            self.divide_steps()  # before it was read, the engines could not know how many had been done
        for engine, position, state in zip(self.engines, positions, states, strict=True):
            if state is not None:
                engine.check_optimizer_state_dict(state, position)
            if position is not None:
                engine.check_state_dict(position)
        for engine, position, state in zip(self.engines, positions, states, strict=True):
            if state is not None:
                if engine.updates == 0:  # and not where a run goes back to where it was, as after a search for the rate
                    _tell_of_other_values(engine.optimizer, state["param_groups"])
                engine.load_optimizer_state_dict(state, position)
            if position is not None:  # otherwise made without HiFT: the rotation begins here
                if not checkpoint["lr_schedulers"]:  # then the steps that were held are of none of this run's
                    position = {**position, "held_lr_steps": [], "lr_cycles": []}
                engine.load_state_dict(position)
                if not engine.has_plan_of(position):
                    self._steps_before = checkpoint["global_step"]
                    self.divide_steps()
                    rank_zero_info(
                        f"HiFT: the checkpoint was made with another plan, after {position['updates']} updates; with "
                        "`resume_plan=rebuild` its weights, masters and optimizer state carry over, and the rotation "
                        f"begins with block `{engine.block.name}`."
                    )
            # what training goes on from, where the checkpoint's weights are averages (`WeightAveraging`)
            weights = checkpoint.get("current_model_state", checkpoint.get("state_dict", {}))
            masters = {} if position is None else position["masters"]
            take_wider(engine.residency, engine.trained, weights, masters)
        if saved is not None:
            self._resume.load(saved["resume"])

    def divide_steps(self) -> None:
        """Where each block has one turn, make the turns of the steps that are left after those before the rotation."""
        raise NotImplementedError

    def engine_of(self, optimizer: Optimizer) -> HiFT:
        """The engine that rotates this optimizer.

        Args:
            optimizer: one that ``configure_optimizers`` returned, or Lightning's wrapper of it.

        Raises:
            ConfigurationError: for any other.
        """
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        engine = next((engine for engine in self.engines if engine.optimizer is optimizer), None)
        if engine is None:
            raise ConfigurationError(
                f"HiFT has no blocks for the optimizer `{type(optimizer).__name__}`, which is none that "
                "`configure_optimizers` returned when training began; instead of replacing `trainer.optimizers` call "
                "`trainer.strategy.setup_optimizers(trainer)`, where `configure_optimizers` returns the new one."
            )
        return engine

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer


def _tell_of_other_values(optimizer: Optimizer, saved_groups: Sequence[dict[str, Any]]) -> None:
    """Warn where a run was built with another rate, weight decay, … than the checkpoint's, which it goes on with.

    The rate is that which a scheduler began with: one that nothing schedules may have been changed by hand.

    Args:
        optimizer: before the checkpoint is loaded.
        saved_groups: the checkpoint's param groups.
    """
    others: dict[tuple[str, str], None] = {}
    for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        moved = ("betas", "momentum") if "max_momentum" in saved else ()  # by a schedule
        for key in ("initial_lr", "weight_decay", "betas", "momentum", "eps"):
            if key not in group or key not in saved or key in moved:
                continue
            here, there = group[key], saved[key]
            here, there = (tuple(each) if isinstance(each, (list, tuple)) else each for each in (here, there))
            if here != there:
                others[f"`{key}={here}`", f"`{key}={there}`"] = None
    if others:
        rank_zero_warn(
            f"This run was built with {', '.join(here for here, _ in others)} and the checkpoint's param groups have "
            f"{', '.join(there for _, there in others)}, which the run goes on with; to train with other values, "
            "begin anew from the checkpoint's weights."
        )
