"""What is planned: each cell of the paper's tables, and some beyond them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from experiments.table import Table
from hift_lightning.models.classification import ClassificationModule
from hift_lightning.models.language_modeling import LanguageModelingModule
from hift_lightning.planner import Plan, plan
from hift_lightning.planner.planning import PRECISIONS as DTYPES
from hift_lightning.strategies import HiFTStrategy

HERE = Path(__file__).parent

Module = ClassificationModule | LanguageModelingModule

BATCH, LENGTH = 8, 512

MODELS = {
    "LLaMA-7B": "llama7b",
    "RoBERTa-base": "roberta_base",
    "RoBERTa-large": "roberta_large",
    "GPT2-medium": "gpt2_medium",
    "GPT2-large": "gpt2_large",
    "GPT-Neo-2.7B": "gptneo_2b7",
    "LLaMA-13B": "llama13b",
}
"""The paper's name of a model, and that of its file in `conf/model`."""

OPTIMIZERS = {
    "AdamW": ("optimizer=adamw",),
    "SGDM": ("optimizer=sgd",),
    "SGD": ("optimizer=sgd", "optimizer.momentum=0.0"),
    "Adafactor": ("optimizer=adafactor",),
    "Adagrad": ("optimizer=adagrad",),
}

PRECISIONS = {"fp32": "32-true", "mixed": "bf16-mixed", "Mixed^Hi": "bf16-true"}
"""The paper's name of a precision, and Lightning's."""

PAPER_CELLS = (("fp32", "full"), ("fp32", "HiFT"), ("mixed", "full"), ("mixed", "HiFT"), ("Mixed^Hi", "HiFT"))
"""Precision and method of the paper's cells: it has no full fine-tuning in Mixed^Hi."""

WAYS: dict[str, dict[str, Any]] = {
    "block": {},
    "streamed": {"update": "streamed"},
    "fused": {"update": "fused"},
    "block, checkpointing": {"activation_checkpointing": True},
    "streamed, checkpointing": {"update": "streamed", "activation_checkpointing": True},
    "fused, checkpointing": {"update": "fused", "activation_checkpointing": True},
}
"""Ways to take less memory, as arguments of `HiFTStrategy`; the paper has the first."""

FULL_CHECKPOINTING = "full, checkpointing"


@dataclass(frozen=True)
class Job:
    """One training step that is planned.

    Attributes:
        model: a key of `MODELS`.
        optimizer: a key of `OPTIMIZERS`.
        precision: a key of `PRECISIONS`.
        method: `full`, `full, checkpointing` or `HiFT`.
        strategy: arguments of `HiFTStrategy` beside the paper's own.
        overrides: of the application's configuration.
    """

    model: str
    optimizer: str
    precision: str
    method: str
    strategy: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def module(self, device: torch.device | str = "meta") -> Module:
        """The application's module as `python train.py` builds it, with random weights on a device or no memory."""
        words = [f"model={MODELS[self.model]}", "model.pretrained=null", *OPTIMIZERS[self.optimizer], *self.overrides]
        with initialize_config_module("hift_lightning.conf", version_base="1.3"):
            cfg = compose("train", words)
        with torch.device(device):
            network = instantiate(cfg.model.network, tokenizer=None)
        if self.method == FULL_CHECKPOINTING:
            network.gradient_checkpointing_enable()
        module: Module = instantiate(cfg.model.module)(network, instantiate(cfg.optimizer), None)
        return module

    def hift(self) -> HiFTStrategy | None:
        """The strategy; `None` for full fine-tuning."""
        if self.method != "HiFT":
            return None
        return HiFTStrategy(group_size=1, master_weights=self.precision == "Mixed^Hi", **self.strategy)

    def plan(self, module: Module, batch: int, length: int) -> Plan:
        """Plan the step with batches of that many rows of that many tokens."""
        strategy: HiFTStrategy | Literal["full"] = self.hift() or "full"
        return plan(module, strategy, module.blank_batch(batch, length), precision=PRECISIONS[self.precision])


def planned(job: Job, batch: int = BATCH, length: int = LENGTH) -> dict[str, object]:
    """What a job needs, in bytes, and its FLOPs.

    Parameters (masters among them), gradients and states are the most of each over a cycle; `at_peak` are bytes at the
    moment of the highest peak; `forward`, `backward` and `update` are the highest of these phases.
    """
    module = job.module()
    found = job.plan(module, batch, length)
    dtype = DTYPES[PRECISIONS[job.precision]] if job.precision == "Mixed^Hi" else torch.float32
    buffers = sum(b.numel() * (dtype if b.is_floating_point() else b.dtype).itemsize for b in module.buffers())

    def most(role: str) -> int:
        return max(block.trace.role_peaks.get(role, 0) for block in found.blocks)

    trace = found.peak.trace
    phases = [block.trace.phase_peaks for block in found.blocks]
    return {
        "numel": found.numel,
        "largest_block_numel": max(block.numel for block in found.blocks),
        "parameters": most("weights") - buffers + most("masters"),
        "gradients": most("gradients"),
        "states": most("optimizer state"),
        "window": most("window"),
        "peak": found.peak_bytes,
        "peak_block": found.peak.name,
        "peak_phase": trace.peak_phase,
        **{f"at_peak_{role.replace(' ', '_')}": nbytes for role, nbytes in trace.roles_at_peak.items()},
        "forward": max(peaks["forward"] for peaks in phases),
        "backward": max(peaks["backward"] for peaks in phases),
        "update": max(peaks["update"] for peaks in phases),
        "parked": found.parked_bytes,
        "gflop": f"{found.flops / 1e9:.1f}",
    }


def _paper_jobs(models: Collection[str], optimizers: Collection[str]) -> dict[str, Job]:
    return {
        f"{model}, {optimizer}, {precision}, {method}": Job(model, optimizer, precision, method)
        for model in models
        for optimizer in optimizers
        for precision, method in PAPER_CELLS
    }


def _jobs_beyond() -> dict[str, Job]:
    jobs = {}
    for precision in ("fp32", "Mixed^Hi"):
        compared = "mixed" if precision == "Mixed^Hi" else precision
        jobs[f"{compared}, {FULL_CHECKPOINTING}"] = Job("LLaMA-7B", "AdamW", compared, FULL_CHECKPOINTING)
        for way, arguments in WAYS.items():
            jobs[f"{precision}, {way}"] = Job("LLaMA-7B", "AdamW", precision, "HiFT", arguments)
    return jobs


LLAMA7B_JOBS = _paper_jobs(["LLaMA-7B"], OPTIMIZERS)
OTHER_JOBS = _paper_jobs([model for model in MODELS if model != "LLaMA-7B"], ["AdamW"])
BEYOND_JOBS = _jobs_beyond()
JOBS = {**LLAMA7B_JOBS, **OTHER_JOBS, **BEYOND_JOBS}


def measure(name: str) -> dict[str, object]:
    """What the job of that name needs."""
    return planned(JOBS[name])


LLAMA7B = Table(HERE / "llama7b.csv", tuple(LLAMA7B_JOBS), measure)
OTHERS = Table(HERE / "others.csv", tuple(OTHER_JOBS), measure)
BEYOND = Table(HERE / "beyond.csv", tuple(BEYOND_JOBS), measure)
