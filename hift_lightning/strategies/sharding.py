"""Which modules of a model are sharded each on its own, and the weights that they are sharded from."""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.partition import Plan
from hift_lightning.engine.reduction import Ranks


def modules_to_shard(model: nn.Module, plan: Plan, whole: Sequence[str]) -> list[nn.Module]:
    """Find the modules that are gathered and freed on their own; what is left belongs to the model itself.

    These are the layers of the plan, and outside them the outermost modules with parameters of one layer only (an
    embedding, a head). Left to the model itself are parameters that modules share, since FSDP2 wants each in one group;
    modules with nothing but vectors, which are not worth a collective; and parameters that it holds directly. They are
    whole throughout a step.

    Args:
        model: before anything is sharded.
        plan: its layers.
        whole: shell-style patterns on names of modules that are left to the model itself.

    Raises:
        ConfigurationError: if a pattern matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in whole:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(
                f"`{pattern}` in `whole` matches no module of `{type(model).__name__}`; name one such as `{names[-1]}`."
            )
    layer_of = {model.get_parameter(name): layer.name for layer in plan.layers for name in layer.parameters}
    layers = {layer.name for layer in plan.layers}
    users = Counter(p for module in set(model.modules()) for p in set(module.parameters(recurse=False)))
    found: list[nn.Module] = []

    def look_into(module: nn.Module, name: str) -> None:
        if any(fnmatchcase(name, pattern) for pattern in whole):
            return
        parameters = set(module.parameters())
        inside = Counter(p for part in set(module.modules()) for p in set(part.parameters(recurse=False)))
        alone = all(users[p] == inside[p] for p in parameters)
        matrices = any(p.dim() > 1 for p in parameters)
        one_layer = name in layers or len({layer_of[p] for p in parameters if p in layer_of}) <= 1
        is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        used_elsewhere = any(
            fnmatchcase(f"{name}.{part}", pattern) for part, _ in module.named_modules() for pattern in whole
        )
        if module is not model and matrices and alone and one_layer and is_called and not used_elsewhere:
            if module not in found:
                found.append(module)
            return
        if name in layers:
            return
        for child_name, child in module.named_children():
            look_into(child, f"{name}.{child_name}" if name else child_name)

    look_into(model, "")
    return found


def same_on_all_ranks(module: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Give all ranks the weights and buffers of the first one, a tensor at a time.

    Args:
        module: what of it is sharded already is left as it is.
        ranks: which share it.
        device: by which they send; it needs memory for one tensor.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            on_device = tensor.detach().to(device)
            ranks.send_from(0, [on_device])
            tensor.detach().copy_(on_device)


def refuse_what_cannot_be_sharded(module: nn.Module) -> None:
    """Refuse modules that are sharded already, and parameters without values or without rows.

    Raises:
        ConfigurationError: if there is one.
    """
    name_of_class = type(module).__name__
    for name, part in module.named_modules():
        if isinstance(part, FSDPModule):
            raise ConfigurationError(
                f"`fully_shard` has been called on `{name_of_class}.{name}`, and `hift_fsdp2` calls it itself, on the "
                "layers that it rotates over; leave it out of `configure_model`."
            )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ConfigurationError(
                f"The parameter `{name}` of `{name_of_class}` is a `DTensor` already, and `hift_fsdp2` shards whole "
                "tensors; leave parallel styles out of the module."
            )
        if parameter.is_meta:
            raise ConfigurationError(
                f"The parameter `{name}` of `{name_of_class}` has no values yet (device `meta`); load the weights in "
                "`configure_model`, on the CPU. They come to the device layer by layer."
            )
        if parameter.dim() == 0:
            raise ConfigurationError(
                f"The parameter `{name}` of `{name_of_class}` has no dimension to be sharded along; give it the shape "
                "(1,)."
            )


def refuse_mixed_dtypes(module: nn.Module, part: nn.Module) -> None:
    """Refuse a module that is to be gathered at once and is trained in several dtypes.

    Args:
        module: the whole.
        part: what is about to be sharded; what of it is sharded already does not count.

    Raises:
        ConfigurationError: if it is.
    """
    own = set(part.parameters())
    names: dict[torch.dtype, str] = {}
    for name, parameter in module.named_parameters():
        if parameter in own and parameter.requires_grad and not isinstance(parameter, DTensor):
            names.setdefault(parameter.dtype, name)
    if len(names) > 1:
        found = " and ".join(f"`{name}` {dtype}" for dtype, name in names.items())
        raise ConfigurationError(
            f"`{type(part).__name__}` is gathered at once, and of what is trained in it {found}; give them one dtype "
            "(a `precision` such as `bf16-true`), or freeze those of one."
        )


def refuse_what_was_not_sharded(module: nn.Module) -> None:
    """Refuse a module that has got new parameters since it was sharded.

    Raises:
        ConfigurationError: if there is one.
    """
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            raise ConfigurationError(
                f"`{name}` has come into the module after an earlier `fit` or `test` has sharded it; make a new "
                "LightningModule of the new parts."
            )
