"""What the record was measured with."""

import os
from importlib.metadata import version
from pathlib import Path

from experiments.memory.tables import PACKAGES
from experiments.step_cost.runs import HERE
from experiments.table import Table


def measure_machine(name: str) -> dict[str, object]:
    """Processor, cores and versions of packages."""
    fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    processor = next((value.strip() for key, _, value in fields if key.strip() == "model name"), "an unknown processor")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        **{package: version(package) for package in PACKAGES},
    }


MACHINE = Table(HERE / "machine.csv", ("here",), measure_machine)
