"""Bytes of a cell of the memory table: planned, and measured."""

from experiments.gpu_check.card import free_host_memory
from experiments.gpu_check.profiles import Profile
from experiments.gpu_check.training import RAN, Watch, outcome_of, train

FULL_STEPS = 3
"""In the third, state and the gradients of the step before are there in the forward pass."""
CYCLES = 3
"""In the third, state comes beside backward where there is room: in the first there is none, the second learns."""
ROUNDED_UP = 1.2
"""What pinned memory may take over what is parked in it, where tensors are small."""


def measure_memory(name: str, profile: Profile) -> dict[str, object]:
    """The plan of a cell, and what its run takes over three cycles (full fine-tuning: three steps)."""
    job = profile.cells[name]
    planned = job.plan(job.module(), profile.batch, profile.length)
    row: dict[str, object] = {"outcome": RAN, "planned": planned.peak_bytes, "parked": planned.parked_bytes}
    needed, free = int(ROUNDED_UP * planned.parked_bytes), free_host_memory()
    if needed > free:
        short = f"not run: what is parked may take {needed:,} bytes, and {free:,} bytes of host memory are free"
        return {**row, "outcome": short}
    watch = Watch(profile.device)
    steps = CYCLES * len(planned.blocks) if job.hift() else FULL_STEPS
    with profile.device.in_use():
        before = profile.device.memory().driver
        outcome = outcome_of(lambda: train(job, profile, steps, [watch]), watch)
    if outcome != RAN:
        return {**row, "outcome": outcome}
    assert watch.memory is not None
    return {**row, "steps": steps, "driver_before": before, **watch.memory._asdict()}
