"""Training on a device whose memory is 1.2 times the bytes of the weights."""

import torch

from experiments.memory.meter import Meter
from experiments.memory.methods import METHODS
from experiments.memory.task import Task

CAP = 1.2
CAPPED = ("full AdamW", "LISA", "GaLore r32", "BAdam", "streamed")


def measure_cap(name: str) -> dict[str, object]:
    """How far a method comes under the cap, and whether its losses are those of a run without one."""
    task, method = Task(), METHODS[name]
    steps = 2 * task.cycle
    meter = Meter()
    try:
        capped = method.run(task, steps, CAP, meter)
    except torch.OutOfMemoryError:
        return {"outcome": f"`torch.OutOfMemoryError` in step {len(meter.steps) + 1}, {meter.phase}", "losses": ""}
    free = method.run(task, steps)
    same = "equal" if capped.losses == free.losses else "differ"
    return {
        "outcome": f"{steps} steps, loss {capped.losses[0]:.4f} to {capped.losses[-1]:.4f}",
        "losses": f"{same} to those without a cap",
    }
