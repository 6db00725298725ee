"""NaN and inf in the loss or in gradients: found before the optimizer uses them."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh

from hift_lightning.engine.shards import local

LOSS = ""
"""Name of the loss, which no parameter can have."""


class NonfiniteSearch:
    """Looks at tensors, and tells the first with NaN or inf for one device-to-host synchronization.

    Of each tensor its smallest and largest number stay on the device: NaN and inf come through, nothing can overflow,
    and nothing of the tensor's size is allocated.

    Args:
        mesh: ranks that each look at a part of the same tensors, and find the same together; ``None`` if there are no
            others.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self._mesh = mesh
        self._extremes: dict[str, tuple[Tensor, Tensor]] = {}

    def look_at(self, name: str, tensor: Tensor) -> None:
        """Take in a tensor, without waiting for the device.

        Args:
            name: by which it is told.
            tensor: of any device, floating dtype and shape; dense, complex or sparse COO.
        """
        values = tensor.detach()
        if values.layout == torch.sparse_coo:
            values = values._values()
        if values.is_complex():
            values = torch.view_as_real(values)
        if values.numel() > 0:
            self._extremes[name] = torch.aminmax(values)

    def look_at_loss(self, loss: Tensor, scaled: bool) -> None:
        """Take in a loss; if a GradScaler scales it, inf is expected."""
        self.look_at(LOSS, loss.detach().nan_to_num(torch.nan, 0.0, 0.0) if scaled else loss)

    def first(self) -> tuple[str, str] | None:
        """Tell what is not finite, of all that was looked at since the last call; ranks of a mesh call it together.

        Returns:
            The name of the first (the loss goes before all) and ``"NaN"`` or ``"inf"``; ``None`` if there is none.
        """
        here = self._first_here()
        if self._mesh is None:
            return here
        found_any = torch.tensor(here is not None, dtype=torch.int32, device=self._mesh.device_type)
        dist.all_reduce(found_any, dist.ReduceOp.MAX, self._mesh.get_group())
        if isinstance(found_any, FakeTensor) or not found_any.item():  # as in `_first_here`
            return None
        found: list[tuple[str, str] | None] = [None] * self._mesh.size()
        dist.all_gather_object(found, here, self._mesh.get_group())
        return min((one for one in found if one is not None), key=lambda one: one[0] != LOSS)

    def _first_here(self) -> tuple[str, str] | None:
        seen, self._extremes = self._extremes, {}
        if not seen:
            return None
        extremes = [extreme for pair in seen.values() for extreme in pair]
        finite = torch.stack([extreme.to(extremes[0].device) for extreme in extremes]).isfinite().all()
        # tensors without numbers, as while planning, are taken to be finite
        if isinstance(finite, FakeTensor) or finite.item():
            return None
        for name in sorted(seen, key=lambda name: name != LOSS):  # what the loss has, every gradient has from it
            lowest, highest = (float(extreme) for extreme in seen[name])
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                return name, "NaN" if math.isnan(lowest) or math.isnan(highest) else "inf"
        raise AssertionError("a number that was not finite is so now")


def kind_of_loss(loss: Tensor, scaled: bool) -> str | None:
    """``"NaN"`` or ``"inf"`` if a loss has it; arguments as of :meth:`NonfiniteSearch.look_at_loss`."""
    search = NonfiniteSearch()
    search.look_at_loss(loss, scaled)
    found = search.first()
    return None if found is None else found[1]


def broken_weight(weights: Mapping[str, Tensor], mesh: DeviceMesh | None) -> tuple[str, str] | None:
    """Find the first weight that an update has broken: it has NaN, or inf in fp16.

    In wider dtypes nothing overflows so soon, and a weight may be infinite on purpose.

    Args:
        weights: by name.
        mesh: see :class:`NonfiniteSearch`.

    Returns:
        Its name and ``"NaN"`` or ``"inf"``; ``None`` if all are sound, which takes one synchronization to find out.
    """
    search = NonfiniteSearch(mesh)
    for name, weight in weights.items():
        search.look_at(name, local(weight))
    if search.first() is None:
        return None
    for name, weight in weights.items():
        search.look_at(name, local(weight))
        found = search.first()
        if found is not None and (found[1] == "NaN" or weight.dtype == torch.float16):
            return found
    return None
