"""What is measured of the blocks of one optimizer, update by update."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hift_lightning.callbacks.update_ratio import UpdateRatio
from hift_lightning.engine.hift import HiFT
from hift_lightning.engine.partition import Block


@dataclass
class Mean:
    """The mean of numbers that are not kept."""

    total: float = 0.0
    count: int = 0

    def add(self, number: float) -> None:
        """Take one in."""
        self.total += number
        self.count += 1

    @property
    def value(self) -> float | None:
        """Of all so far; `None` before the first."""
        return self.total / self.count if self.count else None


@dataclass
class BlockRecord:
    """What was measured in this run of a block's own parameters, or of those that are always active."""

    gradient_norm: Mean = field(default_factory=Mean)
    """Of its gradients; unknown under `update="fused"`."""
    update_ratio: Mean = field(default_factory=Mean)
    """The norm of its updates over that of its weights, in the updates in which it was measured; at rate 0 none is."""
    page_in_ms: Mean = field(default_factory=Mean)
    """Milliseconds that the host spent on paging state in for a step, that of what is always active with it."""
    rate: float | None = None
    """The last learning rate that it was updated with: the highest where its param groups have several, and `None`
    where the optimizer finds its own."""


class BlockWatch:
    """Watches the updates of an engine.

    `update="fused"` uses each gradient inside backward, so the norm of all of them is never known.

    Args:
        engine: has been started.
        names: of its parts, as they are shown.
        ratio_every: updates of a block from one whose update-to-weight ratio is measured to the next; 0: none.
    """

    def __init__(self, engine: HiFT, names: Sequence[str], ratio_every: int) -> None:
        self.engine = engine
        self.records = {part.index: BlockRecord() for part in engine.plan.parts}
        self.names = names
        self.gradient_norm: float | None = None
        """Of all that was changed by the last update of the step; `None` if there was none or it cannot be known."""
        self.rate: float | None = None
        """Of the block in that update."""
        self.updated: list[int] = []
        """Indices of the blocks that have been updated in the step: of a batch, if it is optimized by hand."""
        self._ratio_every = ratio_every
        self._ratios = {
            part.index: UpdateRatio(engine.residency, engine.settings.master_weights) for part in engine.plan.parts
        }
        self._not_measured: set[int] = set()
        """Indices of the blocks whose turn to be measured came in an update at rate 0."""
        self._begun: tuple[tuple[Block, ...], int] | None = None
        self._norms: dict[int, float] = {}
        self._cycle: dict[str, list[float]] = {}
        self._logged_cycles = engine.cycle

    @property
    def block_names(self) -> Sequence[str]:
        """Of the blocks that take turns."""
        return self.names[: len(self.engine.plan.blocks)]

    @property
    def fused(self) -> bool:
        """Whether gradients are used inside backward."""
        return self.engine.settings.update == "fused"

    def begin_update(self, scale: float = 1.0) -> None:
        """Take in gradients and weights before an update; with `fused`, the weights before its backward pass.

        Args:
            scale: what a GradScaler has multiplied the gradients by.
        """
        engine = self.engine
        self._begun = self.gradient_norm = None
        self._norms = {}
        parts = engine.active_parts
        for part in parts:
            gradients = [p.grad for p in engine.parameters_of(part) if p.grad is not None]
            if gradients:
                self._norms[part.index] = _norm(gradients) / scale
        if not (self._norms or self.fused):
            return  # the step is left out, or no gradient reached the block
        self._begun = parts, engine.updates
        if self._norms:
            self.gradient_norm = math.hypot(*self._norms.values())
        block = engine.block.index
        visits = engine.rotation.visits(block, engine.updates)
        if self._ratio_every and (visits % self._ratio_every == 0 or block in self._not_measured):
            for part in parts:
                if self._rate_of(part) == 0:  # as in the first cycle of a warm-up: nothing will move
                    self._not_measured.add(part.index)
                else:
                    self._not_measured.discard(part.index)
                    self._ratios[part.index].begin(engine.parameters_of(part))

    def end_update(self) -> None:
        """Record an update, if there was one since it was begun."""
        begun, self._begun = self._begun, None
        if begun is None or self.engine.updates == begun[1]:
            self.gradient_norm = None
            return
        parts, _ = begun
        block = parts[0]
        for part in parts:
            record, name = self.records[part.index], self._logged_name(part.index)
            if (norm := self._norms.get(part.index)) is not None:
                record.gradient_norm.add(norm)
                self._cycle.setdefault(f"hift_grad_norm/{name}", []).append(norm)
            record.rate = self._rate_of(part)
            if (ratio := self._ratios[part.index].finish()) is not None:
                record.update_ratio.add(ratio)
                self._cycle.setdefault(f"hift_update_ratio/{name}", []).append(ratio)
                if part is block:
                    self._cycle.setdefault("hift/update_ratio", []).append(ratio)
            if record.rate is not None:
                self._cycle.setdefault(f"hift_lr/{name}", []).append(record.rate)
        self.records[block.index].page_in_ms.add(self.engine.page_in_ms)
        self._cycle.setdefault(f"hift_page_in_ms/{self._logged_name(block.index)}", []).append(self.engine.page_in_ms)
        self.rate = self.records[block.index].rate
        self.updated.append(block.index)

    def end_step(self) -> None:
        """Begin another step."""
        self.gradient_norm = self.rate = None
        self.updated = []

    def take_cycle(self, unfinished: bool = False) -> dict[str, float]:
        """The means over a cycle and the visits so far, by the name that they are logged under, each cycle once.

        Args:
            unfinished: give what there is of a cycle that has not ended, too.
        """
        if self.engine.cycle == self._logged_cycles and not unfinished:
            return {}
        self._logged_cycles = self.engine.cycle
        measured, self._cycle = self._cycle, {}
        if not measured:
            return {}
        visits = {f"hift_visits/{self._logged_name(p.index)}": float(p.visits) for p in self.engine.report().parts}
        return {name: fmean(values) for name, values in measured.items()} | visits

    def _logged_name(self, index: int) -> str:
        return f"{index:02d}_{self.names[index]}".replace(" … ", "-").replace(" ", "_")

    def _rate_of(self, part: Block) -> float | None:
        parameters = set(self.engine.parameters_of(part))
        groups = self.engine.optimizer.param_groups
        rates = (group.get("lr") for group in groups if not parameters.isdisjoint(group["params"]))
        return max((float(rate) for rate in rates if rate is not None), default=None)


def watches_of(engines: Sequence[HiFT], ratio_every: int) -> list[BlockWatch]:
    """Watch the updates of all engines of a run.

    Args:
        engines: have been started.
        ratio_every: as for `BlockWatch`.
    """
    names = iter(short_names([part.name for engine in engines for part in engine.plan.parts]))
    return [
        BlockWatch(engine, list(itertools.islice(names, len(engine.plan.parts))), ratio_every) for engine in engines
    ]


def short_names(names: list[str]) -> list[str]:
    """Leave out the modules that all names begin with: `net.body.layer.0` becomes `body.layer.0` beside `net.norm`.

    Args:
        names: of blocks. Of each the last two parts stay (`layer.0`); those that have only one do not count.
    """
    layers = itertools.chain.from_iterable(name.split(" … ") for name in names)
    parts = [name.split(".") for name in layers if "." in name]
    shared = 0
    while parts and all(len(one) > shared + 2 and one[: shared + 1] == parts[0][: shared + 1] for one in parts):
        shared += 1
    if not shared:
        return names
    prefix = ".".join(parts[0][:shared]) + "."
    # a block of several layers has the names of the lowest and the highest
    return [" … ".join(one.removeprefix(prefix) for one in name.split(" … ")) for name in names]


def _norm(gradients: list[Tensor]) -> float:
    dense = [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in gradients]
    norm = torch.nn.utils.get_total_norm(dense)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
