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
    wrapped = wrapped_by(optimizer)
    if wrapped is not None and wrapped[1].state is not optimizer.state:
        name, inner = wrapped
        raise ConfigurationError(
            f"The optimizer `{type(optimizer).__name__}` steps another one, the `{type(inner).__name__}` in its "
            f"`{name}`, which has state of its own that would not be parked, in calls that HiFT would not see; give "
            "that one alone."
        )


def wrapped_by(optimizer: Optimizer) -> tuple[str, Optimizer] | None:
    """The optimizer that another one holds (SAM, Lookahead, Fabric's), and the name of the attribute."""
    held = ((name, value) for name, value in vars(optimizer).items() if isinstance(value, Optimizer))
    return next(held, None)
