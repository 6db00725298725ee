"""Which modules of a model are sharded each on its own, and the weights that they are sharded from."""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn.parallel import DistributedDataParallel

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.partition import Plan


def modules_to_shard(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Find the modules that are gathered and freed on their own; what is left belongs to the model itself.

    These are the layers of the plan, and outside them the outermost modules with parameters of one layer only (an
    embedding, a head). Left to the model itself are parameters that modules share, since FSDP2 wants each in one group;
    modules with nothing but vectors, which are not worth a collective; and parameters that it holds directly. They are
    whole throughout a step.

    Args:
        model: before anything is sharded.
        plan: its layers.
    """
    layer_of = {model.get_parameter(name): layer.name for layer in plan.layers for name in layer.parameters}
    layers = {layer.name for layer in plan.layers}
    users = Counter(p for module in set(model.modules()) for p in set(module.parameters(recurse=False)))
    found: list[nn.Module] = []

    def look_into(module: nn.Module, name: str) -> None:
        parameters = set(module.parameters())
        inside = Counter(p for part in set(module.modules()) for p in set(part.parameters(recurse=False)))
        alone = all(users[p] == inside[p] for p in parameters)
        matrices = any(p.dim() > 1 for p in parameters)
        one_layer = name in layers or len({layer_of[p] for p in parameters if p in layer_of}) <= 1
        is_called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if module is not model and matrices and alone and one_layer and is_called:
            if module not in found:
                found.append(module)
            return
        if name in layers:
            return
        for child_name, child in module.named_children():
            look_into(child, f"{name}.{child_name}" if name else child_name)

    look_into(model, "")
    return found


def same_on_all_ranks(module: nn.Module, mesh: DeviceMesh) -> None:
    """Give all ranks the weights and buffers of the first one, a tensor at a time.

    Args:
        module: what of it is sharded already is left as it is.
        mesh: the ranks; its device needs memory for one tensor.
    """
    for tensor in _whole_tensors(module):
        on_device = tensor.to(mesh.device_type)
        # not every backend sends booleans
        sent = on_device.view(torch.uint8) if on_device.dtype == torch.bool else on_device
        dist.broadcast(sent, group=mesh.get_group(), group_src=0)
        if on_device is not tensor:
            tensor.copy_(on_device)


def _whole_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            yield tensor.detach()


def refuse_what_cannot_be_sharded(module: nn.Module) -> None:
    """Refuse modules that are wrapped or sharded already, and parameters without values or without rows.

    Raises:
        ConfigurationError: if there is one.
    """
    name_of_class = type(module).__name__
    for name, part in module.named_modules():
        if isinstance(part, FullyShardedDataParallel | DistributedDataParallel):
            raise ConfigurationError(
                f"`{name_of_class}.{name}` is wrapped in `{type(part).__name__}`, and `hift_fsdp2` shards the module "
                "itself; give the module unwrapped."
            )
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
