"""Which parameters require a gradient: those of the active block and no others, while training goes on."""

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.optimizers import parameters_in

GradientHook = Callable[[Tensor], None]
"""Called with a parameter when its gradient is there."""

_started: "weakref.WeakSet[Freezing]" = weakref.WeakSet()
"""Those that have been started and not stopped, of all models."""


def refuse_what_is_frozen_by_another(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise if parameters are frozen for a training which has not been finished.

    Args:
        parameters: that an optimizer shall train, by name.

    Raises:
        ConfigurationError: if it does; blocks would be cut of the active ones only.
    """

    def frozen() -> str | None:
        governed = {p for freezing in _started for p in freezing.governed.values() if not p.requires_grad}
        return next((name for name, p in parameters.items() if p in governed), None)

    if frozen() is not None:
        gc.collect()  # one that was dropped gives its model back when it goes
    if (name := frozen()) is not None:
        raise ConfigurationError(
            f"`{name}` is in the blocks of another HiFT, which has been started and not finished; call its `finish()` "
            "(or leave its `with`) before a new one is made of the same model, or, where two optimizers share the "
            "model, give each HiFT the other's as `others=[...]`."
        )


class Freezing:
    """Freezes all parameters but the active ones, and gives them back what they required before.

    Args:
        parameters: of the model, by name.
        optimizer: whose parameters must have no gradient out of turn.
        others: further optimizers on the same model, whose parameters are left alone.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, others: Sequence[Optimizer]
    ) -> None:
        self._alone = not others
        left_alone = parameters_in(*others)
        self.governed = {name: p for name, p in parameters.items() if p.requires_grad and p not in left_alone}
        """What is frozen and activated, by name."""
        self._name_of = {parameter: name for name, parameter in parameters.items()}
        self._optimizer = weakref.ref(optimizer)  # which knows the engine, that may be dropped in training
        optimized = parameters_in(optimizer)
        self._optimized_count = _count(optimizer)
        self._watched = list(dict.fromkeys([*self.governed.values(), *optimized]))
        self._required_grad: list[bool] | None = None
        self._active: list[nn.Parameter] = []
        self._handles: list[RemovableHandle] = []

    @property
    def started(self) -> bool:
        """Whether parameters are frozen."""
        return self._required_grad is not None

    def start(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Free all gradients, and freeze everything.

        Args:
            trained: what has a turn, by name.

        Raises:
            ConfigurationError: if somebody has frozen one of these.
        """
        frozen = next((name for name, parameter in trained.items() if not parameter.requires_grad), None)
        if frozen is not None:
            raise ConfigurationError(
                f"`{frozen}` has been frozen since the blocks were cut, and at its block's turn HiFT would train it; "
                "freeze it where the model is made (`__init__`, `configure_model`), or with `frozen=[...]` patterns; "
                "if another HiFT has, for another optimizer, give each the other's as `others=[...]`."
            )
        self._required_grad = [p.requires_grad for p in self.governed.values()]
        for parameter in self._watched:
            parameter.grad = None
        for parameter in self.governed.values():
            parameter.requires_grad_(False)
        _started.add(self)

    def stop(self) -> None:
        """Let every parameter require a gradient if it did before."""
        assert self._required_grad is not None
        self.deactivate()
        for parameter, required_grad in zip(self.governed.values(), self._required_grad, strict=True):
            parameter.requires_grad_(required_grad)
        _started.discard(self)
        self._required_grad = None

    def activate(
        self, parameters: Iterable[nn.Parameter], hooks_of: Callable[[nn.Parameter], Iterable[GradientHook]]
    ) -> None:
        """Let these require a gradient, and no others.

        Args:
            parameters: those of the active block.
            hooks_of: gives what is called when a parameter's gradient is there.
        """
        self.deactivate()
        self._active = list(parameters)
        for parameter in self._active:
            parameter.requires_grad_(True)
            for hook in hooks_of(parameter):
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def freeze_again(self) -> None:
        """Let what is governed require a gradient if it is active, and nothing else, and free the other gradients."""
        if not self.started:
            return
        active = set(self._active)
        for parameter in self.governed.values():
            parameter.requires_grad_(parameter in active)
            if parameter not in active:
                parameter.grad = None

    def deactivate(self) -> None:
        """Freeze what is active, and take its hooks away."""
        for parameter in self._active:
            parameter.requires_grad_(False)
        self._active = []
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def refuse_changes_by_others(self, block: str) -> None:
        """Raise if a parameter has a gradient and is not active, is active and frozen, or is new to the optimizer.

        Args:
            block: name of the active one, for the message.

        Raises:
            ConfigurationError: if one has.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        added = _count(optimizer) - self._optimized_count
        if added > 0:
            raise ConfigurationError(
                f"{added} parameters have come to the optimizer since the blocks were cut (`add_param_group`), and no "
                "block has them, so every step would train them; give them to it where it is made."
            )
        frozen = next((p for p in self._active if not p.requires_grad and p.grad is None), None)
        if frozen is not None and self._alone:  # of several optimizers one may be kept from the loss of another
            raise ConfigurationError(
                f"`{self._name_of[frozen]}` is in the active block `{block}` and has been frozen while training, and "
                "what is frozen so would be trained again at its next turn; freeze it where the model is made "
                "(`__init__`, `configure_model`), or with `frozen=[...]` patterns."
            )
        active = set(self._active)
        strange = next((p for p in self._watched if p.grad is not None and p not in active), None)
        if strange is not None:
            raise ConfigurationError(
                f"`{self._name_of[strange]}` has a gradient and is not in the active block `{block}`, so the "
                "step would train it too: something has set its `requires_grad`, which HiFT does. Leave that out, "
                "also for what is to be trained later only, or call `freeze_again()` after it (PEFT's "
                "`disable_adapter()`); what keeps a loss from the parameters of another optimizer is "
                "`toggle_optimizer`, or `hift_step`."
            )


def _count(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
