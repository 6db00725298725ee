"""Whether what was saved fits the run that goes on from it, found out before anything is changed."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.partition import Plan
from hift_lightning.engine.rotation import Rotation

# schedulers write these into param groups
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"}

_RECORD = ("updates", "skipped_steps", "held_lr_steps", "lr_cycles", "parameters", "dtypes", "masters")

_PLAN = ("group_size", "rotation", "steps_per_block", "plan")


def record_of_plan(plan: Plan, rotation: Rotation) -> dict[str, Any]:
    """What a checkpoint keeps of a plan, in primitives."""
    return {
        "group_size": plan.group_size,
        "order": rotation.order,
        "turns": list(rotation.turns),
        "rotation": rotation.fingerprint,
        "steps_per_block": rotation.steps_per_block,
        "plan": plan.fingerprint(),
        "blocks": [{"name": block.name, "parameters": list(block.parameters)} for block in plan.blocks],
        "always_active": [] if plan.always_active is None else list(plan.always_active.own_parameters),
    }


def number_of_plan(record: dict[str, Any]) -> int:
    """A number of 56 bits that another plan would not have; of what :func:`record_of_plan` gives."""
    return int.from_bytes(hashlib.sha256(repr(record).encode()).digest()[:7], "big")


def is_same_plan(saved: dict[str, Any], present: dict[str, Any]) -> bool:
    """Whether a place in the rotation means the same in both; arguments as :func:`record_of_plan` gives them."""
    return all(saved[key] == present[key] for key in _PLAN)


def check_record(saved: dict[str, Any]) -> None:
    """Raise unless it is a position that ``HiFT.state_dict()`` gave.

    Args:
        saved: what is to be loaded.

    Raises:
        ConfigurationError: if something is not there.
    """
    missing = [key for key in (*_RECORD, *_PLAN) if key not in saved]
    if missing:
        raise ConfigurationError(
            f"What is to be loaded lacks {_named(missing)}, and so is nothing that `HiFT.state_dict()` gave; give "
            "that, which a checkpoint of `HiFTStrategy` has in `checkpoint['hift']['engines']`."
        )


def refuse_other_plan(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Raise unless both are the same; arguments as for :func:`is_same_plan`.

    Raises:
        ConfigurationError: if they differ; it shows both.
    """
    if is_same_plan(saved, present):
        return
    trained, now = ([name for block in record["blocks"] for name in block["parameters"]] for record in (saved, present))
    differences = _differences(trained, now, "only the checkpoint trains", "only this run trains")
    raise ConfigurationError(
        f"The checkpoint was made with {_in_words(saved)}, and this run has {_in_words(present)}"
        f"{differences and f' ({differences})'}, so the place in the rotation does not carry over; resume with the "
        "checkpoint's values, or with `resume_plan=rebuild`, which takes everything else from it and begins a cycle of "
        "this run's plan."
    )


def check_optimizer(
    optimizer: Optimizer, names: Sequence[Sequence[str]], state_dict: dict[str, Any], saved: Any = None
) -> None:
    """Raise unless a state dict belongs to a like optimizer of the same parameters.

    Args:
        optimizer: the one that it is to be loaded into.
        names: of its parameters, for each param group.
        state_dict: what ``optimizer.state_dict()`` gave.
        saved: the names of that time, where they were kept.

    Raises:
        ConfigurationError: if it does not; it names what differs.
    """
    name = type(optimizer).__name__
    groups = state_dict["param_groups"]
    differences = ""
    if saved is not None and saved != [list(group) for group in names]:
        before, now = ([name for group in lists for name in group] for lists in (saved, names))
        differences = _differences(before, now, "only the checkpoint has", "it lacks") or (
            "the same parameters in another order or other param groups"
        )
    elif (sizes := [len(group["params"]) for group in groups]) != [len(group) for group in names]:
        differences = f"param groups of {_listed(sizes)} parameters instead of {_listed(map(len, names))}"
    if differences:
        raise ConfigurationError(
            f"The checkpoint's optimizer state is not one of this run's parameters: {differences}; resume with the "
            "model and param groups that it was made with."
        )
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        # either alone is the same optimizer in another version of torch
        missing = optimizer.defaults.keys() - saved_group.keys()
        strange = saved_group.keys() - group.keys() - _OF_SCHEDULERS
        if missing and strange:
            raise ConfigurationError(
                f"The checkpoint's optimizer state is not one of `{name}`: it has {_named(strange)} and lacks "
                f"{_named(missing)}; resume with the optimizer that it was made with."
            )


def check_weights(model: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
    """Raise if the model refuses a state dict, without writing a weight.

    Args:
        model: the one that it is to be loaded into.
        state_dict: names and tensors.
        strict: as for :meth:`torch.nn.Module.load_state_dict`.

    Raises:
        ConfigurationError: it names what is missing, what is unexpected, and what has another shape.
    """
    present = model.state_dict()
    differences = _differences(list(state_dict), list(present), "it has", "it lacks") if strict else ""
    shapes = {
        name: f"`{name}` is {tuple(state_dict[name].shape)} in it and {tuple(tensor.shape)} in the model"
        for name, tensor in present.items()
        if isinstance(tensor, Tensor) and isinstance(state_dict.get(name), Tensor)
        if state_dict[name].shape != tensor.shape
    }
    if not differences and not shapes:
        return
    try:
        # modules may have their own way with other names and shapes
        with _NothingIsCopied():  # type: ignore[no-untyped-call]
            model.load_state_dict(state_dict, strict=strict)
    except RuntimeError as error:
        more = f" and {len(shapes) - 3} more shapes" if len(shapes) > 3 else ""
        told = [differences, ", ".join(list(shapes.values())[:3]) + more]
        raise ConfigurationError(
            f"The checkpoint's weights do not fit `{type(model).__name__}`: {'; '.join(filter(None, told))}; take "
            "the model that it was made with."
        ) from error


class _NothingIsCopied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, copying into a tensor does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.copy_.default else func(*args, **(kwargs or {}))


def _in_words(record: dict[str, Any]) -> str:
    turns, blocks, always = record["turns"], record["blocks"], record["always_active"]
    first = [f"`{blocks[turn]['name']}`" for turn in turns[:3]]
    shown = ", ".join(first) + (", …" if len(turns) > 3 else "")
    return (
        f"{len(turns)} blocks of group_size={record['group_size']} with "
        f"steps_per_block={record['steps_per_block']} and the turns {shown} (order={record['order']})"
        f"{f', with {_named(always)} always active' if always else ''}"
    )


def _differences(before: Sequence[str], now: Sequence[str], only_before: str, only_now: str) -> str:
    gone, new = set(before) - set(now), set(now) - set(before)
    parts = [f"{words} {_named(names)}" for words, names in ((only_before, gone), (only_now, new)) if names]
    return " and ".join(parts)


def _named(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(f"`{name}`" for name in ordered[:3]) + more


def _listed(numbers: Iterable[int]) -> str:
    return " and ".join(map(str, numbers))
