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
        active: tells whether training goes on by blocks; steps after its end are passed on at once.
    """

    _OWN_ATTRIBUTES = frozenset({"_scheduler", "_lr_update", "_cycles", "_skipped", "_active", "cycle", "held_steps"})
    """What is set on the stand-in itself; all else is set on the scheduler."""

    def __init__(
        self,
        scheduler: Any,
        lr_update: str,
        cycles: Callable[[], int],
        skipped: Callable[[], bool],
        active: Callable[[], bool],
    ) -> None:
        self._scheduler = scheduler
        self._lr_update = lr_update
        self._cycles = cycles
        self._skipped = skipped
        self._active = active
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
        if self._cycles() == self.cycle and self._active():
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            setattr(self._scheduler, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "_scheduler":  # not yet set, as while unpickling
            raise AttributeError(name)
        return getattr(self._scheduler, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that `isinstance` sees the scheduler, as with `weakref.proxy`
        return self._scheduler.__class__


class DelayedSchedulers:
    """The schedulers of one optimizer, each stepped once per optimizer step, and what a checkpoint keeps of them.

    Args:
        lr_update: see :class:`~hift_lightning.engine.settings.HiFTSettings`.
        cycles: gives the number of whole cycles performed so far.
        skipped: tells whether the last optimizer step was left out.
        active: tells whether training goes on by blocks.
    """

    def __init__(
        self, lr_update: str, cycles: Callable[[], int], skipped: Callable[[], bool], active: Callable[[], bool]
    ) -> None:
        self._lr_update = lr_update
        self._cycles = cycles
        self._skipped = skipped
        self._active = active
        self._delayed: list[DelayedLRScheduler] = []
        self._loaded: list[tuple[int, int | None]] = []  # of a checkpoint, for schedulers still to come
        self._has_undelayed = False

    def __bool__(self) -> bool:
        return bool(self._delayed)

    def delay(self, scheduler: Any) -> Any:
        """Give the scheduler to step: a :class:`DelayedLRScheduler`, or itself where ``lr_update`` is ``step``."""
        if any(scheduler is one for one in self._delayed):
            return scheduler
        held = 0
        if type(scheduler) is DelayedLRScheduler:  # of a training that has ended
            scheduler, held = scheduler._scheduler, scheduler.held_steps
        if self._lr_update == "step":
            self._has_undelayed = True
            return scheduler
        delayed = DelayedLRScheduler(scheduler, self._lr_update, self._cycles, self._skipped, self._active)
        delayed.held_steps = held
        if self._loaded:
            delayed.resume(*self._loaded.pop(0))
        self._delayed.append(delayed)
        return delayed

    def pass_on(self) -> None:
        """Let the rate change if a cycle has ended; at the latest an update does so itself."""
        for scheduler in self._delayed:
            scheduler.pass_on()

    def update_ends(self) -> None:
        """Forget what was loaded: a scheduler that comes after an update begins anew."""
        self._loaded.clear()

    def state_dict(self) -> dict[str, list[int]]:
        """The steps that are held, and the cycle of which they are."""
        return {
            "held_lr_steps": [scheduler.held_steps for scheduler in self._delayed],
            "lr_cycles": [scheduler.cycle for scheduler in self._delayed],
        }

    def load_state_dict(self, state_dict: dict[str, Any], *, same_cycles: bool) -> None:
        """Go on where a run was saved; a scheduler that it did not have is left as it is, as Lightning does.

        Args:
            state_dict: what :meth:`state_dict` gave; other keys are passed over.
            same_cycles: whether cycles are counted as they were; otherwise the steps are held for the present one.
        """
        held = state_dict["held_lr_steps"]
        cycles = state_dict["lr_cycles"] if same_cycles else [None] * len(held)
        saved = list(zip(held, cycles, strict=True))
        for scheduler, one in zip(self._delayed, saved, strict=False):
            scheduler.resume(*one)
        self._loaded = saved[len(self._delayed) :]
        if self._has_undelayed and any(held):
            warnings.warn(
                f"The checkpoint is from within a cycle, through which the learning rate was held, and with "
                f"`lr_update='step'` the schedule goes on {max(held)} steps behind; go on with "
                "the `lr_update` that it was made with, or from a checkpoint of the end of a cycle.",
                stacklevel=3,
            )
