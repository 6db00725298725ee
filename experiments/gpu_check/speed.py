"""Time of a step of each contestant, in a round of one process."""

from importlib.metadata import version

from experiments.gpu_check.memory import is_out_of_memory
from experiments.gpu_check.profiles import CONTESTANTS, Profile
from experiments.gpu_check.training import RAN, CycleTimes, Watch, train


def measure_speed(name: str, profile: Profile, layers: int) -> dict[str, object]:
    """Times of a contestant's cycles, and the most bytes that it took."""
    contestant = CONTESTANTS[name.rpartition(", round ")[0]]
    job = profile.of_depth(contestant.job, layers)
    package = contestant.package and f"{contestant.package} {version(contestant.package)}"
    cycle = layers + 2  # embeddings and head are layers too
    watch, times = Watch(profile.device), CycleTimes(profile.device, cycle)
    row: dict[str, object] = {"outcome": RAN, "package": package or ""}
    try:
        with profile.device.in_use():
            steps = (times.warm_up_cycles + profile.cycles) * cycle
            train(job, profile, steps, [watch, times], contestant.adapt)
    except Exception as error:
        if is_out_of_memory(error):
            return {**row, "outcome": f"out of memory {watch.place}"}
        if contestant.package is None:
            raise
        return {**row, "outcome": f"does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    assert watch.memory is not None
    return {**row, **times.figures(), "tokens": profile.batch * profile.length, "allocated": watch.memory.allocated}
