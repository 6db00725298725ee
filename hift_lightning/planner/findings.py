"""What the planning application finds out, and `plan.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_lightning.engine.settings import HiFTSettings
from hift_lightning.planner.gpus import CONTEXT_BYTES, FRAGMENTATION, GPUS, needed_bytes
from hift_lightning.planner.result import BlockPlan, Plan

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Findings:
    """A plan and what it is compared with; bytes, unless said otherwise."""

    title: str
    plan: Plan
    settings: HiFTSettings | None
    """Of HiFT; `None` for full fine-tuning."""
    full: Plan
    """Full fine-tuning with the same batches in the same precision, without masters."""
    ways: Mapping[str, Plan]
    """The same step with other ways to update and to keep activations, this one among them."""
    why_not_fused: str | None
    largest_batches: Mapping[str, int | None] | None
    """For each GPU by name, rows of the largest batch that fits, `None` where no row does; `None` if not asked for."""
    batch: tuple[int, int]
    """Rows and tokens in a row."""
    bandwidth: int
    """Bytes that are copied between host and device in a second."""
    sending: int
    """Bytes that a device sends to others in a second."""
    reason: str | None = None
    """Why `group_size="auto"` came to these settings."""

    @property
    def needed_bytes(self) -> int:
        """Memory that a GPU must have, with the allowance."""
        return needed_bytes(self.plan.peak_bytes)

    @property
    def moving_ms(self) -> float:
        """Milliseconds that copying takes in a step, mean over a cycle."""
        return self.plan.moved_bytes / self.bandwidth * 1000

    @property
    def sending_ms(self) -> float:
        """Milliseconds that sending takes in a step, mean over a cycle."""
        return self.plan.sent_bytes / self.sending * 1000

    def numbers(self) -> dict[str, float]:
        """The main ones under the flat names of `metrics.json`."""
        return {
            "memory/peak_device_bytes": self.plan.peak_bytes,
            "memory/needed_device_bytes": self.needed_bytes,
            "memory/parked_bytes": self.plan.parked_bytes,
            "memory/moved_bytes_mean": self.plan.moved_bytes,
            "flops/step_mean": self.plan.flops,
            "hift/blocks": len(self.plan.blocks),
            **({} if self.plan.ranks == 1 else {"memory/sent_bytes_mean": self.plan.sent_bytes}),
        }


def write_json(findings: Findings, folder: Path) -> Path:
    """Write everything into `plan.json` in the folder and return its path."""
    plan, peak = findings.plan, findings.plan.peak
    content = {
        "title": findings.title,
        "parameters": plan.numel,
        "trained_parameters": plan.trained_numel,
        "batch_rows": findings.batch[0],
        "batch_tokens_in_a_row": findings.batch[1],
        "settings": findings.settings and {name: _plain(value) for name, value in vars(findings.settings).items()},
        "chosen_because": findings.reason,
        "peak_bytes": plan.peak_bytes,
        "peak_block": peak.name,
        "peak_phase": peak.trace.peak_phase,
        "bytes_at_peak_by_role": peak.trace.roles_at_peak,
        "needed_device_bytes": findings.needed_bytes,
        "allowance": {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION},
        "parked_bytes": plan.parked_bytes,
        "moved_bytes_mean": plan.moved_bytes,
        "bandwidth_bytes_per_second": findings.bandwidth,
        "moving_ms_mean": findings.moving_ms,
        "flops_mean": plan.flops,
        "ranks": plan.ranks,
        "ranks_of_machine": plan.ranks_of_machine,
        "sent_bytes_mean": plan.sent_bytes,
        "sent_bytes_per_second": findings.sending,
        "sending_ms_mean": findings.sending_ms,
        "full_fine_tuning": {
            "peak_bytes": findings.full.peak_bytes,
            "flops": findings.full.flops,
            "sent_bytes": findings.full.sent_bytes,
        },
        "ways": {
            name: {
                "peak_bytes": way.peak_bytes,
                "needed_device_bytes": needed_bytes(way.peak_bytes),
                "flops": way.flops,
            }
            for name, way in findings.ways.items()
        },
        "gpus": [
            {
                "name": gpu.name,
                "bytes": gpu.nbytes,
                "fits": findings.needed_bytes <= gpu.nbytes,
                "largest_batch": findings.largest_batches and findings.largest_batches[gpu.name],
            }
            for gpu in GPUS
        ],
        "blocks": [_block(block) for block in plan.blocks],
    }
    path = folder / PLAN_FILE
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def _block(block: BlockPlan) -> dict[str, Any]:
    return {
        "name": block.name,
        "parameters": block.numel,
        "peak_bytes": block.trace.peak_bytes,
        "peak_phase": block.trace.peak_phase,
        "peak_bytes_by_phase": block.trace.phase_peaks,
        "bytes_at_peak_by_role": block.trace.roles_at_peak,
        "bytes_after": block.trace.bytes_after,
        "to_device_bytes": block.to_device_bytes,
        "to_host_bytes": block.to_host_bytes,
        "parked_bytes": block.parked_bytes,
        "flops": block.trace.flops,
        "bytes_by_collective": block.trace.collectives,
    }


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str, list)) else str(value)
