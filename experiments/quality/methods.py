"""The methods, each in a plain loop over the same batches, with AdamW, the same schedule and the same clipping.

BAdam, GaLore, LoRA and DoRA are the packages from PyPI as they are. LISA and MeZO, which are no packages, are written
after their papers.
"""

import contextlib
import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Optimizer

from experiments.quality.data_sets import BATCH_SIZE
from hift_lightning import HiFT, HiFTSettings
from hift_lightning.models.optimization import parameter_groups
from hift_lightning.models.sentence_classifier import SentenceClassifier
from hift_lightning.schedule import linear

Batch = dict[str, Tensor]
CLIP_NORM = 1.0
WARMUP = 0.1


@dataclass
class Training:
    """A network on its way: `step` does an optimizer step on a batch and returns the loss."""

    network: nn.Module
    step: Callable[[Batch], float]
    finish: Callable[[], None] = lambda: None


Method = Callable[[Any, float, int, int], Training]
"""Called with the pretrained network, the highest learning rate, the number of steps and a seed."""


Loss = Callable[[nn.Module, Batch], Tensor]
"""Called with the network and a batch."""


def loss_of(network: nn.Module, batch: Batch) -> Tensor:
    """Mean cross entropy of a batch."""
    return cross_entropy(network(batch["input_ids"], batch["attention_mask"]), batch["labels"])


BETAS = (0.9, 0.999)


WEIGHT_DECAY = 0.01


def adamw(
    network: nn.Module, rate: float, betas: tuple[float, float] = BETAS, weight_decay: float = WEIGHT_DECAY
) -> AdamW:
    """Over what requires a gradient; no weight decay of biases and norms."""
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    return AdamW(parameter_groups(named), lr=rate, betas=betas, weight_decay=weight_decay, fused=True)


def by_gradient(
    network: nn.Module,
    optimizer: Optimizer,
    steps: int,
    loss_of: Loss = loss_of,
    begin: Callable[[], None] = lambda: None,
    delay: Callable[[Any], Any] = lambda scheduler: scheduler,
    finish: Callable[[], None] = lambda: None,
) -> Training:
    """Steps of forward, backward, clipping and update, with the schedule.

    Args:
        network: what is trained.
        optimizer: over its parameters.
        steps: that the schedule is told.
        loss_of: what is minimised.
        begin: called at the beginning of each step.
        delay: given the scheduler, returns what is stepped in its place.
        finish: called at the end of training.
    """
    scheduler = delay(linear(optimizer, steps, WARMUP))

    def step(batch: Batch) -> float:
        begin()
        loss = loss_of(network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        return loss.item()

    return Training(network, step, finish)


MakeOptimizer = Callable[[nn.Module, float], Optimizer]
"""Called with the network and the highest learning rate."""


def adamw_with(beta1: float, beta2: float = BETAS[1], weight_decay: float = WEIGHT_DECAY) -> MakeOptimizer:
    """`adamw` with other decay rates of its moments and weights."""
    return functools.partial(adamw, betas=(beta1, beta2), weight_decay=weight_decay)


def full(make: MakeOptimizer = adamw, loss_of: Loss = loss_of) -> Method:
    """All weights at each step."""

    def method(network: nn.Module, rate: float, steps: int, seed: int) -> Training:
        return by_gradient(network, make(network, rate), steps, loss_of)

    return method


BeforeUpdate = Callable[[HiFT, Optimizer], None]
"""Called before each update, when the block's state is paged in."""


def hift(
    make: MakeOptimizer = adamw, before: BeforeUpdate | None = None, loss_of: Loss = loss_of, **settings: Any
) -> Method:
    """This project's engine with these settings."""

    def method(network: nn.Module, rate: float, steps: int, seed: int) -> Training:
        optimizer = make(network, rate)
        engine = HiFT(network, optimizer, HiFTSettings(**{"seed": seed, **settings}), total_steps=steps)
        engine.start()
        if before is not None:  # after the engine's own hook, which pages the block's state in
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: before(engine, optimizer))
        return by_gradient(network, optimizer, steps, loss_of, delay=engine.delay, finish=engine.finish)

    return method


def without_dropout(method: Method) -> Method:
    """A method with the network's dropout turned off."""

    def quiet(network: nn.Module, rate: float, steps: int, seed: int) -> Training:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return method(network, rate, steps, seed)

    return quiet


def _encoder_layers(network: Any) -> Any:
    return network.body.encoder.layer


def lisa(layers: int, period: int, stack_of: Callable[[Any], Any] = _encoder_layers, loss_of: Loss = loss_of) -> Method:
    """https://arxiv.org/abs/2403.17919, algorithm 1: so many layers drawn anew each period; the rest always trained."""

    def method(network: nn.Module, rate: float, steps: int, seed: int) -> Training:
        stack = list(stack_of(network))
        draw = random.Random(seed)
        done = 0

        def begin() -> None:
            nonlocal done
            if done % period == 0:
                chosen = draw.sample(stack, layers)
                for layer in stack:
                    layer.requires_grad_(layer in chosen)
            done += 1

        return by_gradient(network, adamw(network, rate), steps, loss_of, begin)

    return method


def badam(period: int) -> Method:
    """The `badam` package with embeddings, each layer and the head as blocks, a new block each period."""

    def method(network: SentenceClassifier, rate: float, steps: int, seed: int) -> Training:
        from badam import BlockOptimizer

        count = len(network.body.encoder.layer)  # type: ignore[union-attr, arg-type]
        blocks = [["embeddings"], *([f"encoder.layer.{number}."] for number in range(count)), ["head"]]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the block at every switch
            optimizer = BlockOptimizer(
                base_optimizer=AdamW(network.parameters(), lr=rate, weight_decay=0.01, fused=True),
                named_parameters_list=list(network.named_parameters()),
                block_prefix_list=blocks,
                switch_block_every=period,
                switch_mode="descending",
                verbose=0,
            )
        return by_gradient(network, optimizer, steps)

    return method


def lora(rank: int, dora: bool = False) -> Method:
    """`peft` on all linear layers of the body; the new head is trained whole."""

    def method(network: SentenceClassifier, rate: float, steps: int, seed: int) -> Training:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear_layers(network.body), use_dora=dora)
        inject_adapter_in_model(config, network.body)
        network.requires_grad_(False)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name or name.startswith("head."))
        return by_gradient(network, adamw(network, rate), steps)

    return method


def linear_layers(body: nn.Module) -> list[str]:
    return [name for name, module in body.named_modules() if isinstance(module, nn.Linear)]


def galore(rank: int) -> Method:
    """The `galore-torch` package on the matrices of the layers; embeddings, norms and head by plain AdamW."""

    def method(network: SentenceClassifier, rate: float, steps: int, seed: int) -> Training:
        from galore_torch import GaLoreAdamW

        projected = [m.weight for m in network.body.encoder.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
        taken = set(projected)
        groups = [
            *parameter_groups((name, p) for name, p in network.named_parameters() if p not in taken),
            {"params": projected, "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
        ]
        return by_gradient(network, GaLoreAdamW(groups, lr=rate, weight_decay=0.01), steps)

    return method


def only(chosen: Callable[[str], bool]) -> Method:
    """Full fine-tuning of the chosen parameters, and the head."""

    def method(network: SentenceClassifier, rate: float, steps: int, seed: int) -> Training:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("head.") or chosen(name))
        return by_gradient(network, adamw(network, rate), steps)

    return method


def mezo(scale: float = 1e-3) -> Method:
    """https://arxiv.org/abs/2305.17333, algorithm 1: two forward passes, no gradient; plain SGD."""

    def method(network: SentenceClassifier, rate: float, steps: int, seed: int) -> Training:
        parameters = list(network.parameters())
        optimizer = torch.optim.SGD(parameters, lr=rate)
        scheduler = linear(optimizer, steps, WARMUP)
        draw = torch.Generator(device=parameters[0].device)
        done = 0

        def move(number: int, by: float) -> None:
            draw.manual_seed(seed * 1_000_003 + number)
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=draw, device=parameter.device), alpha=by)

        @torch.no_grad()
        def step(batch: Batch) -> float:
            nonlocal done
            move(done, scale)
            up = loss_of(network, batch).item()
            move(done, -2 * scale)
            down = loss_of(network, batch).item()
            move(done, scale)
            move(done, -optimizer.param_groups[0]["lr"] * (up - down) / (2 * scale))
            done += 1
            optimizer.step()  # without gradients it changes nothing; the schedule wants it
            scheduler.step()
            return (up + down) / 2

        return Training(network, step)

    return method


STEPS = 200
"""Steps of full fine-tuning; the others have as many, and as many as they do in its time."""
FEW_SEEDS = 5
"""Of the final runs of a method that is not compared closely."""
PLANNED_SEEDS = 8
"""Of the final runs of a method that is; what is above was added when these were known."""
LORAS_STEPS = 440
"""Steps of LoRA without dropout in the memory of HiFT with two layers a block."""


@dataclass(frozen=True)
class Contestant:
    """A method in the comparison.

    Args:
        method: the method.
        guess: exponent of the learning rate at which its search begins (see `rate_of`).
        steps_in_time: steps that take as long as `STEPS` of full fine-tuning (`cost.csv`), in tens, and not more.
        cycle: steps after which every weight has had its turn.
        remark: for the page.
        batch_size: texts in a batch; with other batches than the rest it is run in equal time only.
        rate_from: the method whose learning rate it takes, where it does not search for its own.
        seeds: of its final runs. A method with more than the rest is compared closely: its learning rate is chosen with
            more of them too (see `grid`).
        more_lengths: other numbers of steps that it is run with, at the same learning rate.
    """

    method: Method
    guess: int
    steps_in_time: int
    cycle: int = 1
    remark: str = ""
    batch_size: int = BATCH_SIZE
    rate_from: str = ""
    seeds: int = FEW_SEEDS
    more_lengths: tuple[int, ...] = ()

    @property
    def closely(self) -> bool:
        return self.seeds > FEW_SEEDS

    @property
    def lengths(self) -> tuple[int, ...]:
        """Steps of its final runs."""
        usual = (self.steps_in_time,) if self.batch_size != BATCH_SIZE else (self.steps_in_time, STEPS)
        return (*usual, *self.more_lengths)


FULL = "full AdamW"
HIFT = "HiFT"
LONG = "HiFT, 20 steps a block, no momentum"
ONE_TURN = "HiFT, one turn a block, no momentum, head always"
TOP = "HiFT, one turn a block, head and top FFN always"
IN_MEMORY = "LoRA in HiFT's memory"
IN_LESS = "LoRA in the memory of one turn a block"
FULL_NO_DROPOUT = "full AdamW, no dropout"
ONE_TURN_NO_DROPOUT = "HiFT, one turn a block, head always, no dropout"
TOP_NO_DROPOUT = "HiFT, one turn, head and top FFN, no dropout"
TOP_IN_LORAS_TIME = "HiFT, one turn, head and top FFN, no dropout, in LoRA's time"
TWO_IN_LORAS_TIME = "HiFT, one turn, two layers a block, head and two FFNs, no dropout, in LoRA's time"
LORA_NO_DROPOUT = "LoRA in that memory, no dropout"
LISA = "LISA"
OTHERS_OF_ALL_WEIGHTS = (LISA, "BAdam", "GaLore")
"""Other methods that train all weights in less memory than full fine-tuning."""
MOST_TEXTS = {IN_MEMORY: HIFT, IN_LESS: ONE_TURN, LORA_NO_DROPOUT: TWO_IN_LORAS_TIME}
"""LoRA with the largest batch whose peak of bytes is not above that of the other."""

_one_turn = functools.partial(
    hift, adamw_with(beta1=0.0), steps_per_block="once", lr_update="step", update="streamed", window="16MB"
)
_HEAD = ["head.*"]
_HEAD_AND_TOP_FFN = [*_HEAD, "body.encoder.layer.5.intermediate.*", "body.encoder.layer.5.output.*"]
_HEAD_AND_TWO_FFNS = [*_HEAD_AND_TOP_FFN, "body.encoder.layer.4.intermediate.*", "body.encoder.layer.4.output.*"]
_top_no_dropout = without_dropout(_one_turn(always_active=_HEAD_AND_TOP_FFN))

CONTESTANTS = {
    FULL: Contestant(full(), 0, STEPS),
    HIFT: Contestant(hift(), 2, 350, 8, "top2down, a layer a block"),
    "HiFT bottom2up": Contestant(hift(order="bottom2up"), 2, 360, 8),
    "HiFT random": Contestant(hift(order="random"), 2, 350, 8),
    LONG: Contestant(hift(adamw_with(beta1=0.0), steps_per_block=20, lr_update="step"), 2, 350, 160),
    ONE_TURN: Contestant(
        _one_turn(always_active=_HEAD),
        2,
        340,
        340,
        "streamed through 16 MB; its final runs are from before, with the same updates",
    ),
    TOP: Contestant(
        _one_turn(always_active=_HEAD_AND_TOP_FFN),
        2,
        320,
        320,
        "no momentum; FFN: the feed-forward part of the top layer; streamed through 16 MB",
    ),
    LISA: Contestant(
        lisa(layers=2, period=10),
        0,
        230,
        10,
        "2 layers, drawn every 10 steps; embeddings always; moments of all that were drawn",
    ),
    "BAdam": Contestant(badam(period=20), 2, 320, 160, "20 steps a block"),
    "LoRA": Contestant(lora(rank=16), 3, 250, 1, "rank 16"),
    IN_MEMORY: Contestant(lora(rank=16), 3, 290, 1, "rate of LoRA, the largest batch within HiFT's peak", 14, "LoRA"),
    IN_LESS: Contestant(lora(rank=16), 3, 400, 1, "rank 16, the largest batch within its peak", 10),
    FULL_NO_DROPOUT: Contestant(without_dropout(full()), 0, 210),
    ONE_TURN_NO_DROPOUT: Contestant(
        without_dropout(_one_turn(always_active=_HEAD)), 2, 340, 340, "no momentum; streamed through 16 MB"
    ),
    TOP_NO_DROPOUT: Contestant(_top_no_dropout, 2, 330, 330, "no momentum; streamed through 16 MB"),
    TOP_IN_LORAS_TIME: Contestant(
        _top_no_dropout,
        2,
        360,
        360,
        "the same, as many steps as take as long as LoRA's in that memory",
        seeds=PLANNED_SEEDS,
    ),
    TWO_IN_LORAS_TIME: Contestant(
        without_dropout(_one_turn(always_active=_HEAD_AND_TWO_FFNS, group_size=2)),
        2,
        340,
        340,
        "no momentum; FFNs of the top two layers; streamed through 16 MB",
        15,
        seeds=16,
        more_lengths=(LORAS_STEPS,),
    ),
    LORA_NO_DROPOUT: Contestant(
        without_dropout(lora(rank=16)), 3, LORAS_STEPS, 1, "rank 16, the largest batch within its peak", 10, seeds=16
    ),
    "DoRA": Contestant(lora(rank=16, dora=True), 3, 160, 1, "rank 16"),
    "GaLore": Contestant(galore(rank=32), 0, 150, 1, "rank 32"),
    "BitFit": Contestant(only(lambda name: name.endswith("bias")), 4, 300),
    "head only": Contestant(only(lambda name: False), 7, 540),
    "MeZO": Contestant(mezo(), -3, 90),
}


def equal_time(method: str) -> int:
    """Steps of a method in the time of `STEPS` of full fine-tuning."""
    return CONTESTANTS[method].steps_in_time


def equal_steps(method: str) -> int:
    """As many as full fine-tuning, whatever the method."""
    return STEPS


def loras_steps(method: str) -> int:
    """As many as LoRA without dropout, whatever the method."""
    return LORAS_STEPS


def rate_of(exponent: int) -> float:
    """The learning rates of the grid that all methods share: 1e-4 times a power of 2."""
    return 1e-4 * 2.0**exponent
