"""``Trainer(strategy="hift_fsdp2")``: HiFT with the weights sharded over several devices (FSDP2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn import Embedding, Module
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric
from typing_extensions import override

from hift_lightning.engine.errors import ConfigurationError, add_note
from hift_lightning.engine.partition import partition
from hift_lightning.engine.pinned import can_pin
from hift_lightning.engine.settings import check_switch
from hift_lightning.strategies.blockwise import BlockwiseTraining
from hift_lightning.strategies.refusals import refuse_callbacks_that_average
from hift_lightning.strategies.sharded_checkpoints import ShardedCheckpoints
from hift_lightning.strategies.sharding import (
    modules_to_shard,
    refuse_mixed_dtypes,
    refuse_what_cannot_be_sharded,
    refuse_what_was_not_sharded,
    same_on_all_ranks,
)

_PRIMITIVES = int | float | str | bool | None
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class HiFTFSDP2Strategy(ShardedCheckpoints, BlockwiseTraining, ModelParallelStrategy):
    """HiFT with weights, gradients, optimizer state and masters sharded over the devices, of an unchanged module.

    The strategy itself calls :func:`~torch.distributed.fsdp.fully_shard` on each layer. All layers are gathered for the
    forward pass, one after the other; in backward those from the active block upwards; and only the active block's
    gradients are reduced, after each backward pass. Every rank steps its own rows, so optimizers have to treat each
    element by itself.

    Where ranks start with different weights, those of rank 0 count.

    Args:
        data_parallel_size: devices that share one copy of the model; ``"auto"``: all of them, and nothing else can be.
        tensor_parallel_size: 1.
        mp_policy: dtypes of computation and of communication, as a
            :class:`~torch.distributed.fsdp.MixedPrecisionPolicy` or as its arguments with dtypes by name, such as
            ``{"param_dtype": "bfloat16", "reduce_dtype": "float32"}``. Weights stay as they are, so fp32 weights are
            their own masters.
        offload_params: keep the shards of all weights in host memory, and step them there. On the device are then only
            the layers that are being computed.
        whole: shell-style patterns on names of modules that are gathered at the start of a step and not when they are
            called, since something else uses their weights.
        save_distributed_checkpoint: save checkpoints as folders, into which each rank writes what it holds; otherwise
            as one file, which rank 0 puts together in host memory and which every HiFT strategy and a plain Trainer
            can load. Both kinds are loaded, whatever is set here.
        arguments: those of :class:`~hift_lightning.strategies.blockwise.BlockwiseTraining` (``group_size``, ``order``
            and so on), and ``process_group_backend`` and ``timeout`` of
            :class:`~lightning.pytorch.strategies.ModelParallelStrategy`.

    Raises:
        ConfigurationError: if a value cannot work.
    """

    strategy_name = "hift_fsdp2"
    _always_sets_up_itself = True  # Lightning's own wants a module that shards itself

    def __init__(
        self,
        *,
        data_parallel_size: int | str = "auto",
        tensor_parallel_size: int = 1,
        mp_policy: MixedPrecisionPolicy | Mapping[str, Any] | None = None,
        offload_params: bool = False,
        whole: Sequence[str] = (),
        save_distributed_checkpoint: bool = True,
        **arguments: Any,
    ) -> None:
        if tensor_parallel_size != 1:
            raise ConfigurationError(
                f"`tensor_parallel_size={tensor_parallel_size!r}` splits single matrices over devices, which HiFT does "
                "not do; leave it at 1, and all devices share the layers."
            )
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **arguments,
        )
        if self.settings.group_size == "auto":
            raise ConfigurationError(
                "`group_size='auto'` plans for one device with the whole model on it, and `hift_fsdp2` shards it; give "
                "`group_size` a number."
            )
        for name, value in (
            ("offload_params", offload_params),
            ("save_distributed_checkpoint", save_distributed_checkpoint),
        ):
            check_switch(name, value)
        self._mp_policy = parse_mp_policy(mp_policy)
        self._offload_params = offload_params
        self._whole = whole
        self._laid_out = False

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register(cls.strategy_name, cls, description="Sharded HiFT")

    @property
    def arguments_of_ranks(self) -> dict[str, Any]:
        """What it was made with that concerns several ranks, for another one like it."""
        return {"mp_policy": self._mp_policy, "offload_params": self._offload_params, "whole": self._whole}

    @override
    def _get_process_group_backend(self) -> str:
        backend = super()._get_process_group_backend()
        device = self.root_device.type
        if self._process_group_backend is None and self._offload_params and device != "cpu":
            return f"cpu:gloo,{device}:{backend}"  # norms of gradients in host memory are sums over the ranks too
        return backend

    @override
    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if self._data_parallel_size not in ("auto", ranks):
            raise ConfigurationError(
                f"`data_parallel_size={self._data_parallel_size!r}` is not the number of devices, {ranks}, and weights "
                "are sharded over all of them; leave it out."
            )
        self._data_parallel_size = ranks
        super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigurationError(
                "`precision='16-mixed'` looks for overflows in all gradients, and a rank has some rows of each; use "
                "`precision='bf16-mixed'`, or `mp_policy={'param_dtype': 'bfloat16', 'reduce_dtype': 'float32'}`."
            )
        if trainer.state.fn == TrainerFn.FITTING:
            refuse_callbacks_that_average(trainer)
        super().setup(trainer)

    @override
    def prepare_model(self) -> None:
        module = self.lightning_module
        assert module is not None
        if isinstance(module, FSDPModule):  # by an earlier `fit` or `test`
            module.reshard()
            refuse_what_was_not_sharded(module)
            return
        refuse_what_cannot_be_sharded(module)
        if self._layer_sync is not None:
            self._layer_sync.apply(module)
        if not self.settings.master_weights:
            self.precision_plugin.convert_module(module)
        names = [name for name, _ in module.named_parameters()]  # also those that are never trained
        plan = partition(module, layers=self.settings.layers, trainable=names)
        mesh = self.device_mesh["data_parallel"]
        pin = can_pin(self.root_device.type)
        offload = CPUOffloadPolicy(pin_memory=pin) if self._offload_params else OffloadPolicy()
        for part in [*modules_to_shard(module, plan, self._whole), module]:
            # one after the other, so that the device never holds more than one of them whole
            refuse_mixed_dtypes(module, part)
            same_on_all_ranks(part, self._ranks, self.root_device)
            fully_shard(part, mesh=mesh, mp_policy=self._mp_policy, offload_policy=offload)
            if part is not module:
                part.register_forward_hook(_note_what_backward_needs)
        for name in _STEPS:
            if is_overridden(name, module):
                # so that parameters of the module itself, and tied ones, are whole in it
                register_fsdp_forward_method(module, name)

    @override
    def model_to_device(self) -> None:
        module = self.lightning_module
        assert module is not None
        if not self._offload_params:
            super().model_to_device()
            return
        # `fully_shard` has moved all that is computed with; weights stay in host memory
        _update_properties(module, device=self.root_device)
        for part in module.modules():
            if isinstance(part, Metric):
                part.to(self.root_device)

    @override
    def _setup_model(self, model: Module) -> Module:
        _lay_out_communication(model)
        self._laid_out = True
        return model

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        assert isinstance(module, FSDPModule)
        module.reshard()  # after a micro-batch without a backward pass
        for part in _sharded(module)[1:]:
            part.set_unshard_in_backward(False)
        self._ranks.send_from(0, module.buffers())
        return super().training_step(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        assert isinstance(self.lightning_module, FSDPModule)
        # a forward pass that no backward pass follows leaves it whole, and what is whole is frozen as it was then
        self.lightning_module.reshard()
        return result

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if len(self.optimizers) > 1:
            # gradients of one of them only are asked for in backward, by parameters that are not in the graph here
            raise ConfigurationError(
                f"There are {len(self.optimizers)} optimizers, and on sharded weights HiFT rotates one; use "
                "`strategy='hift_ddp'`, or one optimizer with several param groups."
            )

    @override
    def _finish(self) -> None:
        super()._finish()
        if self.lightning_module is not None:
            for part in _sharded(self.lightning_module)[1:]:
                part.set_unshard_in_backward(True)  # as torch has it, for whoever trains the module next

    @override
    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # which may still be writing; Lightning leaves this out where it shards

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if "mixed torch.Tensor and DTensor" in str(exception):
            add_note(
                exception,
                "`hift_fsdp2` gathers weights when their module is called, and here some were used without calling it; "
                "name that module in `HiFTFSDP2Strategy(whole=[...])`, and it is gathered at the start of a step.",
            )
        module = self.lightning_module
        if self._laid_out and isinstance(module, FSDPModule):
            module.reset_iter_state()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        # what is not in a layer stays whole after a forward pass that no backward pass follows
        if isinstance(self.lightning_module, FSDPModule):
            self.lightning_module.reshard()


def parse_mp_policy(policy: MixedPrecisionPolicy | Mapping[str, Any] | None) -> MixedPrecisionPolicy:
    """Make a mixed precision policy of what a user or a configuration file gives.

    Args:
        policy: one; or its arguments, with dtypes or their names; ``None`` for one that changes nothing.

    Raises:
        ConfigurationError: if there is no such argument or dtype.
    """
    if policy is None or isinstance(policy, MixedPrecisionPolicy):
        return policy or MixedPrecisionPolicy()
    arguments: dict[str, Any] = {}
    for name, value in policy.items():
        if name not in MixedPrecisionPolicy.__dataclass_fields__:
            known = ", ".join(MixedPrecisionPolicy.__dataclass_fields__)
            raise ConfigurationError(f"`mp_policy` has no `{name}`; it takes {known}.")
        if name.endswith("_dtype") and isinstance(value, str):
            dtype = getattr(torch, value, None)
            if not isinstance(dtype, torch.dtype):
                raise ConfigurationError(f"`mp_policy.{name}={value!r}` is no dtype; write it like `bfloat16`.")
            value = dtype
        arguments[name] = value
    return MixedPrecisionPolicy(**arguments)


def _sharded(module: Module) -> list[FSDPModule]:
    """The modules that `fully_shard` was called on, the root first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _lay_out_communication(root: Module) -> None:
    """Let FSDP2 lay out its communication now, while every parameter requires a gradient.

    It does so in the first forward pass, and takes the dtypes of gradients from the parameters that require one then:
    of a layer that is frozen at that time it has none, and fails when the layer's turn comes
    (`FSDPParamGroup._init_mp_dtypes`). Its buffers are allocated too, or an evaluation under `inference_mode` would
    make them ones that autograd refuses later.
    """
    name = "hift_first_forward"
    setattr(root, name, lambda: None)
    register_fsdp_forward_method(root, name)
    with torch.no_grad():
        getattr(root, name)()
    delattr(root, name)
    for part in _sharded(root):
        part.unshard()
        part.reshard()


def _note_what_backward_needs(module: Module, args: Any, output: Any) -> None:
    """Have a layer gathered in backward if backward may come to it, and needs its weights.

    FSDP2 gathers the layer below in advance, which is for nothing below the active block.
    """
    # what is neither a tensor nor a primitive may hold a tensor
    reached = any(
        leaf.requires_grad if isinstance(leaf, Tensor) else not isinstance(leaf, _PRIMITIVES)
        for leaf in tree_leaves(output)
    )
    if reached and not _looks_up(module):
        assert isinstance(module, FSDPModule)
        module.set_unshard_in_backward(True)


def _looks_up(module: Module) -> bool:
    """Whether it gives out rows of its weights as they are, so that their gradients do not depend on weights."""
    plain = getattr(module.forward, "__func__", None) is Embedding.forward
    return plain and any(name == "weight" for name, _ in module.named_parameters(recurse=False))
