"""What a training step needs, found out by running it: the real strategy, on tensors that have no memory."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.partition import Block
from hift_lightning.engine.report import BlockReport
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.engine.shards import local
from hift_lightning.planner.fake_device import (
    DEVICE,
    FakeAccelerator,
    FakeAutocast,
    fake_batch,
    fake_copy,
    fake_tensors,
)
from hift_lightning.planner.ranks import ALL_LAYERS, PlannedRanks, follow_gathered_weights
from hift_lightning.planner.result import BlockPlan, Plan, Stretch
from hift_lightning.planner.trace import DeviceTrace
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


def plan(
    module: L.LightningModule,
    strategy: HiFTStrategy | HiFTDDPStrategy | HiFTFSDP2Strategy | Literal["hift", "full"],
    batch: Any,
    *,
    devices: int = 1,
    num_nodes: int = 1,
    precision: str = "32-true",
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
        precision: Lightning's name of it: `32-true`, `bf16-true`, `16-true`, `bf16-mixed` or `16-mixed` (without the
            scaler).
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
        precision,
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
            watch = _Watch(
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
            "planning; use a mask of full shape instead of boolean indexing."
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


class _Step(NamedTuple):
    block: int
    made_up: bool
    """Whether its gradients are made up, so that the state of the block exists; otherwise it is followed."""


class _Watch(Callback):
    """Decides which step comes next, tells the trace where it is, and gathers what it saw.

    Args:
        trace: the trace.
        autocast: entered for forward and backward.
        micro_batches: batches in a step.
        progress: as in `plan`.
    """

    def __init__(
        self,
        trace: DeviceTrace,
        autocast: FakeAutocast | None,
        micro_batches: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._trace, self._autocast, self._progress = trace, autocast, progress
        self._micro_batches = micro_batches
        self._autocasting = contextlib.ExitStack()
        self._steps_before = 0
        self._stretches = [Stretch([0])]
        self._due = [_Step(0, made_up=True), _Step(0, made_up=False)]
        self._done = 0
        self._seen: dict[int, BlockPlan] = {}
        self.always_active: BlockReport | None = None
        """What is trained in every step."""

    def close(self) -> None:
        """Leave autocast, where an error has ended a forward pass."""
        self._autocasting.close()

    def blocks(self) -> tuple[BlockPlan, ...]:
        """What each block needs, in the order of their turns."""
        plans = {index: plan for stretch in self._stretches for index, plan in stretch.fill(self._seen).items()}
        return tuple(dataclasses.replace(plans[index], name=self._names[index]) for index in self._turns)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def mark_gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._trace.mark([parameter.grad], "gradients")

        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(mark_gradient)  # type: ignore[no-untyped-call]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not pl_module.automatic_optimization and len(trainer.optimizers) > 1:
            raise ConfigurationError(
                f"`{type(pl_module).__name__}` steps {len(trainer.optimizers)} optimizers by hand, and which of them "
                "in which step is not known while planning; train with a number for `group_size`."
            )
        for config in trainer.lr_scheduler_configs:  # rates do not change what a step needs, and more steps are made
            config.interval = "never"
            setattr(config.scheduler, "step", _nothing)  # noqa: B010 (a method, as mypy sees it)
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in trainer.optimizers):
            if group.get("foreach", True) is None and not group.get("fused") and not isinstance(group["lr"], Tensor):
                group["foreach"] = True  # what torch takes on CUDA, but not for fake tensors
        self._training_step = pl_module.training_step  # FSDP2 has wrapped it
        self._trace.mark(map(local, pl_module.parameters()), "weights")  # which FSDP2 has made anew
        engine = _engine(trainer)
        if engine is None:
            self._turns, self._names = [0], ["all"]
            return
        residency = engine.residency
        for method, role in (("load", "optimizer state"), ("load_master", "masters"), ("window", "window")):
            setattr(residency, method, self._with_role(getattr(residency, method), role))
        self._turns, self._names = list(engine.rotation.turns), [block.name for block in engine.plan.blocks]
        kinds = [_kind(pl_module, block) for block in engine.plan.blocks]
        self._stretches = [Stretch(list(alike)) for _, alike in itertools.groupby(range(len(kinds)), kinds.__getitem__)]
        followed = [index for stretch in self._stretches for index in stretch.to_run({})]
        # state that is parked takes no room on the device, so then only blocks that are followed need theirs
        with_state = followed if engine.settings.offload != "none" else self._turns
        self._due = [*(_Step(i, made_up=True) for i in with_state), *(_Step(i, made_up=False) for i in followed)]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = self._due[0]
        self._trace.phase = "forward"
        if batch_idx % self._micro_batches == 0:
            engine = _engine(trainer)
            if engine is not None:
                engine.move_to(self._turns.index(step.block))
                self._moved_before = engine.residency.bytes_paged_in, engine.residency.bytes_parked
            if not step.made_up:
                self._trace.begin_step()
        self._steps_before = trainer.global_step
        if step.made_up:
            made_up = _made_up_loss if pl_module.automatic_optimization else _made_up_step
            pl_module.training_step = functools.partial(made_up, pl_module)  # type: ignore[method-assign]
            return
        pl_module.training_step = self._training_step  # type: ignore[method-assign]
        if self._autocast is not None:
            self._autocasting.enter_context(self._autocast)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._trace.phase = "backward"
        if self._autocast is not None:
            self._autocast.forget_casts()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._autocast is not None:
            self._autocast.forget_casts()
        self._autocasting.close()
        gradients = [local(p.grad) for p in pl_module.parameters() if p.grad is not None]
        self._trace.mark(gradients, "gradients")
        self._trace.phase = "update"

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check_step(trainer, pl_module, outputs)
        if (batch_idx + 1) % self._micro_batches != 0:
            return
        for optimizer in trainer.optimizers:
            leaves = tree_leaves(list(optimizer.state.values()))
            self._trace.mark(filter(torch.is_tensor, leaves), "optimizer state")
        step = self._due.pop(0)
        if not step.made_up:
            self._seen[step.block] = self._block_plan(_engine(trainer), pl_module, step.block)
        if not self._due:
            more = [index for stretch in self._stretches for index in stretch.to_run(self._seen)]
            self._due = [_Step(index, made_up) for index in more for made_up in (True, False)]
            if not more:
                trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._done + len(self._due))

    def _check_step(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any) -> None:
        name = type(module).__name__
        if module.automatic_optimization and not outputs:
            raise ConfigurationError(
                f"`{name}` had no loss while planning, where each number that is read from a tensor is 1, so that "
                "`torch.isnan(loss)` holds; leave such steps out with `nonfinite='skip'`, or train with a number for "
                "`group_size`."
            )
        if not module.automatic_optimization and trainer.global_step != self._steps_before + 1:
            raise ConfigurationError(
                f"`{name}` does not step its optimizer once in each batch, as where it accumulates gradients by hand, "
                "and a step is planned of one batch; train with a number for `group_size`."
            )

    def _block_plan(self, engine: HiFT | None, module: L.LightningModule, index: int) -> BlockPlan:
        trace = self._trace.end_step()
        if engine is None:
            numel = sum(p.numel() for p in module.parameters() if p.requires_grad)
            return BlockPlan(self._names[0], numel, trace)
        block, residency, report = engine.plan.blocks[index], engine.residency, engine.report()
        self.always_active = report.always_active
        paged_in, parked = self._moved_before
        to_device, to_host = residency.bytes_paged_in - paged_in, residency.bytes_parked - parked
        if any(local(parameter).device != DEVICE for parameter in module.parameters()):
            # FSDP2 brings this rank's shard to the device for each gathering, and its reduced gradient back
            to_device += trace.to_device_bytes
            to_host += trace.to_host_bytes
        return BlockPlan(
            block.name,
            block.numel,
            trace,
            to_device_bytes=to_device,
            to_host_bytes=to_host,
            parked_bytes=report.blocks[index].parked_bytes,
        )

    def _with_role(self, method: Callable[..., Any], role: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def with_role(*args: Any, **kwargs: Any) -> Any:
            with self._trace.made_as(role):
                return method(*args, **kwargs)

        return with_role


def _engine(trainer: L.Trainer) -> HiFT | None:
    return trainer.strategy.hift if isinstance(trainer.strategy, BlockwiseTraining) else None


def _kind(module: nn.Module, block: Block) -> list[tuple[torch.Size, torch.dtype]]:
    """Blocks of one kind have the same tensors."""
    parameters = map(module.get_parameter, block.parameters)
    return [(parameter.shape, parameter.dtype) for parameter in parameters]


def _made_up_loss(module: nn.Module, batch: Any, *_: Any) -> Tensor:
    """A loss from which every parameter that requires a gradient gets one, without a forward pass."""
    return torch.stack([_MadeUpLoss.apply(p) for p in module.parameters() if p.requires_grad]).sum()  # type: ignore[no-untyped-call]


def _made_up_step(module: L.LightningModule, batch: Any, *_: Any) -> None:
    """What a module that optimizes by hand does of it."""
    optimizer = module.optimizers()
    assert isinstance(optimizer, LightningOptimizer)
    module.manual_backward(_made_up_loss(module, batch))
    optimizer.step()
    optimizer.zero_grad()


class _MadeUpLoss(torch.autograd.Function):
    """The gradient is where the parameter is; that of `DTensor.to_local` would be on the mesh's kind of device."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.save_for_backward(parameter)
        return torch.empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        (parameter,) = ctx.saved_tensors
        return torch.empty_like(parameter)
