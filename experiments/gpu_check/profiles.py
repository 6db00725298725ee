"""What is measured: on a GPU, and the same in small on the simulated accelerator."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from experiments.gpu_check.devices import Cuda, Device, Simulated
from experiments.paper_memory.jobs import BATCH, BEYOND_JOBS, LENGTH, LLAMA7B_JOBS, OTHER_JOBS, Job

HERE = Path(__file__).parent


def _lora(network: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted: nn.Module = get_peft_model(
        network,
        LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    return adapted


@dataclass(frozen=True)
class Contestant:
    """A way to train whose tokens per second are measured."""

    job: Job
    adapt: Callable[[nn.Module], nn.Module] | None = None
    """Called with the network before it is trained."""
    package: str | None = None
    """From PyPI, that it needs beside the project's own; without it, it is left out and the page says so."""


_FULL, _HIFT = (Job("LLaMA-7B", "AdamW", "mixed", method) for method in ("full", "HiFT"))
_FULL_16_BIT, _MIXED_HI = (Job("LLaMA-7B", "AdamW", "Mixed^Hi", method) for method in ("full", "HiFT"))
_PAGED = ("optimizer._target_=bitsandbytes.optim.PagedAdamW8bit",)

CONTESTANTS = {
    "full": Contestant(_FULL),
    "HiFT": Contestant(_HIFT),
    "full, 16-bit weights": Contestant(_FULL_16_BIT),
    "HiFT, Mixed^Hi": Contestant(_MIXED_HI),
    "LoRA r16, 16-bit weights": Contestant(_FULL_16_BIT, adapt=_lora, package="peft"),
    "paged 8-bit AdamW, 16-bit weights": Contestant(
        Job("LLaMA-7B", "AdamW", "Mixed^Hi", "full", overrides=_PAGED), package="bitsandbytes"
    ),
}


@dataclass(frozen=True)
class Paging:
    """A way to page in and park whose time is measured."""

    strategy: Mapping[str, Any]
    prefetch: bool = True
    """Whether state comes to the device while backward still goes on."""
    compared: str | None = None
    """The way that it is compared with, in which nothing is moved; `None` if it is one."""


_STAYS = "state stays on the device"
PAGING = {
    f"block, {_STAYS}": Paging({"offload": "none"}),
    "block": Paging({}, compared=f"block, {_STAYS}"),
    "block, without prefetch": Paging({}, prefetch=False, compared=f"block, {_STAYS}"),
    f"streamed, {_STAYS}": Paging({"update": "streamed", "offload": "none"}),
    "streamed": Paging({"update": "streamed"}, compared=f"streamed, {_STAYS}"),
}

COPIES = tuple(
    f"{direction}, {memory}" for memory in ("pinned", "pageable") for direction in ("host to device", "device to host")
)


@dataclass(frozen=True)
class Profile:
    """What is measured on a device.

    Attributes:
        device: the device.
        folder: where record, page and picture go unless another one is named.
        cells: the cells of the memory table.
        batch: rows of a batch.
        length: tokens of a row.
        depths: of the model whose times are measured; the first that the card has memory for is taken, or the last.
        size: overrides of that model's configuration, beside its depth.
        rounds: in which the contestants take turns, each in a process of its own.
        cycles: that are measured in a round.
        copied: bytes of the copies whose bandwidth is measured.
    """

    device: Device
    folder: Path
    cells: Mapping[str, Job]
    batch: int
    length: int
    depths: tuple[int, ...]
    rounds: int
    cycles: int
    copied: int
    size: tuple[str, ...] = ()

    def of_depth(self, job: Job, layers: int, strategy: Mapping[str, Any] | None = None) -> Job:
        """The job with a model of that many layers, and with these arguments of the strategy."""
        overrides = (*job.overrides, *self.size, f"model.network.config.num_hidden_layers={layers}")
        return dataclasses.replace(job, overrides=overrides, strategy=job.strategy if strategy is None else strategy)


_PAPER = {**LLAMA7B_JOBS, **OTHER_JOBS}

CUDA = Profile(
    Cuda(),
    HERE,
    # of those beyond the paper, two are the paper's own
    cells=_PAPER | {f"LLaMA-7B, AdamW, {name}": job for name, job in BEYOND_JOBS.items() if job not in _PAPER.values()},
    batch=BATCH,
    length=LENGTH,
    depths=(32, 24, 16, 12, 8, 6, 4, 3, 2, 1),
    rounds=3,
    cycles=3,
    copied=256 * 2**20,
)


def _overrides(**config: object) -> tuple[str, ...]:
    return tuple(f"model.network.config.{name}={value}" for name, value in config.items())


_NARROW = _overrides(hidden_size=128, num_attention_heads=4)
_LLAMA = (*_NARROW, *_overrides(intermediate_size=352, num_key_value_heads=4, vocab_size=512))
_SMALL = {
    "LLaMA-7B": (*_LLAMA, *_overrides(num_hidden_layers=4)),
    "RoBERTa-base": (
        *_NARROW,
        *_overrides(intermediate_size=352, vocab_size=600, num_hidden_layers=2),
        # for dropout in attention, torch takes a kernel on the simulated accelerator that keeps the scores
        "+model.network.config.attention_probs_dropout_prob=0.0",
    ),
    "GPT2-medium": (*_NARROW, *_overrides(vocab_size=1200, num_hidden_layers=2)),
    "GPT-Neo-2.7B": (
        *_NARROW,
        *_overrides(vocab_size=512, num_hidden_layers=2, attention_types="[[[global,local],1]]"),
        *_overrides(max_position_embeddings=64),
    ),
}
_SMALL_CELLS = (
    "LLaMA-7B, AdamW, fp32, full",
    "LLaMA-7B, AdamW, fp32, HiFT",
    "LLaMA-7B, AdamW, Mixed^Hi, HiFT",
    "LLaMA-7B, SGDM, fp32, full",
    "LLaMA-7B, SGDM, fp32, HiFT",
    "LLaMA-7B, AdamW, Mixed^Hi, fused, checkpointing",
    "RoBERTa-base, AdamW, mixed, HiFT",
    "GPT2-medium, AdamW, Mixed^Hi, HiFT",
    "GPT-Neo-2.7B, AdamW, fp32, HiFT",
)


def _small_cells() -> dict[str, Job]:
    jobs = {name: CUDA.cells[name] for name in _SMALL_CELLS}
    return {f"small {name}": dataclasses.replace(job, overrides=_SMALL[job.model]) for name, job in jobs.items()}


SIM = Profile(
    Simulated(total_bytes=18 * 2**20),  # too small for the first of its cells alone
    Path("outputs/gpu_check"),
    cells=_small_cells(),
    batch=2,
    length=64,
    depths=(4, 2),
    rounds=1,
    cycles=2,
    copied=2**20,
    size=_LLAMA,
)

PROFILES = {profile.device.type: profile for profile in (CUDA, SIM)}
