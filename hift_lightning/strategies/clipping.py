"""Clipping of the active block's gradients, where it has any."""

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.nn import Module

from hift_lightning.engine.hift import HiFT
from hift_lightning.strategies.refusals import not_with_fused


class BlockClipping:
    """Stands before a precision plugin's ``clip_gradients``, which hooks of a module and loops by hand call too.

    A block that no gradient reached, and one whose step is left out, have none, and torch's clipping by value fails on
    none at all; there a module's own ``configure_gradient_clipping`` is not called either. With ``update="fused"``
    gradients are gone by then: their values have been clipped, or cannot be.

    Args:
        plugin: whose methods they are.
        engines: that rotate optimizers; gradients of others are clipped as ever.
    """

    def __init__(self, plugin: Precision, engines: Sequence[HiFT]) -> None:
        self._plugin = plugin
        self._engines = engines

    def start(self) -> None:
        """Stand before it."""
        self._plugin.clip_gradients = self._clip  # type: ignore[method-assign]
        self._plugin._clip_gradients = self._call_hook  # type: ignore[method-assign]

    def stop(self) -> None:
        """Let the plugin's own be called again."""
        vars(self._plugin).pop("clip_gradients", None)
        vars(self._plugin).pop("_clip_gradients", None)

    def _engine_of(self, optimizer: Steppable) -> HiFT | None:
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return next((engine for engine in self._engines if engine.optimizer is own), None)

    def _call_hook(self, model: Module, optimizer: Steppable, *args: Any, **kwargs: Any) -> None:
        engine = self._engine_of(optimizer)
        if engine is None or engine.settings.update == "fused" or engine.has_gradient:
            type(self._plugin)._clip_gradients(self._plugin, model, optimizer, *args, **kwargs)

    def _clip(
        self,
        optimizer: Steppable,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        engine = self._engine_of(optimizer)
        if engine is not None:  # of several optimizers, whose gradients are averaged at a step otherwise
            engine.average_gradients(scaled=getattr(self._plugin, "scaler", None) is not None)
        if engine is not None and engine.settings.update == "fused":
            by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
            if clip_val > 0 and not (by_value and engine.clip_value == clip_val):
                raise MisconfigurationException(not_with_fused("`clip_gradients` clips those of the step"))
        elif engine is None or engine.has_gradient:
            clip = type(self._plugin).clip_gradients
            clip(self._plugin, optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[arg-type]
