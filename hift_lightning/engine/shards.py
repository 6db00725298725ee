"""Sharded parameters: of each one every rank holds some rows, as torch's ``fully_shard`` (FSDP2) leaves them.

Such a parameter is a :class:`~torch.distributed.tensor.DTensor`, sharded along its first dimension. The engine steps
what a rank holds of it, which is right for optimizers that treat each element by itself. So state, masters and what is
parked are plain tensors with the shape of the shard, and nobody but this file knows where the other rows are.

Source of the sharding: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """What this rank holds: its rows of a sharded tensor, in the same memory; any other tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():  # otherwise it would be a step of autograd
        return tensor.to_local()


def mesh_of(parameters: Iterable[Tensor]) -> DeviceMesh | None:
    """The ranks among whom parameters are sharded; ``None`` if none is."""
    return next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)


def own_rows(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows of a tensor with the shape of a whole parameter, as a part of it; all if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    rows = _rows_of_a_rank(parameter)
    start = parameter.device_mesh.get_local_rank() * rows
    return whole[start : start + rows]


def in_ranks_mesh(shard: Tensor, parameter: DTensor, mesh: DeviceMesh) -> DTensor:
    """What the ranks hold in host memory as one sharded tensor, for torch's distributed checkpoints.

    Args:
        shard: of this rank, with the shape of its shard of the parameter.
        parameter: for the shape of the whole.
        mesh: the same ranks, in host memory.
    """
    return DTensor.from_local(shard, mesh, [Shard(0)], shape=parameter.shape, stride=parameter.stride())


def whole_on_first_rank(shard: Tensor, parameter: DTensor, group: dist.ProcessGroup) -> Tensor | None:
    """Put together in host memory what the ranks hold; called by all of them together.

    Args:
        shard: of this rank, on any device, with the shape of its shard of the parameter.
        parameter: for the shape of the whole.
        group: the same ranks, by a backend that sends host memory.

    Returns:
        The whole tensor on the first rank, ``None`` on the others.
    """
    rows, ranks = _rows_of_a_rank(parameter), parameter.device_mesh.size()
    padded = torch.zeros((rows, *parameter.shape[1:]), dtype=shard.dtype)
    padded[: shard.shape[0]].copy_(shard)
    if dist.get_rank(group) != 0:
        dist.gather(padded.view(torch.uint8), group=group, group_dst=0)
        return None
    whole = torch.empty((rows * ranks, *parameter.shape[1:]), dtype=shard.dtype)
    dist.gather(padded.view(torch.uint8), list(whole.view(torch.uint8).chunk(ranks)), group=group, group_dst=0)
    # without the last ranks' padding, which would be saved with it
    return whole if whole.shape == parameter.shape else whole[: parameter.shape[0]].clone()


def _rows_of_a_rank(parameter: DTensor) -> int:
    """Rows that each rank has, but for the last ones, which may have fewer or none."""
    assert tuple(parameter.placements) == (Shard(0),)
    return -(-parameter.shape[0] // parameter.device_mesh.size())
