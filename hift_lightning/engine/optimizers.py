"""Which parameters an optimizer has, and which optimizers cannot be rotated over blocks."""

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from hift_lightning.engine.errors import ConfigurationError


def parameters_of(*optimizers: Optimizer) -> dict[nn.Parameter, None]:
    """The parameters in the param groups, each once, in their order."""
    return {p: None for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


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
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups"):
            continue
        for inner in tree_leaves(value):
            if not isinstance(inner, Optimizer):
                continue
            if inner._optimizer_step_pre_hooks is optimizer._optimizer_step_pre_hooks:
                continue  # Fabric's have the hooks of the one that they wrap
            raise ConfigurationError(
                f"The optimizer `{type(optimizer).__name__}` steps another one, the `{type(inner).__name__}` in its "
                f"`{name}`, in calls that HiFT would not see and with state that would not be parked; give that one "
                "alone, or of several a `HiFT` each, with the rest as its `others`."
            )
