"""The plans, and the page on them."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from experiments.table import Row, Rows, Table, markdown

HERE = Path(__file__).parent
COMMON = (
    "trainer.precision=bf16-true",
    "strategy.master_weights=true",
    "strategy.update=streamed",
    "strategy.activation_checkpointing=true",
    "data.batch_size=1",
    "data.max_length=4096",
    "compare=false",
    "batch_sizes=false",
)
FLOPS_PER_SECOND = 400e12
"""Of a device: 40 % of the 989e12 that an H100 does at most in bf16."""
GIB = 2**30


class Setting(NamedTuple):
    """What is planned, besides `COMMON`."""

    num_nodes: int
    model: str
    strategy: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        options = [option.removeprefix("strategy.") for option in self.options]
        return ", ".join([f"{self.model} on {8 * self.num_nodes}", self.strategy, *options])

    @property
    def overrides(self) -> list[str]:
        return [
            f"model={self.model}",
            f"strategy={self.strategy}",
            "trainer.devices=8",
            f"trainer.num_nodes={self.num_nodes}",
            *self.options,
        ]


_KINDS = (
    ("llama3_70b", "hift_fsdp2", ()),
    ("llama3_70b", "hift_fsdp2", ("strategy.offload_params=true",)),
    ("llama3_70b", "hift_ddp", ("strategy.shard_parked_state=true",)),
    ("llama3_8b", "hift_fsdp2", ()),
    ("llama3_8b", "hift_ddp", ()),
    ("llama3_8b", "hift_ddp", ("strategy.shard_parked_state=true",)),
)
SETTINGS = {setting.name: setting for nodes in (1, 8) for setting in (Setting(nodes, *kind) for kind in _KINDS)}


def measure(name: str) -> dict[str, object]:
    """Run the planner, and read what it leaves."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = ["plan.py", *setting.overrides, *COMMON, f"hydra.run.dir={folder}"]
        subprocess.run([sys.executable, *command], cwd=HERE.parents[1], check=True, stdout=subprocess.DEVNULL)
        plan = json.loads(Path(folder, "plan.json").read_text())
    full = plan["full_fine_tuning"]
    roles = plan["bytes_at_peak_by_role"]
    return {
        "ranks": plan["ranks"],
        "peak_bytes": plan["peak_bytes"],
        "needed_bytes": plan["needed_device_bytes"],
        "weights_bytes": roles.get("weights", 0),
        "gathered_bytes": roles.get("gathered weights", 0),
        "parked_bytes": plan["parked_bytes"],
        "parked_bytes_of_machine": plan["parked_bytes"] * plan["ranks_of_machine"],
        "moved_bytes": plan["moved_bytes_mean"],
        "moved_bytes_per_second": plan["bandwidth_bytes_per_second"],
        "sent_bytes": plan["sent_bytes_mean"],
        "sent_bytes_most": max(_sent(block, plan["ranks"]) for block in plan["blocks"]),
        "sent_bytes_per_second": plan["sent_bytes_per_second"],
        "flops": plan["flops_mean"],
        "full_peak_bytes": full["peak_bytes"],
        "full_sent_bytes": full["sent_bytes"],
        "full_flops": full["flops"],
    }


def _sent(block: dict[str, dict[str, int]], ranks: int) -> float:
    from hift_lightning.planner.result import ring_bytes

    return ring_bytes(block["bytes_by_collective"], ranks)


TABLE = Table(HERE / "results.csv", tuple(SETTINGS), measure)


def summary(rows: Rows) -> str:
    """The text; its numbers come from the rows."""
    a_row = next(iter(rows.values()))
    speeds = sorted({float(row["sent_bytes_per_second"]) for row in rows.values()}, reverse=True)
    within, between = (f"{speed / 1e9:g} GB/s" for speed in (speeds[0], speeds[-1]))
    paging = f"{float(a_row['moved_bytes_per_second']) / 1e9:g} GB/s"
    parts = [
        "**Computed, not measured**: by the planner, which runs the first rank of so many on tensors without memory "
        "(`python -m experiments.several_devices`). That a rank's planned bytes are those counted on the simulated "
        "accelerator to 0.1 %, and what it sends that counted between two processes, is held by "
        "`tests/planner/test_ranks.py`.",
        f"Every device has a batch of 1 x 4096 tokens; `{' '.join(COMMON[:4])}`; machines of 8 devices.",
        markdown(
            ["", "peak", "needed", "weights", "gathered", "parked", "parked a machine, at most"],
            [
                [name, *_gib(row, "peak", "needed", "weights", "gathered", "parked"), _of_machine(row)]
                for name, row in rows.items()
            ],
        ),
        "GiB of one device. *Needed* has an allowance for the driver and the allocator; *weights* and *gathered* are "
        "what the peak has of this device's own weights and of layers put together from all devices.",
        markdown(
            ["", "sent", "most in a step", "sending", "paging", "computing", "full: peak", "full: sent"],
            [
                [
                    name,
                    *_gib(row, "sent"),
                    f"{float(row['sent_bytes_most']) / GIB:.2f}",
                    *_times(row),
                    *_gib(row, "full_peak", "full_sent"),
                ]
                for name, row in rows.items()
            ],
        ),
        f"GiB that a device sends in a step, mean over a cycle, if collectives go round a ring; seconds for them at "
        f"{within} within a machine and {between} between machines, for paging state at {paging}, and for computing "
        f"at {FLOPS_PER_SECOND / 1e12:g} TFLOP/s; the three can overlap. *Full* is full fine-tuning under the same "
        "strategy, all weights in one block and its state on the device, without fp32 masters.",
    ]
    return "\n\n".join(parts) + "\n"


def _gib(row: Row, *names: str) -> list[str]:
    return [f"{float(row[f'{name}_bytes']) / GIB:.2f}" for name in names]


def _of_machine(row: Row) -> str:
    return f"{float(row['parked_bytes_of_machine']) / GIB:.0f}"


def _times(row: Row) -> list[str]:
    sending = float(row["sent_bytes"]) / float(row["sent_bytes_per_second"])
    paging = float(row["moved_bytes"]) / float(row["moved_bytes_per_second"])
    return [f"{seconds:.2f} s" for seconds in (sending, paging, float(row["flops"]) / FLOPS_PER_SECOND)]
