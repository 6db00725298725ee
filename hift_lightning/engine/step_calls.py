"""When the optimizer's own step begins and ends, whoever calls it: a plain loop, Fabric, Lightning or a GradScaler."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from torch.optim import Optimizer

from hift_lightning.engine.errors import ConfigurationError


class StepCalls:
    """Hangs on an optimizer's step hooks until :meth:`stop`.

    torch wraps the `step` of every class of optimizer, so where one calls that of its base class the hooks run twice.
    The frame of the outer call tells them apart.

    Args:
        optimizer: whose steps are watched.
        before: called before all else.
        begin: called when all gradients are there: after the closure, if the step is given one.
        end: called after the step.
        around_closure: entered for the closure, which runs forward and backward.
        goes_last: whether no step pre-hook may come after this one, since it uses the gradients up.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[], None],
        begin: Callable[[], None],
        end: Callable[[], None],
        around_closure: Callable[[], AbstractContextManager[None]],
        goes_last: bool,
    ) -> None:
        self._optimizer = optimizer
        self._before, self._begin, self._end, self._around_closure = before, begin, end, around_closure
        self._goes_last = goes_last
        self._call: FrameType | None = None  # of the optimizer's step, while it runs
        self._pre_hook = optimizer.register_step_pre_hook(self._before_step)
        self._post_hook = optimizer.register_step_post_hook(self._after_step)

    def stop(self) -> None:
        """Detach from the optimizer."""
        self._pre_hook.remove()
        self._post_hook.remove()

    def forget(self) -> None:
        """Let go of a step that has failed, whose frame would keep what it has left."""
        self._call = None

    def go_after_other_hooks(self) -> None:
        """Let step pre-hooks that others have registered since see the gradients first."""
        hooks: Any = self._optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(self._pre_hook.id)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._call is not None and _is_running(self._call):
            return None
        self._call = sys._getframe(1)
        self._before()
        optimizer_itself, *positional = args
        closure = positional[0] if positional else kwargs.get("closure")
        if not callable(closure):  # none, or an argument that only this optimizer knows
            self._refuse_later_hooks()
            self._begin()
            return None

        def closure_then_update() -> Any:
            with self._around_closure():
                result = closure()
            self._begin()
            return result

        if positional:
            return (optimizer_itself, closure_then_update, *positional[1:]), kwargs
        return args, {**kwargs, "closure": closure_then_update}

    def _refuse_later_hooks(self) -> None:
        hooks: Any = self._optimizer._optimizer_step_pre_hooks
        if self._goes_last and next(reversed(hooks)) != self._pre_hook.id:
            raise ConfigurationError(
                f"A step pre-hook was registered on `{type(self._optimizer).__name__}` after training began, and with "
                "updates in pieces it would see no gradient any more; register it before, or call "
                "`update_after_hooks()` after it."
            )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sys._getframe(1) is self._call:
            self._call = None
            self._end()


def _is_running(call: FrameType) -> bool:
    """Whether a call is still on the stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return frame is not None
