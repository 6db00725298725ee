"""What an optimizer does to parameters one by one and element by element, found out by trying it."""

import contextlib
import dataclasses
import enum
import functools
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.shards import local
from hift_lightning.engine.state_tensors import flatten_state
from hift_lightning.engine.streams import device_module

_ROWS, _COLUMNS, _STEPS = 8, 16, 3

_RATE = 1e-2
"""Learning rate of the trial: at that of the param group, 0 while a warm-up begins, nothing might be seen to move."""

_SCALES = 2.0**-13, 2.0**13, 1.0
_SCALES_FP16 = 2.0**-5, 2.0**5, 1.0
"""Gradients are tried at these, since an optimizer may clip what is above some norm."""

_LARGE = 256
"""Rows and columns of a matrix that is large enough for optimizers that factor, project or quantize large ones only."""

_QUANTIZED_TOGETHER = 64
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
    self_contained: bool
    """Whether a step comes to the same with other parameter objects and a second call, without gradients, after it.

    It does not where something is kept elsewhere than in the ``state`` of a parameter and in settings of its group.
    """


class TrialFailed(ConfigurationError):
    """An optimizer that may work as it is used could not be tried."""


def probe(
    optimizer: Optimizer, like: nn.Parameter, dtype: torch.dtype, parked_dtype: torch.dtype | None = None
) -> Probe:
    """Try the optimizer, with its settings, on a small matrix: whole, and in two parts, together and one by one.

    Parameters are separate if two parts stepped together come out as one after the other, and no setting of the param
    group changes in a step. The optimizer is elementwise if, moreover, the whole comes out as its parts do, bit for
    bit, in weights and state, and every state tensor has the shape of the weights or none. A larger matrix is tried too
    (but no larger than the largest tensor of the param group, since it takes memory).

    Args:
        optimizer: is left as it is, but for objects that it holds and steps change.
        like: a parameter that it holds, for its param group and device.
        dtype: in which the optimizer will see weights and gradients.
        parked_dtype: of state that is wider when it is paged in.

    Raises:
        TrialFailed: if it cannot be stepped so.
    """
    try:
        with _device_of_trial(like) as device, _random_numbers_left_alone(device) as rewind:
            return _Trials(optimizer, like, dtype, parked_dtype, device, rewind).probe()
    except (ConfigurationError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise TrialFailed(
            f"A step of the optimizer `{type(optimizer).__name__}` was tried on a small matrix, to see whether "
            f"parameters may be stepped one by one, and failed ({type(error).__name__}: {error}); use "
            "`update='block'`, or an optimizer that steps any matrix."
        ) from error


_Same = Callable[[Tensor, Tensor], bool]


class _Way(enum.Enum):
    """How parts are stepped."""

    AS_THEY_ARE = enum.auto()
    """Together, as the optimizer's own call does."""
    ONE_BY_ONE = enum.auto()
    """In a call each, by the same optimizer, as pieces are."""
    WITH_SECOND_CALL = enum.auto()
    """Together, and then once more without gradients, as where masters are stepped before the optimizer's own call."""


@dataclass(frozen=True)
class _Outcome:
    leaves: list[list[Any]]
    """Of each part: its weights, and what its state consists of."""
    settings_change: bool
    """Whether a step changes a setting of the param group."""


@dataclass(frozen=True)
class _Trials:
    """Steps of a copy of an optimizer; arguments as of :func:`probe`."""

    optimizer: Optimizer
    like: nn.Parameter
    dtype: torch.dtype
    parked_dtype: torch.dtype | None
    device: torch.device
    rewind: Callable[[], None]
    """Lets the random numbers begin anew."""

    def probe(self) -> Probe:
        """What all trials together show."""
        scales = _SCALES_FP16 if self.dtype == torch.float16 else _SCALES
        shapes: list[tuple[int, int, float, _Same]] = [(_ROWS, _COLUMNS, scale, _same) for scale in scales]
        most = max(local(p).numel() for p in self._group["params"])
        rows = min(_LARGE, math.isqrt(most)) // _QUANTIZED_TOGETHER * _QUANTIZED_TOGETHER
        if rows > 0:
            shapes.append((rows, rows, 1.0, _close))  # threads may cut it where rounding shows
        found = []
        for shape in shapes:
            found.append(self._compare_whole_with_parts(*shape))
            if not found[-1].separate:
                return found[-1]
        if all(each.elementwise for each in found):
            return found[-1]
        return dataclasses.replace(found[-1], elementwise=False, state_bytes=0)

    @property
    def _group(self) -> dict[str, Any]:
        return self.optimizer.param_groups[number_of_group(self.optimizer, self.like)]

    def _compare_whole_with_parts(self, rows: int, columns: int, scale: float, same: _Same) -> Probe:
        # numbers without pattern that the device makes itself: nothing is copied to it, and no generator moves on
        count = torch.arange(1.0, rows * columns + 1, device=self.device).view(rows, columns)
        weights = (count * 0.7).sin()
        gradients = [(count * (1.3 + step)).cos() * scale for step in range(_STEPS)]
        del count

        def step(*parts: slice, way: _Way) -> _Outcome:
            of_parts = [[gradient[p] for p in parts] for gradient in gradients]
            return self._step([weights[p] for p in parts], of_parts, way)

        halves = slice(rows // 2), slice(rows // 2, rows)
        together = step(*halves, way=_Way.AS_THEY_ARE)
        with_second_call = step(*halves, way=_Way.WITH_SECOND_CALL)
        self_contained = all(map(functools.partial(_equal, same), together.leaves, with_second_call.leaves))
        one_by_one = step(*halves, way=_Way.ONE_BY_ONE)
        separate = not together.settings_change and all(
            map(functools.partial(_equal, same), together.leaves, one_by_one.leaves)
        )
        [whole] = step(slice(rows), way=_Way.ONE_BY_ONE).leaves
        equals_parts = functools.partial(_equals_parts, same, weights.shape)
        if not separate or len({len(whole), *map(len, one_by_one.leaves)}) > 1:
            elementwise = False
        else:
            elementwise = all(map(equals_parts, whole, *one_by_one.leaves))
        shaped = [leaf for leaf in whole[1:] if isinstance(leaf, Tensor) and leaf.dim() > 0]
        state_bytes = sum(leaf.element_size() for leaf in shaped) if elementwise else 0
        return Probe(separate, elementwise, state_bytes, self_contained)

    def _step(self, weights: list[Tensor], gradients: list[list[Tensor]], way: _Way) -> _Outcome:
        """Step the parts with these gradients, one after the other."""
        try:
            return self._run(weights, gradients, way, None)
        except Exception:
            if not (state := self.optimizer.state.get(self.like)):
                raise
        # its `step` expects what its constructor built (Adagrad)
        return self._run(weights, gradients, way, functools.partial(_state_like, state, self.like, self.parked_dtype))

    def _run(
        self,
        weights: list[Tensor],
        gradients: list[list[Tensor]],
        way: _Way,
        make_state: Callable[[Tensor], Any] | None,
    ) -> _Outcome:
        self.rewind()  # an optimizer may draw random numbers
        settings = _copied({key: value for key, value in self._group.items() if key != "params"})
        if (rate := settings.get("lr")) is not None:
            settings["lr"] = torch.full_like(rate, _RATE, dtype=torch.float32) if isinstance(rate, Tensor) else _RATE
        before = _copied(settings)
        # `copy.copy` would leave out what torch's own class does not know
        trial = object.__new__(type(self.optimizer))
        apart = ("state", "param_groups")
        trial.__dict__.update(_copied({key: value for key, value in vars(self.optimizer).items() if key not in apart}))
        trial.state, trial.param_groups = defaultdict(dict), [settings]
        parameters = [nn.Parameter(part.to(self.dtype, copy=True)) for part in weights]
        if make_state is not None:
            for parameter in parameters:
                trial.state[parameter] = make_state(parameter)
        for parts in gradients:
            if way is not _Way.AS_THEY_ARE:  # pieces and masters are another object in each step
                former, parameters = parameters, [nn.Parameter(parameter.detach()) for parameter in parameters]
                for old, new in zip(former, parameters, strict=True):
                    if state := trial.state.pop(old, None):
                        trial.state[new] = state
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.grad = part.to(self.dtype, copy=True)
            for stepped in [[parameter] for parameter in parameters] if way is _Way.ONE_BY_ONE else [parameters]:
                settings["params"] = stepped
                raw_step(trial)
            if way is _Way.WITH_SECOND_CALL:
                first = {**settings}
                for parameter in parameters:
                    parameter.grad = None
                raw_step(trial)
                settings.update(first)
        leaves = [[p.detach(), *flatten_state(trial.state[p])[0]] for p in parameters]
        after = {key: trial.param_groups[0].get(key) for key in before}
        return _Outcome(leaves, settings_change=not all(map(_alike, tree_leaves(after), tree_leaves(before))))


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
def _random_numbers_left_alone(device: torch.device) -> Iterator[Callable[[], None]]:
    """Within it random numbers can be drawn as if none were; it gives a function that lets them begin anew."""
    module = device_module(device)
    of_device = module.get_rng_state(device) if hasattr(module, "get_rng_state") else None
    of_cpu = torch.get_rng_state()

    def rewind() -> None:
        torch.set_rng_state(of_cpu)
        if of_device is not None:
            module.set_rng_state(of_device, device)

    try:
        yield rewind
    finally:
        rewind()


@contextlib.contextmanager
def _device_of_trial(like: Tensor) -> Iterator[torch.device]:
    """The device on which the trial can run: that of a parameter, but the CPU while planning on fake tensors."""
    if not isinstance(local(like), FakeTensor):
        yield like.device
        return
    with _disable_current_modes():
        yield torch.device("cpu")


def _copied(value: Any) -> Any:
    """A copy of containers and of the tensors in them; parameters and other objects are the same ones."""
    return tree_map(lambda leaf: leaf.clone() if type(leaf) is Tensor else leaf, value)


def _alike(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return _same(left, right)
    return left is right or bool(left == right)


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


def _equal(same: _Same, left: list[Any], right: list[Any]) -> bool:
    def alike(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return same(one, other)
        if one is None or isinstance(one, bool | int | float | str):
            return bool(one == other)
        return type(one) is type(other)  # an object (GaLore's projector): what it does shows in the weights

    return len(left) == len(right) and all(map(alike, left, right))


def _equals_parts(same: _Same, shape: torch.Size, whole: Any, top: Any, bottom: Any) -> bool:
    if not isinstance(whole, Tensor):
        return bool(whole == top == bottom)
    if whole.dim() == 0:
        return same(whole, top) and same(whole, bottom)
    return whole.shape == shape and top.dim() == bottom.dim() == 2 and same(whole, torch.cat([top, bottom]))


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same elements, NaN too, which a trial in 16 bits may come to."""
    return left.shape == right.shape and bool(((left == right) | ((left != left) & (right != right))).all())


def _close(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    if left.shape != right.shape or not left.is_floating_point():
        return _same(left, right)
    within = 8 * torch.finfo(left.dtype).eps
    left, right = left.float(), right.float()  # there is no `allclose` in 8 bits
    return torch.allclose(left, right, rtol=within, atol=within, equal_nan=True)
