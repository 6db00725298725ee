"""What does not go with training block by block, told before it begins: each raises `MisconfigurationException`."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer


def refuse_callbacks_that_freeze(trainer: Trainer) -> None:
    """Refuse callbacks that decide themselves which layers are trained."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise MisconfigurationException(
                f"The callback `{type(callback).__name__}` freezes and unfreezes layers and adds param groups while "
                "training, and HiFT decides at the start which block requires a gradient when; remove the callback, "
                "or name what is never to be trained in `HiFTStrategy(frozen=[...])`."
            )


def refuse_what_needs_gradients(trainer: Trainer, precision: Precision) -> None:
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
        "`update='streamed'`, or clip by value without accumulation in fp32 or bf16."
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
        parameters = {p for group in optimizer.param_groups for p in group["params"]}
        if seen & parameters:
            raise MisconfigurationException(
                f"{len(seen & parameters)} parameters are in more than one optimizer of "
                f"`{type(module).__name__}.configure_optimizers`, so their block would have two turns at once; give "
                "each parameter to one optimizer."
            )
        seen |= parameters
