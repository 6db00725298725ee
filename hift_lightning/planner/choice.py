"""`group_size="auto"`: the largest blocks that fit a memory budget."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.planner.gpus import CONTEXT_BYTES, FRAGMENTATION, GIB, needed_bytes
from hift_lightning.planner.planning import StepPlanner
from hift_lightning.planner.result import Plan


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    settings: HiFTSettings
    plan: Plan
    reason: str
    """What was chosen and why, in a sentence."""


def choose(settings: HiFTSettings, budget: int, step: StepPlanner) -> Choice:
    """Choose the largest group of layers that fits, by planning.

    Where not even single layers fit with the settings as they are, `update="streamed"`, then activation checkpointing,
    then `update="fused"`, where that can be used, are taken in addition; each costs more time than the one before.

    Args:
        settings: what else is set; its `group_size` is not looked at.
        budget: bytes of the device's memory.
        step: plans the step.

    Raises:
        ConfigurationError: if nothing fits; it names the smallest budget that would do.
    """
    least: tuple[int, HiFTSettings] | None = None
    for way in _ways(settings, may_fuse=step.why_not_fused is None):
        plan = step.plan(way)
        needed = needed_bytes(plan.peak_bytes)
        if least is None or needed < least[0]:
            least = needed, way
        if needed <= budget:
            return _with_largest_group(way, plan, budget, step)
    assert least is not None
    needed, way = least
    enough = -(-needed * 100 // GIB) / 100  # rounded up, so that the budget named does fit
    raise ConfigurationError(
        f"Nothing fits `memory_budget` of {budget / GIB:.2f} GiB with this model and batch: a step needs at least "
        f"{enough:.2f} GiB, with one layer a block, update={way.update} and activation_checkpointing="
        f"{way.activation_checkpointing}; give `memory_budget={enough:.2f}GiB` or more, a smaller `window`, "
        "a smaller batch, shorter rows, or 16-bit weights "
        "(`precision='bf16-true'`, `master_weights=True`)."
    )


def _ways(settings: HiFTSettings, may_fuse: bool) -> Iterator[HiFTSettings]:
    """Settings with single layers as blocks, from the fastest to the most frugal."""
    way = dataclasses.replace(settings, group_size=1, memory_budget=None)
    yield way
    if way.update == "block":
        way = dataclasses.replace(way, update="streamed")
        yield way
    if not way.activation_checkpointing:
        way = dataclasses.replace(way, activation_checkpointing=True)
        yield way
    if way.update == "streamed" and may_fuse:
        yield dataclasses.replace(way, update="fused")


def _with_largest_group(way: HiFTSettings, plan: Plan, budget: int, step: StepPlanner) -> Choice:
    layers = len(plan.blocks)
    fits, too_large, needs_too_much = 1, layers + 1, None
    while too_large - fits > 1:
        # all layers first: where they fit, nothing else has to be tried
        size = layers if too_large > layers else (fits + too_large) // 2
        tried = step.plan(dataclasses.replace(way, group_size=size))
        if needed_bytes(tried.peak_bytes) <= budget:
            fits, plan = size, tried
        else:
            too_large, needs_too_much = size, needed_bytes(tried.peak_bytes)
    reason = (
        f"group_size={fits} with update={way.update} and activation_checkpointing={way.activation_checkpointing} needs "
        f"{needed_bytes(plan.peak_bytes) / GIB:.2f} GiB of the {budget / GIB:.2f} GiB of `memory_budget`: a peak of "
        f"{plan.peak_bytes / GIB:.2f} GiB in the step of `{plan.peak.name}`, in {plan.peak.trace.peak_phase}, with "
        f"{FRAGMENTATION:.0%} and {CONTEXT_BYTES / GIB:g} GiB allowed beside it"
    )
    if needs_too_much is not None:
        reason += f"; group_size={too_large} would need {needs_too_much / GIB:.2f} GiB"
    return Choice(dataclasses.replace(way, group_size=fits), plan, f"{reason}.")
