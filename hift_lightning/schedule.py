"""Learning-rate schedules with a warm-up, as factors on the optimizer's own rate.

Each takes the optimizer and the number of optimizer steps that the run plans, so that a configuration can name
it without knowing that number.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from hift_lightning.engine.errors import ConfigurationError


def constant(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.0) -> LambdaLR:
    """Rise linearly during the warm-up, then hold the rate.

    Args:
        optimizer: whose rates are scaled.
        total_steps: optimizer steps of the whole run.
        warmup_fraction: share of them that the warm-up takes, from 0 to below 1.

    Raises:
        ConfigurationError: `warmup_fraction` is out of range.
    """
    return _with_warmup(optimizer, total_steps, warmup_fraction, lambda progress: 1.0)


def linear(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.1) -> LambdaLR:
    """Rise linearly during the warm-up, then fall linearly to 0 at the last step; arguments as `constant`."""
    return _with_warmup(optimizer, total_steps, warmup_fraction, lambda progress: 1.0 - progress)


def cosine(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.1) -> LambdaLR:
    """Rise linearly during the warm-up, then fall to 0 along half a cosine; arguments as `constant`."""
    return _with_warmup(
        optimizer, total_steps, warmup_fraction, lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress))
    )


def _with_warmup(
    optimizer: Optimizer, total_steps: int, warmup_fraction: float, after: Callable[[float], float]
) -> LambdaLR:
    if not isinstance(warmup_fraction, (int, float)) or not 0 <= warmup_fraction < 1:
        raise ConfigurationError(
            f"`scheduler.warmup_fraction={warmup_fraction}` is not possible; give a number from 0 to below 1."
        )
    warmup_steps = round(total_steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return after(min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)
