"""What is measured: tables of rows, each row by a process of its own."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from experiments.memory.cap import CAPPED, measure_cap
from experiments.memory.depth import DEPTHS, measure_depth
from experiments.memory.host import OFFLOADS, measure_offload
from experiments.memory.methods import METHODS, OURS
from experiments.memory.task import Task
from experiments.table import Table

HERE = Path(__file__).parent
PACKAGES = ("badam", "galore-torch", "apollo-torch", "adam-mini", "lomo-optim", "peft", "transformers", "torch")


def measure_method(name: str) -> dict[str, object]:
    """Bytes, FLOPs and losses of a method; of a peer that cannot run here, the reason."""
    method, task = METHODS[name], Task()
    try:
        run = method.run(task)
    except Exception as error:
        if name in OURS:
            raise
        return {"note": f"does not run here: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    settled = run.steps[-task.cycle :]
    return {
        "weights_bytes": run.weights,
        "forward_backward_peak_bytes": max(step.forward_backward for step in run.steps),
        "update_peak_bytes": max(step.update for step in run.steps),
        "left_bytes": max(step.left for step in run.steps),
        "to_device_bytes": sum(step.to_device for step in settled) // len(settled),
        "to_host_bytes": sum(step.to_host for step in settled) // len(settled),
        "gflop": f"{sum(run.flops) / len(run.flops) / 1e9:.4f}",
        "first_loss": run.losses[0],
        "loss_of_last_cycle": sum(run.losses[-task.cycle :]) / task.cycle,
        "note": method.remark,
    }


def measure_version(package: str) -> dict[str, object]:
    """The version of a package with which the rest is measured."""
    try:
        return {"version": version(package)}
    except PackageNotFoundError:
        return {"version": "is not installed"}


VERSIONS = Table(HERE / "versions.csv", PACKAGES, measure_version)
PEAKS = Table(HERE / "results.csv", tuple(METHODS), measure_method)
CAP = Table(HERE / "cap.csv", CAPPED, measure_cap)
DEPTH = Table(HERE / "depth.csv", tuple(DEPTHS), measure_depth)
OFFLOAD = Table(HERE / "offload.csv", OFFLOADS, measure_offload)
