"""The card, what runs on it, and the size of the model whose times are measured there."""

from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch

from experiments.gpu_check.profiles import CONTESTANTS, Profile
from experiments.table import Row

PACKAGES = ("torch", "lightning", "transformers", "hift-lightning")


def identity(profile: Profile) -> dict[str, object]:
    """What figures have to have in common to stand on one page."""
    with profile.device.in_use():
        return {
            "device": profile.device.type,
            "card": profile.device.name,
            "total": profile.device.total_bytes,
            "driver": profile.device.driver_version,
            "cuda": torch.version.cuda or "none",
            **{package: version(package) for package in PACKAGES},
        }


def measure_card(name: str, profile: Profile) -> dict[str, object]:
    """The identity, and the layers that the card has memory for under full fine-tuning."""
    found = identity(profile)
    with profile.device.in_use():
        free = profile.device.free_bytes
    return {**found, "host": host_memory("MemTotal"), "layers": layers_for(free, profile)}


def layers_for(free: int, profile: Profile) -> int:
    """The first of the profile's depths at which full fine-tuning fits so many bytes by the plan, or the last.

    A tenth is left free, since an allocator that has to look for memory takes time.
    """
    for layers in profile.depths:
        job = profile.of_depth(CONTESTANTS["full"].job, layers)
        planned = job.plan(job.module(), profile.batch, profile.length)
        if profile.device.needed_bytes(planned.peak_bytes) <= 0.9 * free:
            return layers
    return profile.depths[-1]


def differences(recorded: Row, profile: Profile) -> str:
    """How the card at hand, and what runs on it, differ from those of the record, in a few words; none if not."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # this one makes no context on the card
        here = pool.submit(identity, profile).result()
    told = {key: (recorded[key], str(value)) for key, value in here.items()}
    return ", ".join(f"{key} {there} there and {found} here" for key, (there, found) in told.items() if there != found)


def host_memory(field: str) -> int:
    """Bytes of the machine's memory, by a field of `/proc/meminfo` (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024


def free_host_memory() -> int:
    """Bytes of memory that the machine has free, or the container, where it has less (cgroup v2).

    What files have left in the cache is free.
    """
    free = host_memory("MemAvailable")
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        fields = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, int(most) - int(used.read_text()) + int(fields["inactive_file"]))
    return free
