"""The paper's five optimizers, each in full fine-tuning and under HiFT."""

from dataclasses import dataclass

from torch.optim import SGD, Adafactor, Adagrad

from experiments.quality import methods as quality
from experiments.quality.methods import STEPS, MakeOptimizer, Method, adamw, full, hift

MOMENTUM = 0.9

# `foreach` would have temporaries of as many bytes as all weights of a step
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": adamw,
    "SGDM": lambda network, rate: SGD(network.parameters(), lr=rate, momentum=MOMENTUM, foreach=False),
    "SGD": lambda network, rate: SGD(network.parameters(), lr=rate, foreach=False),
    "Adafactor": lambda network, rate: Adafactor(network.parameters(), lr=rate, foreach=False),
    "Adagrad": lambda network, rate: Adagrad(network.parameters(), lr=rate, foreach=False),
}
"""By the paper's names; AdamW as in `experiments.quality`, the others with torch's defaults besides the momentum."""


@dataclass(frozen=True)
class Contestant:
    """An optimizer in full fine-tuning or under HiFT.

    Args:
        method: how it trains.
        guess: exponent of the learning rate at which its search begins (see `rate_of` in `experiments.quality`).
        steps: of its runs; the rate is searched with the last of them.
        in_quality: what `experiments.quality` calls the same.
    """

    method: Method
    guess: int
    steps: tuple[int, ...]
    in_quality: str | None = None


_GUESSES = {"AdamW": (0, 2), "SGDM": (8, 9), "SGD": (10, 11), "Adafactor": (5, 6), "Adagrad": (4, 5)}
_IN_QUALITY = {("AdamW", "full"): "full AdamW", ("AdamW", "HiFT"): "HiFT"}

CONTESTANTS: dict[tuple[str, str], Contestant] = {}
for _name, _make in OPTIMIZERS.items():
    for _way, _method, _guess, _steps in (
        ("full", full(_make), _GUESSES[_name][0], (STEPS,)),
        ("HiFT", hift(_make), _GUESSES[_name][1], (STEPS, quality.CONTESTANTS["HiFT"].steps_in_time)),
    ):
        CONTESTANTS[_name, _way] = Contestant(_method, _guess, _steps, _IN_QUALITY.get((_name, _way)))
