"""Optimizers that cannot be rotated over blocks."""

from torch.optim import LBFGS, Optimizer

from hift_lightning.engine.errors import ConfigurationError


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Refuse one whose steps or state belong to no single parameter, or to another optimizer.

    Raises:
        ConfigurationError: it is such a one.
    """
    if isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            "The optimizer `LBFGS` keeps one history over all parameters and runs the closure several times a "
            "step, so it cannot be rotated over blocks; choose another, such as AdamW."
        )
    held = ((name, value) for name, value in vars(optimizer).items() if isinstance(value, Optimizer))
    wrapped = next(held, None)
    if wrapped is not None and wrapped[1]._optimizer_step_pre_hooks is not optimizer._optimizer_step_pre_hooks:
        name, inner = wrapped  # Fabric's have the hooks of the one that they wrap
        raise ConfigurationError(
            f"The optimizer `{type(optimizer).__name__}` steps another one, the `{type(inner).__name__}` in its "
            f"`{name}`, in calls that HiFT would not see and with state that would not be parked; give that one alone."
        )
