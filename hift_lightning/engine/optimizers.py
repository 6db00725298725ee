"""Which parameters an optimizer has, which of a model's it leaves out, and which optimizers cannot be rotated."""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from hift_lightning.engine.errors import ConfigurationError


def parameters_in(*optimizers: Optimizer) -> dict[nn.Parameter, None]:
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


def names_in_optimizer(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> list[str]:
    """Names of the parameters that require a gradient and are in the optimizer's param groups.

    Args:
        parameters: the model's, by name.
        optimizer: whose groups.

    Raises:
        ConfigurationError: if there is none, or the groups hold one that is not the model's.
    """
    optimized = parameters_in(optimizer)
    names = [name for name, p in parameters.items() if p in optimized and p.requires_grad]
    if not names:
        raise ConfigurationError(
            f"The optimizer `{type(optimizer).__name__}` holds no parameter of the model that requires a gradient; "
            "make it from `model.parameters()`, after the model is complete."
        )
    strangers = optimized.keys() - parameters.values()
    if strangers:
        shapes = ", ".join(str(tuple(p.shape)) for p in list(strangers)[:3])
        raise ConfigurationError(
            f"The optimizer `{type(optimizer).__name__}` holds {len(strangers)} parameters that are not in the model "
            f"(shapes {shapes}), so they belong to no layer; register them in the model or leave them out."
        )
    return names


def warn_of_unoptimized(model: nn.Module, names: Iterable[str], frozen: Iterable[str] | None) -> None:
    """Warn of parameters that are in no param group, unless that is what was asked for.

    Args:
        model: whose parameters.
        names: of those that require a gradient and are not trained.
        frozen: patterns of what shall not be.
    """
    patterns = tuple(frozen or ())
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight is frozen under any of its names
    left_out = {p for name, p in parameters.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
    forgotten = sorted(name for name in names if parameters[name] not in left_out)
    if forgotten:
        warnings.warn(
            f"{len(forgotten)} parameters require a gradient but are in no param group of the optimizer, so they "
            f"are frozen while training: {', '.join(forgotten[:3])}{', …' if len(forgotten) > 3 else ''}; add them to "
            "one, or name them in `frozen=[...]` if that is what you want.",
            stacklevel=3,
        )
