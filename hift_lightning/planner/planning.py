"""What a training step needs, found out by running it: the real strategy, on tensors that have no memory."""

import contextlib
import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR_ALIAS_CONVERSION
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.planner.fake_device import (
    DEVICE,
    FakeAccelerator,
    FakeAutocast,
    fake_batch,
    fake_copy,
    fake_tensors,
)
from hift_lightning.planner.ranks import ALL_LAYERS, PlannedRanks, follow_gathered_weights
from hift_lightning.planner.result import Plan
from hift_lightning.planner.trace import DeviceTrace
from hift_lightning.planner.watch import StepWatch
from hift_lightning.strategies import HiFTDDPStrategy, HiFTFSDP2Strategy, HiFTStrategy
from hift_lightning.strategies.blockwise import BlockwiseTraining
from hift_lightning.strategies.refusals import needs_gradients, not_with_fused

PRECISIONS: dict[str, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def name_of_precision(precision: str | int) -> str:
    """The full name of what Lightning calls `32`, `16` or `bf16` too."""
    return _PRECISION_INPUT_STR_ALIAS_CONVERSION.get(str(precision), str(precision))


def plan(
    module: L.LightningModule,
    strategy: HiFTStrategy | HiFTDDPStrategy | HiFTFSDP2Strategy | Literal["hift", "full"],
    batch: Any,
    *,
    devices: int = 1,
    num_nodes: int = 1,
    precision: str | int = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find out what a training step needs, without a GPU and without weights in memory.

    The user's module and optimizer run under the real Trainer and strategy, on fake tensors of a fake second device:
    a block is updated from made-up gradients first, so that it has optimizer state, and then its real step is followed
    from one op to the next. Attention takes CUDA's fused kernels. What kernels need for themselves
    while they run is not seen, nor what the allocator rounds up.

    Args:
        module: the module to train, on any device, "meta" among them; it is left as it is.
        strategy: a `HiFTStrategy` (whose device and plugins do not matter), or `"hift"` for one with defaults, or
            `"full"` for full fine-tuning; or a strategy of several devices, of which the first rank is planned.
        batch: a training batch of one device; its tensors may be on "meta", since only shapes and dtypes count.
        devices: of each machine.
        num_nodes: machines.
        precision: `32-true`, `bf16-true`, `16-true`, `bf16-mixed` or `16-mixed` (without the scaler), or another of
            Lightning's names for one of them.
        accumulate_grad_batches: batches in a step.
        gradient_clip_val: as for the Trainer.
        gradient_clip_algorithm: as for the Trainer.
        progress: called with the steps done and the steps to do in all.

    Raises:
        ConfigurationError: if the precision cannot be planned, or not with `update="fused"`; if the shape of a tensor
            depends on values while the module trains, or whether there is a loss; if a module that optimizes by hand
            does not step one optimizer in each batch; or if the module does not run on tensors without values.
    """
    if strategy not in ("hift", "full") and not isinstance(strategy, BlockwiseTraining):
        raise ConfigurationError(
            f"`strategy={strategy!r}` cannot be planned; give `HiFTStrategy(...)`, `HiFTDDPStrategy(...)` or "
            '`HiFTFSDP2Strategy(...)`, or "hift" or "full".'
        )
    ranks = None
    if isinstance(strategy, (HiFTDDPStrategy, HiFTFSDP2Strategy)):
        ranks = PlannedRanks(strategy, devices, num_nodes)
    elif (devices, num_nodes) != (1, 1):
        raise ConfigurationError(
            f"`devices={devices}` and `num_nodes={num_nodes}` want a strategy of several devices; give "
            "`HiFTDDPStrategy(...)` or `HiFTFSDP2Strategy(...)`."
        )
    step = StepPlanner(
        module,
        batch,
        name_of_precision(precision),
        accumulate_grad_batches,
        gradient_clip_val,
        gradient_clip_algorithm,
        progress,
        ranks,
    )
    if isinstance(strategy, str):
        return step.plan(None if strategy == "full" else HiFTSettings())
    return step.plan(strategy.settings)


@dataclass(frozen=True)
class StepPlanner:
    """Plans one step again and again with different settings; arguments as in `plan`.

    Raises:
        ConfigurationError: if the precision cannot be planned.
    """

    module: L.LightningModule
    batch: Any
    precision: str = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    progress: Callable[[int, int], None] | None = None
    ranks: PlannedRanks | None = None
    """Where there are several devices."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigurationError(
                f"`precision={self.precision!r}` cannot be planned; choose one of {', '.join(PRECISIONS)}."
            )
        if self.accumulate_grad_batches < 1:
            raise ConfigurationError(
                f"`accumulate_grad_batches={self.accumulate_grad_batches}` is not possible; give 1 or more."
            )

    @property
    def why_not_fused(self) -> str | None:
        """What `update="fused"` does not go with here, in a few words; `None` where it can be used."""
        return needs_gradients(
            self.gradient_clip_val,
            self.gradient_clip_algorithm,
            self.accumulate_grad_batches,
            scaled=self.precision == "16-mixed",
        )

    def plan(self, settings: HiFTSettings | None) -> Plan:
        """Follow a cycle under HiFT, or a step of full fine-tuning where `settings` is `None`.

        With several devices, full fine-tuning has all layers in one block under the same strategy.

        Raises:
            ConfigurationError: as in `plan`.
        """
        if settings is not None and settings.group_size == "auto":
            raise ConfigurationError(
                "`group_size='auto'` is chosen by planning with one number of layers after another: call "
                "`choose(strategy.settings, budget, StepPlanner(module, batch))` of `hift_lightning.planner`, with the "
                "budget in bytes, or give a number."
            )
        if settings is not None and settings.update == "fused" and self.why_not_fused:
            raise ConfigurationError(not_with_fused(self.why_not_fused))
        if settings is None and self.ranks is not None:
            settings = HiFTSettings(group_size=ALL_LAYERS, offload="none")
        dtype = PRECISIONS[self.precision]
        mixed = self.precision.endswith("mixed")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_info())
            if self.ranks is not None:
                stack.enter_context(self.ranks.process_group())
            stack.enter_context(fake_tensors())
            trace = stack.enter_context(DeviceTrace(DEVICE, _vocabulary(self.module)))
            if self.ranks is not None:
                stack.enter_context(follow_gathered_weights(trace))
            with _told_of(self.module):
                module = fake_copy(self.module, None if mixed else dtype)
            trace.mark([*module.parameters(), *module.buffers()], "weights")
            watch = StepWatch(
                trace,
                autocast=FakeAutocast(dtype) if mixed else None,
                micro_batches=self.accumulate_grad_batches,
                progress=self.progress,
            )
            stack.callback(watch.close)
            precision = _MixedPrecision("bf16-mixed", "cpu") if mixed else _true_precision(self.precision)
            trainer = L.Trainer(
                accelerator=FakeAccelerator(),
                strategy=_strategy(settings, self.ranks),
                devices=1 if self.ranks is None else self.ranks.devices,
                num_nodes=1 if self.ranks is None else self.ranks.num_nodes,
                use_distributed_sampler=False,
                plugins=[precision] if self.ranks is None else [precision, self.ranks.environment()],
                callbacks=[watch],
                max_steps=_MOST_STEPS,
                min_steps=_MOST_STEPS,  # so that a module which sets `trainer.should_stop` ends nothing
                limit_val_batches=0,
                logger=DummyLogger(),  # which a module may write to
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                accumulate_grad_batches=self.accumulate_grad_batches,
                gradient_clip_val=self.gradient_clip_val,
                gradient_clip_algorithm=self.gradient_clip_algorithm,
            )
            data = getattr(self.module._trainer, "datamodule", None)
            trainer.datamodule = None if data is None else _only_asked(data)  # type: ignore[attr-defined]
            # none are validated, but who says nothing about it is warned
            val_batches: list[Any] | None = [] if is_overridden("validation_step", module) else None
            with _told_of(self.module):
                trainer.fit(module, _Forever(fake_batch(self.batch)), val_batches)
        blocks, always = watch.blocks(), watch.always_active
        return Plan(
            numel=sum(p.numel() for p in self.module.parameters()),
            trained_numel=sum(block.numel for block in blocks) + (0 if always is None else always.numel),
            blocks=blocks,
            always_active_parked_bytes=0 if always is None else always.parked_bytes,
            ranks=1 if self.ranks is None else self.ranks.count,
            ranks_of_machine=1 if self.ranks is None else self.ranks.devices,
        )


_MOST_STEPS = 10**6


class _Forever:
    """A training set of one batch, over and over; Lightning cannot ask for its length, which it would reduce."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat(self.batch)


class _MixedPrecision(MixedPrecision):
    """Mixed precision whose autocast is `FakeAutocast`, which stays on in backward for what is computed anew there."""

    @override
    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        yield


def _true_precision(precision: str) -> Precision:
    return Precision() if precision == "32-true" else HalfPrecision(precision)  # type: ignore[arg-type]


def _strategy(settings: HiFTSettings | None, ranks: PlannedRanks | None) -> Strategy:
    if settings is None:
        return SingleDeviceStrategy(device=DEVICE)
    # each block has its turn once; parked state counts as in host memory, wherever it will lie
    offload = settings.offload if settings.offload == "none" else "cpu"
    planned = dataclasses.replace(settings, steps_per_block=1, offload=offload)
    if ranks is not None:
        return ranks.planned_strategy(planned)
    return HiFTStrategy(device=DEVICE, **vars(planned))


def _vocabulary(module: nn.Module) -> int | None:
    return max((part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)), default=None)


def _only_asked(data: L.LightningDataModule) -> L.LightningDataModule:
    """A data module that tells a module what it asks for and, since its data would be fake, makes none."""
    copied = copy.copy(data)
    for hook in ("prepare_data", "setup", "teardown", "on_exception"):
        setattr(copied, hook, _nothing)
    copied._log_hyperparams = False  # as the module's
    return copied


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


@contextlib.contextmanager
def _told_of(module: nn.Module) -> Iterator[None]:
    """Within it, errors of a module that cannot be planned say so in a sentence."""
    name = type(module).__name__
    try:
        yield
    except (ConfigurationError, MisconfigurationException):
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ConfigurationError(
            f"`{name}` makes a tensor whose shape depends on values (`{error.func}`), and there are no values while "
            "planning; use a mask of full shape instead of boolean indexing, or give a number for `group_size`."
        ) from error
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigurationError(
            f"`{name}` has failed while a step of it was planned, on tensors without values ({told}); mend it if it "
            "fails in training too, and otherwise train with a number for `group_size`."
        ) from error


@contextlib.contextmanager
def _no_info() -> Iterator[None]:
    """Within it, the inner Trainer does not tell of devices and progress; warnings are told."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
