"""Time of a step of each contestant, in a round of one process."""

from importlib.metadata import version

from experiments.gpu_check.profiles import CONTESTANTS, Profile
from experiments.gpu_check.training import RAN, CycleTimes, Watch, outcome_of, train


def measure_speed(name: str, profile: Profile, layers: int) -> dict[str, object]:
    """Times of a contestant's cycles, and the most bytes that it took."""
    contestant = CONTESTANTS[name.rpartition(", round ")[0]]
    job = profile.of_depth(contestant.job, layers)
    package = f"{contestant.package} {version(contestant.package)}" if contestant.package else ""
    cycle = layers + 2  # embeddings and head are layers too
    watch, times = Watch(profile.device), CycleTimes(profile.device, cycle)
    steps = (times.warm_up_cycles + profile.cycles) * cycle
    with profile.device.in_use():
        before = profile.device.memory().driver
        outcome = outcome_of(lambda: train(job, profile, steps, [watch, times], contestant.adapt), watch)
    row: dict[str, object] = {"outcome": outcome, "package": package}
    if outcome != RAN:
        return row
    assert watch.memory is not None
    return {
        **row,
        **times.figures(),
        "tokens": profile.batch * profile.length,
        "allocated": watch.memory.allocated,
        "driver": watch.memory.driver - before,
        "retries": watch.memory.retries,
    }
