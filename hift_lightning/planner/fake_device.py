"""A second device on which nothing is computed: tensors with a shape, a dtype and no memory.

torch's `FakeTensorMode` (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html) runs every op on shapes
alone. The device type is "lazy", for which no build of torch has kernels, so nothing of a real accelerator is touched.
Where torch decides by the kind of device, fake tensors follow what it does on CUDA: attention takes the fused kernels,
autocast its lists of ops.
"""

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import Optimizer, optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

DEVICE = torch.device("lazy", 0)

_KERNELS = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def _is_fake(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError("fake tensors are not computed with")


# CUDA has kernels for these; without one for the device torch would take them apart into other ops.
for _name in ("silu_backward", "mish_backward"):
    _KERNELS.impl(_name, _is_fake, "Lazy")  # type: ignore[no-untyped-call]


class FakeAccelerator(Accelerator):
    """The fake device as Lightning sees it."""

    @override
    def setup_device(self, device: torch.device) -> None:
        pass

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @override
    def teardown(self) -> None:
        pass

    @staticmethod
    @override
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    @override
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE] * devices  # one of them is planned

    @staticmethod
    @override
    def auto_device_count() -> int:
        return 1

    @staticmethod
    @override
    def is_available() -> bool:
        return True

    @staticmethod
    @override
    def name() -> str:
        return DEVICE.type


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, every new tensor is fake, and attention is that of CUDA."""
    setattr(torch, DEVICE.type, _device_module())
    only_on_cpu = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` is made on the CPU, and fake then
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            _FusedAttention(),
            _fused_optimizers(),
            _no_packed_sequences(),
        ):
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(only_on_cpu)
        delattr(torch, DEVICE.type)


def _device_module() -> ModuleType:
    """What activation checkpointing and FSDP2 ask torch for by a device's name: the CPU's, which has no streams."""
    module = ModuleType(f"torch.{DEVICE.type}")
    names = ("Event", "StreamContext", "device_count", "is_available", "is_initialized", "stream", "synchronize")
    vars(module).update({name: getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)})
    module.Stream = _NoStream  # type: ignore[attr-defined]
    module.current_stream = lambda device=None: _NoStream()  # type: ignore[attr-defined]
    module.current_device = lambda: DEVICE.index  # type: ignore[attr-defined]
    return module


class _NoStream(torch.cpu.Stream):
    """All ops come one after the other."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def wait_event(self, event: Any) -> None:
        pass


@contextlib.contextmanager
def _fused_optimizers() -> Iterator[None]:
    """Within it, `fused=True` may be used as on CUDA."""
    module: Any = optimizer
    known = module._get_fused_kernels_supported_devices
    module._get_fused_kernels_supported_devices = lambda: [*known(), DEVICE.type]
    try:
        yield
    finally:
        module._get_fused_kernels_supported_devices = known


@contextlib.contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Within it, models of transformers take a batch without attention mask for rows of one sequence each.

    They look at the values of the positions to find out; those of fake tensors cannot be read, and then they mask.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:
        yield
        return
    find = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = find


def fake_copy(module: L.LightningModule, dtype: torch.dtype | None) -> L.LightningModule:
    """Copy a module, with its parameters and buffers as fake tensors on the fake device; its values are not copied.

    Call it within :func:`fake_tensors`.

    Args:
        module: on any device, "meta" among them.
        dtype: of the copy's floating-point tensors; ``None`` for the same as the module's.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        fake = nn.Parameter(_fake(parameter, DEVICE, dtype), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = fake
    for buffer in module.buffers():
        memo[id(buffer)] = _fake(buffer, DEVICE, dtype)
    with _disable_current_modes():  # what is neither, such as the state of a metric, is copied as it is
        fake_module = copy.deepcopy(module, memo)
    if is_overridden("configure_optimizers", module):
        configure = fake_module.configure_optimizers
        fake_module.configure_optimizers = lambda: _for_copy(configure(), module, fake_module)  # type: ignore[method-assign]
    # Its tensors are where and what they should be, and `Module.to` cannot change fake ones.
    fake_module._apply = lambda fn, recurse=True: fake_module  # type: ignore[method-assign]
    # Metrics look at values, and there are none; nor are there any to be logged, or for callbacks to watch.
    for metric in fake_module.modules():
        if isinstance(metric, MetricCollection):
            metric._enable_compute_groups = False  # found by comparing values
        elif isinstance(metric, Metric):
            for method in ("forward", "update", "compute"):
                setattr(metric, method, _no_value)
    fake_module._log_hyperparams = False  # which copies them, and a tensor among them has values
    fake_module.configure_callbacks = list  # type: ignore[method-assign]
    fake_module.log = fake_module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    return fake_module


def _for_copy(configured: Any, module: nn.Module, fake_module: nn.Module) -> Any:
    """What `configure_optimizers` returned, with the copy's parameters if it was made of the module's own.

    That is so of an optimizer from before the copy was made, as LightningCLI's is.
    """
    optimizers = [leaf for leaf in tree_leaves(configured) if isinstance(leaf, Optimizer)]
    held = {parameter for each in optimizers for group in each.param_groups for parameter in group["params"]}
    if held.isdisjoint(module.parameters()):
        return configured
    fakes = dict(fake_module.named_parameters())
    memo: dict[int, Any] = {id(parameter): fakes[name] for name, parameter in module.named_parameters()}
    with _disable_current_modes():
        for each in optimizers:
            # whole: what `Optimizer.__getstate__` leaves out too, but for the `step` that a scheduler has wrapped
            memo[id(each)] = twin = object.__new__(type(each))
            own = {name: value for name, value in vars(each).items() if name != "step"}
            vars(twin).update(copy.deepcopy(own, memo))
        return copy.deepcopy(configured, memo)


def _no_value(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros((), device=DEVICE)


def fake_batch(batch: Any) -> Any:
    """The batch with fake tensors on the host."""
    return apply_to_collection(batch, Tensor, lambda tensor: _fake(tensor, torch.device("cpu"), None))


def _fake(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


class _Mode(TorchFunctionMode):
    """A function mode that holds in backward too, where activation checkpointing runs forward functions again."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.backward:
            return self.call(func, args, kwargs or {})
        with self:  # which torch has taken off the stack for this call
            return _backward(*args, **(kwargs or {}))

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do what the function does on the fake device."""
        raise NotImplementedError


def _backward(
    tensor: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """`Tensor.backward`, which would take function modes off the stack, and so would `torch.autograd.backward`."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    _engine_run_backward((tensor,), (gradient,), keep, create_graph, tuple(inputs or ()), True, accumulate_grad=True)


class _FusedAttention(_Mode):
    """Attention by the kernels that CUDA would take; the lazy device has the plain one, which keeps all scores."""

    @override
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is scaled_dot_product_attention and _has_fused_kernels(*args[:3], **kwargs):
            func = _attention
        return func(*args, **kwargs)


def _has_fused_kernels(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> bool:
    """Of four dimensions, with the same first ones and the same width."""
    heads = slice(1) if options.get("enable_gqa") else slice(2)
    same = query.shape[heads] == key.shape[heads] == value.shape[heads] and query.shape[-1] == value.shape[-1]
    return query.dim() == key.dim() == value.dim() == 4 and same


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    aten = torch.ops.aten
    if attn_mask is None:
        result, *_ = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return result  # type: ignore[no-any-return]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask.logical_not(), float("-inf"))
    bias = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    result, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )
    return result  # type: ignore[no-any-return]


# fmt: off
_LOWER_PRECISION = {
    "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "addr",
    "chain_matmul", "einsum", "multi_dot", "vecdot", "prelu", "gru_cell", "lstm_cell", "rnn_relu_cell",
    "rnn_tanh_cell", "scaled_dot_product_attention",
}
_FLOAT32 = {
    "acos", "asin", "binary_cross_entropy_with_logits", "cdist", "cosh", "cosine_embedding_loss",
    "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm",
    "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2",
    "log_softmax", "logsumexp", "margin_ranking_loss", "mse_loss", "nll_loss", "norm", "pdist", "poisson_nll_loss",
    "pow", "__pow__", "__rpow__", "prod", "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh", "smooth_l1_loss",
    "soft_margin_loss", "softmax", "softplus", "sum", "tan", "triplet_margin_loss",
}
# fmt: on


class FakeAutocast(_Mode):
    """Autocast for the fake device, by CUDA's lists of ops.

    See https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior. Casts of parameters that require a
    gradient are made once in a forward pass, those of frozen ones at each use, as there.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._casts: dict[int, Tensor] = {}

    def forget_casts(self) -> None:
        """End a forward pass: the graph keeps those casts of parameters that backward needs."""
        self._casts.clear()

    @override
    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LOWER_PRECISION:
            args, kwargs = tree_map_only(Tensor, self._lower, (args, kwargs))
        elif name in _FLOAT32 and kwargs.get("dtype") is None:
            args, kwargs = tree_map_only(Tensor, self._to_float32, (args, kwargs))
        return func(*args, **kwargs)

    def _lower(self, tensor: Tensor) -> Tensor:
        if tensor.device != DEVICE or not tensor.is_floating_point() or tensor.dtype in (self.dtype, torch.float64):
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32):
            return tensor.to(self.dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(self.dtype)
        return self._casts[id(tensor)]

    def _to_float32(self, tensor: Tensor) -> Tensor:
        sixteen_bit = tensor.device == DEVICE and tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.float() if sixteen_bit else tensor
