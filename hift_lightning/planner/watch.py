"""Which step is planned next, and what is seen of it: the callback between the planner's Trainer and its trace."""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.partition import Block
from hift_lightning.engine.report import BlockReport
from hift_lightning.engine.shards import local
from hift_lightning.planner.fake_device import DEVICE, FakeAutocast
from hift_lightning.planner.result import BlockPlan, Stretch
from hift_lightning.planner.trace import DeviceTrace
from hift_lightning.strategies.blockwise import BlockwiseTraining


class _Step(NamedTuple):
    block: int
    made_up: bool
    """Whether its gradients are made up, so that the state of the block exists; otherwise it is followed."""


class StepWatch(Callback):
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
            setattr(config.scheduler, "step", lambda *args, **kwargs: None)  # noqa: B010 (a method, as mypy sees it)
        choosing = filter(_chooses_foreach, trainer.optimizers)
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in choosing):
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
        self._due = [*(_Step(i, made_up=True) for i in with_state), *self._real_steps(engine, followed)]

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
            made_up = [_Step(index, made_up=True) for index in more]
            self._due = [*made_up, *self._real_steps(_engine(trainer), more)]
            if not more:
                trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._done + len(self._due))

    @staticmethod
    def _real_steps(engine: HiFT | None, blocks: Sequence[int]) -> list[_Step]:
        # gradients that are used as they are averaged come in the order of the block's visit before
        in_order = engine is not None and engine.reduction is not None and engine.settings.update == "fused"
        return [_Step(index, made_up=False) for index in blocks for _ in range(2 if in_order else 1)]

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


def _chooses_foreach(optimizer: Optimizer) -> bool:
    """Whether torch takes the `foreach` kernels of this optimizer on CUDA where nothing else is asked for."""
    # all that do so call this function of torch's; Adafactor is not among them
    modules = (sys.modules[kind.__module__] for kind in type(optimizer).__mro__ if kind is not Optimizer)
    return any(hasattr(module, "_default_to_fused_or_foreach") for module in modules)


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
