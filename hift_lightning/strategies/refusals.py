"""What does not go with training block by block, told before it begins: each raises `MisconfigurationException`."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, FSDPPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hift_lightning.engine.optimizers import parameters_in
from hift_lightning.engine.settings import HiFTSettings


def refuse_callbacks_that_freeze(trainer: Trainer) -> None:
    """Refuse callbacks that decide themselves which layers are trained."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"The callback `{type(callback).__name__}` freezes and unfreezes layers and adds param groups while "
                "training, and HiFT decides at the start which block requires a gradient when; remove the callback, "
                "or name what is never to be trained in `HiFTStrategy(frozen=[...])`."
            )


def refuse_callbacks_that_average(trainer: Trainer) -> None:
    """Refuse callbacks that keep averages of the weights in a copy that is made before these are sharded."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)):
            raise MisconfigurationException(
                f"The callback `{type(callback).__name__}` copies the module before its weights are sharded, and does "
                "not average shards; use `strategy='hift_ddp'`, or leave it out."
            )


def refuse_what_needs_gradients(trainer: Trainer, module: LightningModule, precision: Precision) -> None:
    """Refuse what looks at gradients after backward, for `update="fused"`."""
    what = needs_gradients(
        trainer.gradient_clip_val,
        trainer.gradient_clip_algorithm,
        trainer.accumulate_grad_batches,
        scaled=getattr(precision, "scaler", None) is not None,
    )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if what is None and any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        what = "`GradientAccumulationScheduler` sums gradients over batches"
    if what is None and is_overridden("configure_gradient_clipping", module):
        what = f"`{type(module).__name__}.configure_gradient_clipping` clips gradients in its own way"
    if what is not None:
        raise MisconfigurationException(not_with_fused(what))


def needs_gradients(clip_val: float | None, clip_algorithm: str | None, batches: int, scaled: bool) -> str | None:
    """What of a Trainer's arguments looks at gradients after backward, in a few words.

    Args:
        clip_val: `gradient_clip_val`.
        clip_algorithm: `gradient_clip_algorithm`.
        batches: `accumulate_grad_batches`.
        scaled: whether the precision has a GradScaler.
    """
    if clip_val and clip_algorithm in (None, GradClipAlgorithmType.NORM):
        return f"`gradient_clip_val={clip_val}` clips by norm"
    if batches > 1:
        return f"`accumulate_grad_batches={batches}` sums gradients over batches"
    return "a GradScaler looks for overflows in fp16" if scaled else None


def not_with_fused(what: str) -> str:
    """The sentence that refuses it with `update="fused"`."""
    return (
        f"`update='fused'` frees each gradient inside backward, and {what}, which needs all of them after it; use "
        "`update='streamed'`, or clip by value or not at all (`gradient_clip_val=None`), without accumulation, in fp32 "
        "or bf16."
    )


def refuse_optimizers(optimizers: list[Optimizer], module: LightningModule) -> None:
    """Refuse no optimizer, and optimizers that share parameters."""
    if not optimizers or any(isinstance(optimizer, _MockOptimizer) for optimizer in optimizers):
        raise MisconfigurationException(
            f"`{type(module).__name__}.configure_optimizers` returned no optimizer, so HiFT has nothing to rotate; "
            "return one, or train without `strategy='hift'`."
        )
    seen: set[Tensor] = set()
    for optimizer in optimizers:
        parameters = parameters_in(optimizer).keys()
        if shared := seen & parameters:
            raise MisconfigurationException(
                f"{len(shared)} parameters are in more than one optimizer of "
                f"`{type(module).__name__}.configure_optimizers`, so their block would have two turns at once; give "
                "each parameter to one optimizer."
            )
        seen |= parameters


def refuse_arguments_of_ddp(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that assume the wrapper of `DistributedDataParallel`, which HiFT does without."""
    of_ddp = inspect.signature(DDPStrategy).parameters.keys() - {"kwargs", *_NOT_WITH_BLOCKS}
    known = of_ddp | {field.name for field in dataclasses.fields(HiFTSettings)}
    for name, value in arguments.items():
        if name in known:
            continue
        why = _NOT_WITH_BLOCKS.get(name, "neither HiFT nor `DDPStrategy` has such an argument that is of use here")
        raise MisconfigurationException(f"`HiFTDDPStrategy({name}={value!r})` cannot be: {why}; leave it out.")


_NOT_WITH_BLOCKS = {
    "find_unused_parameters": "gradients of the active block alone are averaged, and which of its parameters take part "
    "in the loss is found out in each step",
    "static_graph": "another block has gradients in each step, so the graph is not static",
    "gradient_as_bucket_view": "gradients are freed after each step, and no bucket outlives it",
    "ddp_comm_hook": "communication hooks assume one fixed set of parameters",
    "ddp_comm_state": "communication hooks assume one fixed set of parameters",
    "ddp_comm_wrapper": "communication hooks assume one fixed set of parameters",
    "model_averaging_period": "gradients are averaged in each step",
}


def refuse_other_wrappers(module: LightningModule, precision: Precision) -> None:
    """Refuse parts and precision plugins that belong to DDP's wrapper, FSDP1 or DeepSpeed."""
    if isinstance(precision, (DeepSpeedPrecision, FSDPPrecision)):
        plugin = type(precision).__name__
        raise MisconfigurationException(
            f"The precision plugin `{plugin}` belongs to `{plugin.removesuffix('Precision')}Strategy`; leave the "
            f"plugin out and give `Trainer(precision={precision.precision!r})`."
        )
    for name, part in module.named_modules():
        if isinstance(part, (DistributedDataParallel, FullyShardedDataParallel)) or _is_of_deepspeed(part):
            raise MisconfigurationException(
                f"`{type(module).__name__}.{name}` is wrapped in `{type(part).__name__}`, which averages gradients of "
                "a fixed set of parameters; give the module unwrapped, the strategy does what is needed."
            )


def _is_of_deepspeed(part: Module) -> bool:
    return any(kind.__module__.partition(".")[0] == "deepspeed" for kind in type(part).__mro__)
