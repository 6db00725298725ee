"""What a training step needs, found out by running it: the real strategy, on tensors that have no memory."""

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.partition import partition
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.planner.fake_device import (
    DEVICE,
    FakeAccelerator,
    FakeAutocast,
    fake_batch,
    fake_copy,
    fake_tensors,
)
from hift_lightning.planner.trace import DeviceTrace, StepTrace
from hift_lightning.strategies import HiFTStrategy

PRECISIONS: dict[str, torch.dtype] = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


@dataclass(frozen=True)
class BlockPlan:
    """The step of one block."""

    name: str
    numel: int
    trace: StepTrace
    to_device_bytes: int
    """State and masters paged in."""
    to_host_bytes: int
    """State and masters parked."""


@dataclass(frozen=True)
class Plan:
    """What a training step of one configuration needs; bytes, unless said otherwise."""

    numel: int
    """Parameters of the model."""
    trained_numel: int
    blocks: tuple[BlockPlan, ...]
    """In the order of their turns; a single one, the model, under full fine-tuning."""
    parked_bytes: int
    """Optimizer state and masters in host memory or files, once every block has been updated."""
    full_flops: int
    """FLOPs of a step of full fine-tuning with the same batches."""

    @property
    def peak(self) -> BlockPlan:
        """The block whose step has the peak."""
        return max(self.blocks, key=lambda block: block.trace.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most bytes in use on the device."""
        return self.peak.trace.peak_bytes

    @property
    def flops(self) -> float:
        """FLOPs of a step (matrix products and attention), mean over a cycle."""
        return sum(block.trace.flops for block in self.blocks) / len(self.blocks)

    @property
    def moved_bytes(self) -> float:
        """Bytes of state and masters moved in a step, both ways together, mean over a cycle."""
        return sum(block.to_device_bytes + block.to_host_bytes for block in self.blocks) / len(self.blocks)


def plan(
    module: L.LightningModule,
    strategy: HiFTStrategy | Literal["hift", "full"],
    batch: Any,
    *,
    precision: str = "32-true",
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find out what a training step needs, without a GPU and without weights in memory.

    The user's module and optimizer run under the real Trainer and strategy, on fake tensors of a fake second device:
    first every block is updated once from made-up gradients, so that it has optimizer state, and then a cycle of real
    steps is followed from one op to the next. Attention takes CUDA's fused kernels. What kernels need for themselves
    while they run is not seen, nor what the allocator rounds up.

    Args:
        module: the module to train, on any device, "meta" among them; it is left as it is.
        strategy: a `HiFTStrategy` (whose device and plugins do not matter), or `"hift"` for one with defaults, or
            `"full"` for full fine-tuning.
        batch: a training batch; its tensors may be on "meta", since only shapes and dtypes count.
        precision: Lightning's name of it: `32-true`, `bf16-true`, `16-true`, `bf16-mixed` or `16-mixed` (without the
            scaler).
        accumulate_grad_batches: batches in a step.
        gradient_clip_val: as for the Trainer.
        gradient_clip_algorithm: as for the Trainer.
        progress: called with the steps done and all steps to do.

    Raises:
        ConfigurationError: if the precision cannot be planned, or the module reads values while it trains.
    """
    if precision not in PRECISIONS:
        raise ConfigurationError(f"`precision={precision!r}` cannot be planned; choose one of {', '.join(PRECISIONS)}.")
    arguments = {
        "accumulate_grad_batches": accumulate_grad_batches,
        "gradient_clip_val": gradient_clip_val,
        "gradient_clip_algorithm": gradient_clip_algorithm,
    }
    job = _Job(module, batch, precision, arguments)
    if strategy == "full":
        return job.run(None, progress)
    full_flops = job.run(None, None, with_state=False).full_flops
    settings = HiFTSettings() if isinstance(strategy, str) else strategy.settings
    return dataclasses.replace(job.run(settings, progress), full_flops=full_flops)


@dataclass(frozen=True)
class _Job:
    module: L.LightningModule
    batch: Any
    precision: str
    trainer_arguments: dict[str, Any]

    def run(
        self, settings: HiFTSettings | None, progress: Callable[[int, int], None] | None, with_state: bool = True
    ) -> Plan:
        """Follow a cycle under HiFT, or a step of full fine-tuning where `settings` is `None`.

        Args:
            settings: of HiFT.
            progress: as in `plan`.
            with_state: whether optimizer state exists from before what is followed.
        """
        dtype = PRECISIONS[self.precision]
        mixed = self.precision.endswith("mixed")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_info())
            stack.enter_context(fake_tensors())
            trace = stack.enter_context(DeviceTrace(DEVICE, _vocabulary(self.module)))
            module = fake_copy(self.module, None if mixed else dtype)
            trace.mark([*module.parameters(), *module.buffers()], "weights")
            watch = _Watch(trace, FakeAutocast(dtype) if mixed else None, with_state, progress)
            watch.accumulated = self.trainer_arguments["accumulate_grad_batches"]
            watch.steps = 1 if settings is None else _blocks(module, settings)
            trainer = L.Trainer(
                accelerator=FakeAccelerator(),
                strategy=_strategy(settings),
                devices=1,
                plugins=[_MixedPrecision("bf16-mixed", "cpu") if mixed else _true_precision(self.precision)],
                callbacks=[watch],
                max_steps=watch.steps * (1 + with_state),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **self.trainer_arguments,
            )
            try:
                trainer.fit(module, _Forever(fake_batch(self.batch)))
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ConfigurationError(
                    f"`{type(self.module).__name__}` reads the value of a tensor while it trains (`{error.func}`), and "
                    "there are no values while planning; compute it without `.item()`, boolean indexing or `if` on a "
                    "tensor, at least when the tensor is fake."
                ) from error
        parameters = list(self.module.parameters())
        return Plan(
            numel=sum(p.numel() for p in parameters),
            trained_numel=sum(block.numel for block in watch.blocks),
            blocks=tuple(watch.blocks),
            parked_bytes=watch.parked_bytes,
            full_flops=watch.blocks[0].trace.flops,
        )


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


def _strategy(settings: HiFTSettings | None) -> Strategy:
    if settings is None:
        return SingleDeviceStrategy(device=DEVICE)
    # each block has its turn once; parked state counts as in host memory, wherever it will lie
    offload = settings.offload if settings.offload == "none" else "cpu"
    planned = dataclasses.replace(settings, steps_per_block=1, offload=offload)
    return HiFTStrategy(device=DEVICE, **vars(planned))


def _blocks(module: L.LightningModule, settings: HiFTSettings) -> int:
    return len(partition(module, settings.group_size, layers=settings.layers, frozen=settings.frozen).blocks)


def _vocabulary(module: nn.Module) -> int | None:
    return max((part.num_embeddings for part in module.modules() if isinstance(part, nn.Embedding)), default=None)


@contextlib.contextmanager
def _no_info() -> Iterator[None]:
    """Within it, the inner Trainer does not tell of devices and progress; warnings are told."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


class _Watch(Callback):
    """Tells the trace where the step is, and makes up the gradients of the first cycle."""

    def __init__(
        self,
        trace: DeviceTrace,
        autocast: FakeAutocast | None,
        with_state: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.trace, self.autocast, self.with_state, self.progress = trace, autocast, with_state, progress
        self.blocks: list[BlockPlan] = []
        self.parked_bytes = 0
        self.steps = self.accumulated = 1
        self._autocasting = contextlib.ExitStack()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        def mark_gradient(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.trace.mark([parameter.grad], "gradients")

        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(mark_gradient)  # type: ignore[no-untyped-call]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in trainer.optimizers):
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # what torch takes on CUDA, but not for fake tensors
        engine = _engine(trainer)
        if engine is not None:
            residency = engine.residency
            for method, role in (("load", "optimizer state"), ("load_master", "masters"), ("window", "window")):
                setattr(residency, method, self._with_role(getattr(residency, method), role))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, micro_batch = divmod(batch_idx, self.accumulated)
        self.trace.phase = "forward"
        if micro_batch == 0:
            self.trace.begin_step()
            self._note_block(_engine(trainer), pl_module)
        if step < self.steps and self.with_state:
            pl_module.training_step = functools.partial(_made_up_loss, pl_module)  # type: ignore[method-assign]
        else:
            pl_module.__dict__.pop("training_step", None)
            if self.autocast is not None:
                self._autocasting.enter_context(self.autocast)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.trace.phase = "backward"
        if self.autocast is not None:
            self.autocast.forget_casts()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.autocast is not None:
            self.autocast.forget_casts()
        self._autocasting.close()
        self.trace.phase = "update"

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, micro_batch = divmod(batch_idx, self.accumulated)
        if micro_batch + 1 < self.accumulated:
            return
        engine = _engine(trainer)
        for optimizer in trainer.optimizers:
            leaves = tree_leaves(list(optimizer.state.values()))
            self.trace.mark(filter(torch.is_tensor, leaves), "optimizer state")
        if step >= self.steps or not self.with_state:
            residency = None if engine is None else engine.residency
            self.blocks.append(
                BlockPlan(
                    name=self._name,
                    numel=self._numel,
                    trace=self.trace.end_step(),
                    to_device_bytes=0 if residency is None else residency.bytes_paged_in - self._paged_in,
                    to_host_bytes=0 if residency is None else residency.bytes_parked - self._parked,
                )
            )
            self.parked_bytes = 0 if residency is None else residency.parked_bytes
        if self.progress is not None:
            self.progress(step + 1, self.steps * (1 + self.with_state))

    def _note_block(self, engine: HiFT | None, module: L.LightningModule) -> None:
        if engine is None:
            self._name, self._numel = "all", sum(p.numel() for p in module.parameters() if p.requires_grad)
            return
        self._name, self._numel = engine.block.name, engine.block.numel
        self._paged_in, self._parked = engine.residency.bytes_paged_in, engine.residency.bytes_parked

    def _with_role(self, method: Callable[..., Any], role: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def with_role(*args: Any, **kwargs: Any) -> Any:
            with self.trace.made_as(role):
                return method(*args, **kwargs)

        return with_role


def _engine(trainer: L.Trainer) -> HiFT | None:
    return trainer.strategy.hift if isinstance(trainer.strategy, HiFTStrategy) else None


def _made_up_loss(module: nn.Module, batch: Any, *_: Any) -> Tensor:
    """A loss from which every parameter that requires a gradient gets one, without a forward pass."""
    return torch.stack([p.float().sum() for p in module.parameters() if p.requires_grad]).sum()
