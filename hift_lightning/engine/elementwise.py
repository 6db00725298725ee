"""What an optimizer does to parameters one by one and element by element, found out by trying it."""

import contextlib
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.shards import local
from hift_lightning.engine.state_tensors import flatten_state

ROWS, COLUMNS, STEPS = 8, 16, 3

RATE = 1e-2
"""Learning rate of the trial: at that of the param group, 0 while a warm-up begins, nothing might be seen to move."""

_SCALES = 2.0**-13, 2.0**13, 1.0
_SCALES_FP16 = 2.0**-5, 2.0**5, 1.0
"""Gradients are tried at these, since an optimizer may clip what is above some norm."""

MOST_ROWS = 512
"""With as many columns it is large enough for optimizers that keep 8-bit state of large tensors only."""


_WHOLE_BLOCKS = 64
"""So many rows are a whole number of the blocks in which 8-bit state is scaled; what is not may be kept in 32 bits."""


@dataclass(frozen=True)
class Probe:
    """How an optimizer treats parameters of one group, device and dtype."""

    separate: bool
    """Whether parameters may be stepped one by one: the result is that of a step over all of them."""
    elementwise: bool
    """Whether a parameter may be stepped in pieces of rows."""
    state_bytes: int
    """Bytes of state for each element of a parameter, if elementwise."""


def probe(
    optimizer: Optimizer, like: nn.Parameter, dtype: torch.dtype, parked_dtype: torch.dtype | None = None
) -> Probe:
    """Try the optimizer, with its settings, on a small matrix: whole, in two parts together, and in each alone.

    Parameters are separate if two parts stepped together come out as each does alone, and no setting of the param group
    changes in a step. The optimizer is elementwise if, moreover, the whole comes out as its parts do, bit for bit, in
    weights and state, and every state tensor has the shape of the weights or none, also those of a larger matrix (but
    no larger than the largest tensor of the param group, since it takes memory).

    Args:
        optimizer: is left as it is.
        like: a parameter that it holds, for its param group and device.
        dtype: in which the optimizer will see weights and gradients.
        parked_dtype: of state that is wider when it is paged in.
    """
    with _numbers_where(like) as device:
        return _probe(optimizer, like, dtype, parked_dtype, device)


def _probe(
    optimizer: Optimizer, like: nn.Parameter, dtype: torch.dtype, parked_dtype: torch.dtype | None, device: torch.device
) -> Probe:
    # numbers without pattern that the device makes itself: nothing is copied to it, and no generator moves on
    count = torch.arange(1.0, ROWS * COLUMNS + 1, device=device).view(ROWS, COLUMNS)
    weights = (count * 0.7).sin()
    gradients = [(count * (1.3 + step)).cos() for step in range(STEPS)]

    def attempt(weights: list[Tensor], gradients: list[list[Tensor]]) -> list[list[Any]] | None:
        try:
            return _run(optimizer, like, dtype, weights, gradients, None)
        except Exception:
            if not (state := optimizer.state.get(like)):
                raise
        # its `step` expects what its constructor built (Adagrad)
        make_state = functools.partial(_state_like, state, like, parked_dtype)
        return _run(optimizer, like, dtype, weights, gradients, make_state)

    def run(scale: float, *parts: slice) -> list[list[Any]] | None:
        return attempt([weights[p] for p in parts], [[gradient[p] * scale for p in parts] for gradient in gradients])

    def at(scale: float) -> tuple[bool, bool, list[Any]] | None:
        """Whether it is separate and elementwise, and what the whole has come to."""
        top, bottom = slice(ROWS // 2), slice(ROWS // 2, ROWS)
        together, alone_top, alone_bottom = run(scale, top, bottom), run(scale, top), run(scale, bottom)
        whole = run(scale, slice(ROWS))
        if together is None or alone_top is None or alone_bottom is None or whole is None:
            return None
        alone = [alone_top[0], alone_bottom[0]]
        separate = all(_equal(a, b) for a, b in zip(together, alone, strict=True))
        same_leaves = len(whole[0]) == len(alone[0])
        parts = same_leaves and all(_equals_parts(*leaves) for leaves in zip(whole[0], *alone, strict=True))
        return separate, separate and parts, whole[0]

    tried = []
    for scale in _SCALES_FP16 if dtype == torch.float16 else _SCALES:
        if (found := at(scale)) is None:
            return Probe(separate=False, elementwise=False, state_bytes=0)
        tried.append(found)
    separate, elementwise = (all(answers) for answers in list(zip(*tried, strict=True))[:2])
    group = optimizer.param_groups[number_of_group(optimizer, like)]
    rows = min(MOST_ROWS, max(local(p).numel() for p in group["params"]) // COLUMNS)
    rows -= rows % _WHOLE_BLOCKS
    if elementwise and rows > 0:
        large = torch.ones(rows, COLUMNS, device=device)
        after = attempt([large], [[large]])
        elementwise = after is not None and all(
            leaf.shape == large.shape for leaf in after[0] if isinstance(leaf, Tensor) and leaf.dim() > 0
        )
    _, _, whole = tried[-1]
    shaped = [leaf for leaf in whole[1:] if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return Probe(separate, elementwise, sum(leaf.element_size() for leaf in shaped) if elementwise else 0)


def number_of_group(optimizer: Optimizer, parameter: nn.Parameter) -> int:
    """Which of the optimizer's param groups has the parameter now.

    Raises:
        ConfigurationError: if none has.
    """
    for number, group in enumerate(optimizer.param_groups):
        if any(p is parameter for p in group["params"]):
            return number
    raise ConfigurationError(
        f"A parameter of shape {tuple(parameter.shape)} is in no param group of the optimizer "
        f"`{type(optimizer).__name__}` any more, and its block is to be trained; leave the groups' parameters as they "
        "were when the blocks were cut."
    )


def raw_step(optimizer: Optimizer) -> None:
    """Call the optimizer's own ``step`` without the step hooks registered on it, also where it calls a base class's."""
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]
    finally:
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = hooks


@contextlib.contextmanager
def _numbers_where(like: Tensor) -> Iterator[torch.device]:
    """The device on which the trial can run: that of a parameter, but the CPU while planning on fake tensors."""
    if not isinstance(local(like), FakeTensor):
        yield like.device
        return
    with _disable_current_modes():
        yield torch.device("cpu")


def _run(
    optimizer: Optimizer,
    like: nn.Parameter,
    dtype: torch.dtype,
    weights: list[Tensor],
    gradients: list[list[Tensor]],
    make_state: Callable[[Tensor], Any] | None,
) -> list[list[Any]] | None:
    """For each part its weights and the leaves of its state afterwards; ``None`` if a setting of the group changes."""
    group = optimizer.param_groups[number_of_group(optimizer, like)]
    settings = {key: value for key, value in group.items() if key != "params"}
    if (rate := settings.get("lr")) is not None:
        settings["lr"] = torch.full_like(rate, RATE, dtype=torch.float32) if isinstance(rate, Tensor) else RATE
    parameters = [nn.Parameter(part.to(dtype, copy=True)) for part in weights]
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)  # `copy.copy` would leave out what torch's own class does not know
    trial.state = defaultdict(dict)
    if make_state is not None:
        for parameter in parameters:
            trial.state[parameter] = make_state(parameter)
    trial.param_groups = [{**settings, "params": parameters}]
    for parts in gradients:
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.to(dtype, copy=True)
        raw_step(trial)
    after = trial.param_groups[0]
    if any(after.get(key) is not value and after.get(key) != value for key, value in settings.items()):
        return None
    return [[p.detach(), *flatten_state(trial.state[p])[0]] for p in parameters]


def _state_like(state: Any, like: Tensor, parked_dtype: torch.dtype | None, parameter: Tensor) -> Any:
    """State of the parameter's shape and device, filled with the first value of each tensor of ``state``."""

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0:
            return torch.zeros((), dtype=leaf.dtype) if isinstance(leaf, FakeTensor) else leaf.clone()
        shape = parameter.shape if leaf.shape == local(like).shape else leaf.shape
        value = 0.0 if isinstance(leaf, FakeTensor) else leaf.flatten()[0].item()
        dtype = parameter.dtype if leaf.dtype == parked_dtype else leaf.dtype
        return torch.full(shape, value, dtype=dtype, device=parameter.device)

    return tree_map(fit, state)


def _equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        _same(a, b) if isinstance(a, Tensor) else bool(a == b) for a, b in zip(left, right, strict=True)
    )


def _equals_parts(whole: Any, top: Any, bottom: Any) -> bool:
    if not isinstance(whole, Tensor):
        return bool(whole == top == bottom)
    if whole.dim() == 0:
        return _same(whole, top) and _same(whole, bottom)
    return whole.shape == (ROWS, COLUMNS) and _same(whole, torch.cat([top, bottom]))


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same elements, NaN too, which a trial in 16 bits may come to."""
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())
