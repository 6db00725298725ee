"""Delayed learning-rate update: the rate is held through a cycle (HiFT, arXiv 2401.15207)."""

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from hift_lightning.engine.errors import ConfigurationError


def warn_of_cycle_at_0(optimizer: Optimizer, lr_update: str, cycle_length: int) -> None:
    """Warn of a rate of 0 that is held through a cycle, as that of a warm-up may be.

    Args:
        optimizer: which is about to do the first step of a cycle.
        lr_update: for the message.
        cycle_length: optimizer steps.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    if all(rate is not None and float(rate) == 0 for rate in rates):
        warnings.warn(
            f"The learning rate is 0, and `lr_update={lr_update!r}` holds it through a cycle, so the first "
            f"{cycle_length} steps change nothing; use `lr_update='step'`, or a warm-up that begins above 0.",
            stacklevel=3,
        )


class DelayedLRScheduler:
    """A stand-in for a scheduler that counts its steps and passes them on when a cycle has ended.

    Everything else (state dict, attributes, ``isinstance``) is the scheduler's own, so checkpoints, the
    learning-rate monitor and user code see what they know.

    Args:
        scheduler: any learning-rate scheduler that is stepped once per optimizer step, without arguments.
        lr_update: ``"cycle"`` passes on all steps counted in the cycle, so the scheduler's horizon in optimizer
            steps holds; ``"cycle_once"`` passes on one, as the published code does.
        cycles: gives the number of whole cycles performed so far.
        skipped: tells whether the last optimizer step was left out; such a step does not count.
    """

    def __init__(
        self,
        scheduler: Any,
        lr_update: str,
        cycles: Callable[[], int],
        skipped: Callable[[], bool] = lambda: False,
    ) -> None:
        self._scheduler = scheduler
        self._lr_update = lr_update
        self._cycles = cycles
        self._skipped = skipped
        self.cycle = cycles()
        """The cycle of which steps are held."""
        self.held_steps = 0
        """Steps counted in this cycle and not yet passed on."""

    def resume(self, held_steps: int, cycle: int | None = None) -> None:
        """Go on where a run was saved.

        Args:
            held_steps: what :attr:`held_steps` was.
            cycle: what :attr:`cycle` was; ``None`` for the present one.
        """
        self.cycle = self._cycles() if cycle is None else cycle
        self.held_steps = held_steps

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Count one step; at the end of a cycle pass the counted steps on.

        Raises:
            ConfigurationError: if called with arguments (an epoch), which cannot be counted.
        """
        if args or kwargs:
            raise ConfigurationError(
                f"`{type(self._scheduler).__name__}.step` was called with arguments {args or kwargs}, and a delayed "
                "learning rate counts plain steps; call it without, or use `lr_update='step'`."
            )
        if self._skipped():
            return
        self.held_steps += 1
        self.pass_on()

    def pass_on(self) -> None:
        """Pass the counted steps on if their cycle has ended; before a step, of one that is not stepped after each."""
        if self._cycles() == self.cycle:
            return
        self.cycle = self._cycles()
        for _ in range(self.held_steps if self._lr_update == "cycle" else min(1, self.held_steps)):
            self._scheduler.step()
        self.held_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the scheduler's own state."""
        self._scheduler.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        if name == "_scheduler":  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that `isinstance` sees the scheduler, as with `weakref.proxy`
        return self._scheduler.__class__
