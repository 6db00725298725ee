"""Clipping of the active block's gradients, where it has any."""

from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.types import Steppable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType

from hift_lightning.engine.hift import HiFT
from hift_lightning.strategies.refusals import not_with_fused


class BlockClipping:
    """Stands before a precision plugin's ``clip_gradients``, which hooks of a module and loops by hand call too.

    A block that no gradient reached, and one whose step is left out, have none, and torch's clipping by value fails on
    none at all. With ``update="fused"`` gradients are gone by then: their values have been clipped, or cannot be.

    Args:
        plugin: whose method it is.
        engines: that rotate optimizers; gradients of others are clipped as ever.
    """

    def __init__(self, plugin: Precision, engines: Sequence[HiFT]) -> None:
        self._plugin = plugin
        self._engines = engines

    def start(self) -> None:
        """Stand before it."""
        self._plugin.clip_gradients = self._clip  # type: ignore[method-assign]

    def stop(self) -> None:
        """Let the plugin's own be called again."""
        vars(self._plugin).pop("clip_gradients", None)

    def _clip(
        self,
        optimizer: Steppable,
        clip_val: float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        engine = next((each for each in self._engines if each.optimizer is own), None)
        if engine is not None:  # of several optimizers, whose gradients are averaged at a step otherwise
            engine.average_gradients(scaled=getattr(self._plugin, "scaler", None) is not None)
        if engine is not None and engine.settings.update == "fused":
            by_value = gradient_clip_algorithm == GradClipAlgorithmType.VALUE
            if clip_val > 0 and not (by_value and engine.clip_value == clip_val):
                raise MisconfigurationException(not_with_fused("`clip_gradients` clips those of the step"))
        elif engine is None or engine.has_gradient:
            clip = type(self._plugin).clip_gradients
            clip(self._plugin, optimizer, clip_val, gradient_clip_algorithm)  # type: ignore[arg-type]
