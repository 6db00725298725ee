"""One rank of many, planned in a process that is alone: collectives are counted, and nothing is sent.

torch's fake process group stands for the other ranks: a collective ends at once, as if they had what this rank has.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param, _fsdp_param_group
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.reduction import Ranks, Told
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.planner.fake_device import DEVICE
from hift_lightning.planner.trace import DeviceTrace
from hift_lightning.strategies import HiFTDDPStrategy, HiFTFSDP2Strategy
from hift_lightning.strategies.several_ranks import SeveralRanks

ALL_LAYERS = 10**6
"""More layers than a model has: one block of all, which is full fine-tuning."""


@dataclass(frozen=True)
class PlannedRanks:
    """The ranks that a step is planned for.

    Args:
        strategy: as the user has made it; `group_size` and the like are not looked at.
        devices: ranks of a machine.
        num_nodes: machines.

    Raises:
        ConfigurationError: if a number is not a whole one from 1 on.
    """

    strategy: HiFTDDPStrategy | HiFTFSDP2Strategy
    devices: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name, number in (("devices", self.devices), ("num_nodes", self.num_nodes)):
            if not isinstance(number, int) or number < 1:
                raise ConfigurationError(f"`trainer.{name}={number}` cannot be planned; give a whole number from 1 on.")

    @property
    def count(self) -> int:
        """All ranks."""
        return self.devices * self.num_nodes

    def planned_strategy(self, settings: HiFTSettings) -> Strategy:
        """A strategy of the same kind, for rank 0."""
        kind = _PlannedDDP if isinstance(self.strategy, HiFTDDPStrategy) else _PlannedFSDP2
        return kind(**vars(settings), **self.strategy.arguments_of_ranks)

    def environment(self) -> ClusterEnvironment:
        """What tells Lightning of the ranks."""
        return _FirstOfMany(self.count)

    @contextlib.contextmanager
    def process_group(self) -> Iterator[None]:
        """Within it, this process is rank 0 of the fake process group.

        Raises:
            ConfigurationError: if the process is a rank already.
        """
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            raise ConfigurationError(
                "Several ranks cannot be planned by a process that is a rank already; call `plan` in another process."
            )
        hook = sys.excepthook  # torch would put the rank before each line of a traceback, for ever
        dist.init_process_group(f"cpu:fake,{DEVICE.type}:fake", rank=0, world_size=self.count, store=FakeStore())
        assert dist.group.WORLD is not None
        dist.group.WORLD._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
        try:
            yield
        finally:
            dist.destroy_process_group()
            sys.excepthook = hook


@contextlib.contextmanager
def follow_gathered_weights(trace: DeviceTrace) -> Iterator[None]:
    """Within it, the trace is told of the weights that FSDP2 gathers, whose storages it empties and fills again."""

    def made_as(role: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def with_role(*args: Any, **kwargs: Any) -> Any:
            with trace.made_as(role):
                return function(*args, **kwargs)

        return with_role

    def resizing(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        def and_tell(tensor: Tensor) -> None:
            function(tensor)
            trace.resized(tensor)

        return and_tell

    of_parameter, of_group = _fsdp_param.FSDPParam, _fsdp_param_group
    gathering, reducing = "gathered weights", "gradients"
    with contextlib.ExitStack() as stack:
        for place, name, wrapped in (
            (_fsdp_param, "alloc_storage", resizing(_fsdp_param.alloc_storage)),
            (of_group, "alloc_storage", resizing(_fsdp_param.alloc_storage)),
            (_fsdp_param, "free_storage", resizing(_fsdp_param.free_storage)),
            (of_parameter, "init_all_gather_outputs", made_as(gathering, of_parameter.init_all_gather_outputs)),
            (of_group, "foreach_all_gather", made_as(gathering, _fsdp_collectives.foreach_all_gather)),
            (of_group, "foreach_reduce", made_as(reducing, _fsdp_collectives.foreach_reduce)),
        ):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, wrapped)
        yield


class _FirstOfMany(ClusterEnvironment):
    """Rank 0 of so many; nobody else is there."""

    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = 0

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks = ranks

    @staticmethod
    @override
    def detect() -> bool:
        return False

    @override
    def world_size(self) -> int:
        return self._ranks

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        return 0

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        return 0

    @override
    def node_rank(self) -> int:
        return 0


class _SameEverywhere(Told):
    """All ranks tell what this one does."""

    def __init__(self, numbers: tuple[int, ...], ranks: int) -> None:
        self._numbers, self._ranks = numbers, ranks

    @override
    def by_rank(self) -> list[list[int]]:
        return [list(self._numbers)] * self._ranks


class _AgreeingRanks(Ranks):
    """Ranks that always agree, since fake tensors have no values to tell."""

    @override
    def tell(self, *numbers: int) -> Told:
        return _SameEverywhere(numbers, self.size)


class _OneRank(SeveralRanks):
    """Mixed into a strategy, it makes groups and meshes of real numbers, while all other tensors are fake."""

    @override
    def setup_environment(self) -> None:
        with _disable_current_modes():
            self._ranks = _AgreeingRanks()
            super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        # it would broadcast whether SIGTERM has come, which here reads as yes
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        super().setup(trainer)


class _PlannedDDP(_OneRank, HiFTDDPStrategy):
    pass


class _PlannedFSDP2(_OneRank, HiFTFSDP2Strategy):
    pass
