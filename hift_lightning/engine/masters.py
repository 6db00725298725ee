"""fp32 master weights of 16-bit weights (the paper's Mixed^Hi): which there are, and what they say of a weight."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.residency import Residency
from hift_lightning.engine.shards import local

_SIXTEEN_BIT = {torch.bfloat16, torch.float16}

_TOGETHER = 2**20
"""Elements that are compared at a time, for the memory that it takes."""


def check_masters(parameters: Mapping[str, nn.Parameter], master_weights: bool) -> None:
    """Warn of 16-bit weights that have no masters, and raise if masters are asked for of other weights.

    Args:
        parameters: what is trained, by name.
        master_weights: see :class:`~hift_lightning.engine.settings.HiFTSettings`.

    Raises:
        ConfigurationError: if ``master_weights`` goes with weights that have more bits.
    """
    dtypes = {p.dtype for p in parameters.values()}
    if not master_weights and dtypes & _SIXTEEN_BIT:
        warnings.warn(
            "The weights have 16 bits and no fp32 masters, so every update that is small beside its weight is "
            "rounded away, and some weights, those of norms above all, never move; use `master_weights=True`.",
            stacklevel=3,
        )
    wider = next((name for name, p in parameters.items() if p.dtype not in _SIXTEEN_BIT), None)
    if master_weights and wider is not None:
        raise ConfigurationError(
            f"`master_weights=True` keeps fp32 masters of 16-bit weights, and `{wider}` is {parameters[wider].dtype}; "
            "let all that is trained have 16 bits (`precision='bf16-true'` or `'16-true'`, in a plain loop "
            "`model.bfloat16()`), or drop `master_weights`."
        )


def warn_of_rounded_state(names: Sequence[str]) -> None:
    """Warn of optimizer state that has come in 16 bits and will step fp32 masters.

    Args:
        names: of its parameters.
    """
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"The optimizer state of `{names[0]}`{more} has come in 16 bits, and will step fp32 masters: it may have "
            "been rounded by `optimizer.load_state_dict`, which casts it to the dtype of the weights; load it with "
            "`HiFT.load_optimizer_state_dict`.",
            stacklevel=4,
        )


def make_masters(residency: Residency, parameters: Iterable[nn.Parameter]) -> None:
    """Have masters of weights that have 16 bits, or will have them hereafter.

    Args:
        residency: where they are kept.
        parameters: those that have 16 bits already are their own masters until their first update.
    """
    for parameter in parameters:
        if parameter.dtype in _SIXTEEN_BIT:
            residency.make_master_when_updated(parameter)
        else:
            residency.keep_master(parameter, local(parameter).detach())


def load_masters(residency: Residency, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Take the masters of a checkpoint.

    Args:
        residency: where they are kept.
        parameters: by name; those that are stepped without a master are passed over.
        saved: by name; they are copied, a tensor at a time. Of a weight without one (not updated yet, or there were no
            masters) the weight is all there is.
    """
    for name, parameter in parameters.items():
        if not residency.has_master(parameter):
            continue
        if name in saved:
            residency.keep_master(parameter, saved[name])
        else:
            residency.make_master_when_updated(parameter)


def take_wider(
    residency: Residency,
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
) -> None:
    """Take what was saved in 32 bits where loading has rounded it, or has left it for the rounded weight.

    Args:
        residency: where this run's masters are.
        parameters: of this run, by name.
        weights: the saved ones, by name; this rank's rows of those that are sharded.
        masters: the saved ones, by name, likewise.
    """
    for name, parameter in parameters.items():
        if residency.has_master(parameter):
            if name not in masters and (wide := weights.get(name)) is not None and wide.dtype == torch.float32:
                residency.keep_master(parameter, wide)
        elif name in masters and parameter.dtype == torch.float32:
            master, wide = masters[name], weights.get(name)
            local(parameter).data.copy_(master if wide is None else master_of(wide, master))


def follow_weights(master: Tensor, weights: Tensor) -> None:
    """Change a master in place wherever the weight is not the rounded master: something else has set it since.

    So weights that are loaded, clamped or averaged while training count, and the others keep their lower bits.

    Args:
        master: fp32.
        weights: 16-bit, of the same shape and on the same device.
    """
    if master.is_contiguous():
        master, weights, together = master.view(-1), weights.reshape(-1), _TOGETHER
    else:  # as where weights are channels_last
        together = max(1, _TOGETHER // max(1, master[0].numel()))
    parts = (torch.split(tensor, together) for tensor in (master, weights))
    for values, rounded in zip(*parts, strict=True):
        same = values.to(rounded.dtype) == rounded
        torch.where(same, values, rounded.to(values.dtype), out=values)


def master_of(weights: Tensor, master: Tensor) -> Tensor:
    """The master of these weights in host memory: the given one, or a copy that follows them, see `follow_weights`."""
    on_host = weights.to(master.device)
    if torch.equal(master.to(on_host.dtype), on_host):
        return master
    following = master.contiguous().clone()
    follow_weights(following, on_host)
    return following


def state_dict_with_masters(model: nn.Module, masters: Mapping[nn.Parameter, Tensor]) -> dict[str, Any]:
    """The model's state dict with masters in place of the weights that have one; see :meth:`HiFT.master_state_dict`.

    Args:
        model: whose weights.
        masters: of its parameters; of this rank's rows of those that are sharded.
    """
    weights = model.state_dict(keep_vars=True)
    for name, value in weights.items():
        if isinstance(value, nn.Parameter) and value in masters:
            weights[name] = master_of(local(value).detach(), masters[value])
        elif isinstance(value, Tensor):
            weights[name] = value.detach()
    return weights
