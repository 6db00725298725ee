"""A callback that tells where the rotation is and what a step costs, under any strategy."""

import time
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from hift_lightning.engine.measure import ROLES, bytes_by_role


class HiFTMonitor(L.Callback):
    """Log the rotation and count time and bytes, at every optimizer step.

    Under `HiFTStrategy` it logs `hift/block` and `hift/cycle` (also to the progress bar), `hift/active_params`,
    `hift/page_in_ms`, `hift/parked_bytes` and `hift/skipped_steps`; under every strategy `memory/peak_device_bytes`.

    Bytes are counted from live tensors before the optimizer's step and at its end, when gradients and paged-in state
    are there together, and under HiFT again between steps, when the most is parked. Not among them are activations
    and what `update="streamed"` or `"fused"` has in its window for a moment. The time of a step is that of its
    batches, without the loading of data, validation and checkpoints.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._peak: dict[str, int] = {}
        self._rotation: dict[str, int] = {}
        self._seconds = 0.0
        self._steps = 0
        self._batch_began = 0.0
        self._first_step = 0

    @property
    def numbers(self) -> dict[str, float]:
        """What was measured in the last `fit`, by name.

        `time/step_ms_mean` (milliseconds), `memory/peak_device_bytes` (weights, gradients and state that were
        on the device at one time), `memory/peak_<role>_bytes`, `memory/parked_bytes`, and under HiFT
        `hift/blocks`, `hift/cycles` (cycles completed) and `hift/skipped_steps` (steps left out because of NaN or inf).
        """
        numbers: dict[str, float] = dict(self._rotation)
        if self._steps:
            numbers["time/step_ms_mean"] = 1000 * self._seconds / self._steps
        for name, count in self._peak.items():
            numbers["memory/parked_bytes" if name == "parked" else f"memory/peak_{name}_bytes"] = count
        return numbers

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.__init__()  # type: ignore[misc]  # a second fit counts anew
        self._first_step = trainer.global_step

        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._count_bytes(trainer, pl_module)

        # callbacks come before the strategy here, so this hook runs before the strategy's own, which frees the
        # gradients and parks the state
        self._handles = [optimizer.register_step_post_hook(count) for optimizer in trainer.optimizers]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        hift = _engine(trainer)
        if hift is not None:
            pl_module.log_dict(
                {"hift/block": float(hift.block.index), "hift/cycle": float(hift.cycle)}, prog_bar=True, batch_size=1
            )
            pl_module.log("hift/active_params", float(hift.block.numel), batch_size=1)
        self._batch_began = time.perf_counter()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._count_bytes(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - self._batch_began
        self._steps = trainer.global_step - self._first_step
        hift = _engine(trainer)
        if hift is not None:
            self._count_bytes(trainer, pl_module)  # between steps, when the most is parked
            skipped_steps = sum(engine.skipped_steps for engine in trainer.strategy.engines)  # type: ignore[attr-defined]
            self._rotation = {
                "hift/blocks": len(hift.plan.blocks),
                "hift/cycles": hift.cycle,
                "hift/skipped_steps": skipped_steps,
            }
            pl_module.log("hift/skipped_steps", float(skipped_steps), batch_size=1)
            pl_module.log("hift/page_in_ms", hift.page_in_ms, batch_size=1)
            pl_module.log("hift/parked_bytes", float(self._peak.get("parked", 0)), batch_size=1)
        if self._peak:
            pl_module.log("memory/peak_device_bytes", float(self._peak["device"]), batch_size=1)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_hooks()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count_bytes(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        engines = getattr(trainer.strategy, "engines", [])

        def is_parked(parameter: Tensor) -> bool:
            return any(engine.residency.is_parked(parameter) for engine in engines)

        counts = dict.fromkeys(ROLES, 0)
        for position, optimizer in enumerate(trainer.optimizers):
            for role, count in bytes_by_role(pl_module, optimizer, is_parked).items():
                if position == 0 or role in ("optimizer_state", "parked"):
                    counts[role] += count
        counts["device"] = counts["weights"] + counts["gradients"] + counts["optimizer_state"]
        self._peak = {role: max(count, self._peak.get(role, 0)) for role, count in counts.items()}


def _engine(trainer: L.Trainer) -> Any:
    return getattr(trainer.strategy, "hift", None)
