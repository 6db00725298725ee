"""A plan as a picture: memory over the phases of a step, block by block."""

from itertools import groupby
from pathlib import Path
from typing import Any

from hift_lightning.planner.gpus import GIB
from hift_lightning.planner.result import Plan
from hift_lightning.planner.trace import ROLES

PICTURE_FILE = "plan.png"
PHASE_COLORS = {"forward": "tab:green", "backward": "tab:orange", "update": "tab:purple"}


def draw(plan: Plan, title: str, folder: Path) -> Path:
    """Write `plan.png` into the folder and return its path.

    Above, a cycle: the bytes in use over the phases of each block's step. Below, the step that has the peak, by role.

    Args:
        plan: of a step.
        title: of the picture.
        folder: an existing one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), layout="constrained")
    cycle, step = figure.subplots(2, 1)
    _draw_cycle(cycle, plan)
    _draw_step(step, plan)
    figure.suptitle(title)
    path = folder / PICTURE_FILE
    figure.savefig(path, dpi=100)
    return path


def _draw_cycle(axis: Any, plan: Plan) -> None:
    start, places = 0, []
    for block in plan.blocks:
        timeline = [(phase, sum(roles.values()) / GIB) for phase, roles in block.trace.timeline]
        for phase, color in PHASE_COLORS.items():
            axis.fill_between(
                range(start, start + len(timeline)),
                [value for _, value in timeline],
                where=[other == phase for other, _ in timeline],
                step="mid",
                color=color,
                label=phase if start == 0 else None,
            )
        places.append(start + len(timeline) / 2)
        start += len(timeline)
        axis.axvline(start - 0.5, color="white", linewidth=1)
    axis.axhline(plan.peak_bytes / GIB, color="black", linewidth=0.8, linestyle="--", label="peak")
    axis.set_xticks(places, [".".join(block.name.split(".")[-2:]) for block in plan.blocks], rotation=90, fontsize=7)
    axis.set_xlim(-0.5, start - 0.5)
    axis.set_ylim(0, plan.peak_bytes / GIB * 1.08)
    axis.set_ylabel("GiB on the device")
    axis.set_title("A cycle, block by block, in the order of their turns")
    axis.legend(loc="lower left", ncols=4)


def _draw_step(axis: Any, plan: Plan) -> None:
    timeline = plan.peak.trace.timeline
    roles = [role for role in ROLES if any(role in seen for _, seen in timeline)]
    rows = [[seen.get(role, 0) / GIB for _, seen in timeline] for role in roles]
    axis.stackplot(range(len(timeline)), rows, labels=roles, step="mid")
    start = 0
    for phase, stretch in groupby(phase for phase, _ in timeline):
        length = len(list(stretch))
        axis.axvline(start - 0.5, color="black", linewidth=0.8)
        axis.text(start - 0.3, plan.peak_bytes / GIB * 1.01, phase, fontsize=9)
        start += length
    axis.set_xlim(-0.5, len(timeline) - 0.5)
    axis.set_ylim(0, plan.peak_bytes / GIB * 1.08)
    axis.set_xticks([])
    axis.set_xlabel("highest moments of equal stretches of each phase, in their order")
    axis.set_ylabel("GiB on the device")
    axis.set_title(f"The step with the peak, `{plan.peak.name}`, by role")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
