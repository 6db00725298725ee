"""What the LightningModules of the application share: a network, its optimizer and its schedule."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hift_lightning.engine.errors import ConfigurationError

OptimizerFactory = Callable[[list[dict[str, Any]]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class OptimizedModule(L.LightningModule):
    """A network with an optimizer and, where there is one, a schedule.

    Args:
        network: what is trained.
        optimizer: called with parameter groups, it returns the optimizer.
        scheduler: called with the optimizer and the number of optimizer steps planned, it returns a scheduler
            that is stepped once per optimizer step; `None` for a rate that stays.

    Raises:
        ConfigurationError: the optimizer or the scheduler refuses its arguments.
    """

    measured: tuple[str, ...] | None = None
    """What is logged of validation and test, as `val/<name>` and `test/<name>`; `None` where that is not told."""

    def __init__(
        self, network: nn.Module, optimizer: OptimizerFactory, scheduler: SchedulerFactory | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self._optimizer = optimizer
        self._scheduler = scheduler
        # so that an argument which cannot work is told here, and not after the test before training
        check_optimizer(optimizer, scheduler)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and, where there is one, the scheduler.

        Raises:
            ConfigurationError: there is a scheduler and the run has no end.
        """
        total_steps = self.trainer.estimated_stepping_batches
        if self._scheduler is not None and total_steps == float("inf"):
            raise ConfigurationError(
                "The `scheduler` has to know when the run ends; give `trainer.max_epochs` or `trainer.max_steps`."
            )
        groups = parameter_groups(self.named_parameters())
        steps = 0 if self._scheduler is None else int(total_steps)
        optimizer, scheduler = _build(self._optimizer, self._scheduler, groups, steps)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def check_optimizer(optimizer: OptimizerFactory, scheduler: SchedulerFactory | None) -> None:
    """Build both for a parameter of one element, to find out whether their arguments can work.

    Args:
        optimizer: as :class:`OptimizedModule` is given it.
        scheduler: likewise.

    Raises:
        ConfigurationError: the optimizer or the scheduler refuses its arguments.
    """
    _build(optimizer, scheduler, [{"params": [nn.Parameter(torch.zeros(1, 1))]}], total_steps=1)


def _build(
    make_optimizer: OptimizerFactory,
    make_scheduler: SchedulerFactory | None,
    groups: list[dict[str, Any]],
    total_steps: int,
) -> tuple[Optimizer, LRScheduler | None]:
    place, make = "optimizer", cast(Callable[..., Any], make_optimizer)
    try:
        optimizer = make_optimizer(groups)
        if make_scheduler is None:
            return optimizer, None
        place, make = "scheduler", make_scheduler
        return optimizer, make_scheduler(optimizer, total_steps)
    except ConfigurationError:
        raise
    except (TypeError, ValueError, IndexError) as error:
        values = ", ".join(f"`{place}.{key}={value}`" for key, value in getattr(make, "keywords", {}).items())
        raise ConfigurationError(
            f"The `{place}` cannot be built from its values: {error}; it was given {values or 'none'}; change what "
            f"cannot work, and leave out what it does not know, as in `~{place}.name`."
        ) from error


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Split parameters in two groups: matrices with the optimizer's own weight decay, all else with none.

    Biases and the scales of norms have one dimension; pulling them to zero changes what a layer computes
    without making it simpler.

    Args:
        parameters: names and parameters, as `named_parameters()` gives them.
    """
    named = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for _, parameter in named if parameter.ndim >= 2]},
        {"params": [parameter for _, parameter in named if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
