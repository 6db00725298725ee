"""How far an update moves the weights of a block, as a share of their norm."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hift_lightning.engine.residency import Residency
from hift_lightning.engine.shards import local, mesh_of
from hift_lightning.engine.tiers import HostMemory

PIECE_NUMEL = 2**20


class UpdateRatio:
    """Measures the norm of an update over the norm of the weights before it.

    The weights before the update are copied to host memory, pinned where the device can use that. Afterwards, when
    neither gradients nor paged-in state are on the device, they come back a piece at a time and are compared there, so
    the device needs one piece (4 MiB) more than the weights. Masters, which lie in host memory or files, are compared
    where they lie: 16-bit weights are rounded from them, and what rounding does is not what the optimizer did.

    Args:
        residency: knows the masters.
        masters: whether weights are stepped through them.
    """

    def __init__(self, residency: Residency, masters: bool) -> None:
        self._residency = residency
        self._masters = masters
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy the weights that are about to be updated; copies that were not compared are dropped.

        Args:
            parameters: of the active block. Where other ranks keep the masters of some, nothing is measured.
        """
        parameters = list(parameters)
        self._before = []
        if self._masters and not all(map(self._residency.has_master, parameters)):
            return
        self._before = [(p, _in_host_memory(self._weights(p), p.device)) for p in parameters]

    def finish(self) -> float | None:
        """Compare with the weights that were copied; ranks that hold shards of them call it together.

        Returns:
            The ratio; `None` if nothing was copied, or only zeros.
        """
        before, self._before = self._before, []
        moved, norms = [], []
        for parameter, old_weights in before:
            for old, new in zip(_pieces(old_weights), _pieces(self._weights(parameter)), strict=True):
                on_device = old.to(new.device, torch.promote_types(old.dtype, torch.float32), non_blocking=True)
                norms.append(torch.linalg.vector_norm(on_device))
                moved.append(torch.linalg.vector_norm(on_device.sub_(new)))
        mesh = mesh_of(parameter for parameter, _ in before)
        squares = torch.tensor([_sum_of_squares(moved), _sum_of_squares(norms)])
        if mesh is not None:
            squares = squares.to(mesh.device_type)
            dist.all_reduce(squares, group=mesh.get_group())
        moved_squared, norm_squared = squares.tolist()
        return (moved_squared / norm_squared) ** 0.5 if norm_squared else None

    def _weights(self, parameter: nn.Parameter) -> Tensor:
        if not self._masters:
            return local(parameter).detach()
        self._residency.synchronize()
        master = self._residency.master(parameter)
        return local(parameter).detach() if master is None else master


def _in_host_memory(weights: Tensor, device: torch.device) -> Tensor:
    buffer = HostMemory().allocate(weights, weights.dtype, device)
    buffer.write(weights)
    return buffer.tensor


def _pieces(weights: Tensor) -> tuple[Tensor, ...]:
    if not weights.numel():
        return ()
    rows = torch.atleast_1d(weights)  # type: ignore[no-untyped-call]
    pieces: tuple[Tensor, ...] = rows.split(max(1, PIECE_NUMEL * rows.shape[0] // rows.numel()))
    return pieces


def _sum_of_squares(norms: list[Tensor]) -> float:
    return float(torch.stack([norm.to(norms[0].device) for norm in norms]).square().sum()) if norms else 0.0
