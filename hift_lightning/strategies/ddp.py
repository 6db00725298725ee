"""``Trainer(strategy="hift_ddp")``: HiFT on several devices, each with the whole model and its own batches."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import Module
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.reduction import Ranks
from hift_lightning.engine.settings import check_switch
from hift_lightning.strategies.blockwise import BlockwiseTraining, averaging_later
from hift_lightning.strategies.refusals import refuse_arguments_of_ddp
from hift_lightning.strategies.several_ranks import SeveralRanks


class HiFTDDPStrategy(SeveralRanks, BlockwiseTraining, DDPStrategy):
    """Data-parallel HiFT: every device trains the same block on its own batches, and only that block is averaged.

    The module is not wrapped in ``DistributedDataParallel``, whose buckets have the size of the model and whose set of
    parameters is fixed. Gradients are averaged beside backward, bucket by bucket
    (:class:`~hift_lightning.engine.reduction.GradientReduction`), once per optimizer step whatever is accumulated.
    Weights are those of rank 0 from the start; buffers (BatchNorm's averages) are those of rank 0 at each batch after
    which gradients are sent.

    Args:
        shard_parked_state: split the parked state and masters over the ranks of a machine: each keeps and updates its
            share and gives the others the new weights (as ZeRO-1 does), which sends the block once more. While a
            checkpoint is saved, rank 0 holds the state of its machine once.
        bucket_cap_mb: most MiB of gradients that are sent together.
        arguments: those of :class:`~hift_lightning.strategies.blockwise.BlockwiseTraining` (``group_size``, ``order``
            and so on), and ``accelerator``, ``parallel_devices``, ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``, ``process_group_backend``, ``timeout`` and ``start_method`` of
            :class:`~lightning.pytorch.strategies.DDPStrategy`.

    Raises:
        ConfigurationError: if a value cannot work.
        MisconfigurationException: for arguments of DDP that assume its wrapper.
    """

    strategy_name = "hift_ddp"

    def __init__(self, *, shard_parked_state: bool = False, bucket_cap_mb: float = 25, **arguments: Any) -> None:
        refuse_arguments_of_ddp(arguments)
        check_switch("shard_parked_state", shard_parked_state)
        if bucket_cap_mb <= 0:
            raise ConfigurationError(f"`bucket_cap_mb={bucket_cap_mb}` must be above 0, in MiB; 25 is usual.")
        super().__init__(**arguments)
        self._shard_parked_state = shard_parked_state
        self._bucket_bytes = int(bucket_cap_mb * 2**20)
        self._of_machine: Ranks | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(cls.strategy_name, cls, description="Data-parallel HiFT")

    @property
    def arguments_of_ranks(self) -> dict[str, Any]:
        """What it was made with that concerns several ranks, for another one like it."""
        return {"shard_parked_state": self._shard_parked_state, "bucket_cap_mb": self._bucket_bytes / 2**20}

    @property
    @override
    def _needs_all_ranks(self) -> bool:
        return self._of_machine is not None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._shard_parked_state and self._of_machine is None:
            first = self.node_rank * self.num_processes
            members = list(range(first, first + self.num_processes))
            group = dist.new_group(members, self._timeout, use_local_synchronization=True)
            self._of_machine = Ranks(group, self._timeout)

    @override
    def choose_group_size(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        super().choose_group_size(trainer, module, batch)
        self.settings = self.broadcast(self.settings)  # batches, and so choices, may differ

    @override
    def prepare_model(self) -> None:
        assert self.model is not None
        if self._layer_sync is not None:
            self.model = self._layer_sync.apply(self.model)
        # before masters are taken from the weights
        states = itertools.chain(self.model.parameters(), self.model.buffers())
        self._ranks.send_from(0, [tensor.detach() for tensor in states])

    @override
    def engine_arguments(self) -> dict[str, Any]:
        return {"ranks": self._ranks, "bucket_bytes": self._bucket_bytes, "share_with": self._of_machine}

    @override
    def _setup_model(self, model: Module) -> Module:  # type: ignore[override]
        return model

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        if all(engine.averages_gradients for engine in self.engines):
            self._ranks.send_from(0, self.lightning_module.buffers())
        return super().training_step(*args, **kwargs)

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        with averaging_later(self.engines):
            yield

    @override
    def _complete(self, checkpoint: dict[str, Any]) -> None:
        super()._complete(checkpoint)
        if "optimizer_states" in checkpoint:  # not with `save_weights_only`
            checkpoint["optimizer_states"] = [
                engine.shares.gather_state(engine.optimizer, state)
                for engine, state in zip(self.engines, checkpoint["optimizer_states"], strict=True)
            ]
