"""What makes HiFT lose on a language model: other settings of it, with one seed, on the validation part.

    python -m experiments.language_model.variants [--again] [--jobs 1]

All have the FLOPs of `STEPS` steps of full fine-tuning, and not more. Rows that `variants.csv` has are not run again
unless `--again` is given.
"""

import argparse
import functools
from pathlib import Path

from torch.optim import Optimizer

from experiments.language_model.measuring import cost, run
from experiments.language_model.methods import CONTESTANTS, HIFT, ONE_TURN, Contestant, loss_of, with_norm
from experiments.quality.grid import SEARCH_SEED
from experiments.quality.methods import Method, adamw_with, rate_of
from experiments.quality.methods import hift as hift_of
from experiments.table import Table
from hift_lightning import HiFT

hift = functools.partial(hift_of, loss_of=loss_of)
still = adamw_with(beta1=0.0)


def rate_of_turn(engine: HiFT, optimizer: Optimizer) -> None:
    """In each turn the rate falls from the highest, linearly, to 0 at its end."""
    turn = engine.rotation.steps_per_block
    for group in optimizer.param_groups:  # the schedule sets the rate again after each step
        group["lr"] = group["initial_lr"] * (1 - engine.updates % turn / turn)


OF_8 = "8 layers a block"
ALWAYS = {number: f"top {number} always, 4 layers a block, no momentum" for number in (1, 4, 12)}
_STEPS, _STEPS_OF_8 = CONTESTANTS[HIFT].steps, 92
_STEPS_OF_ALWAYS = {1: 99, 4: 92, 12: 79}
_KINDS: dict[str, tuple[Method, int, tuple[int, ...]]] = {
    "4 layers a block, rate not delayed": (hift(group_size=4, lr_update="step"), _STEPS, (2,)),
    "4 layers a block, random": (hift(group_size=4, order="random"), _STEPS, (2,)),
    "4 layers a block, bottom2up": (hift(group_size=4, order="bottom2up"), _STEPS, (2,)),
    "4 layers a block, 4 steps in turn, no momentum": (
        hift(still, group_size=4, steps_per_block=4, lr_update="step"),
        _STEPS,
        (2,),
    ),
    "4 layers a block, one turn": (
        hift(group_size=4, steps_per_block="once", lr_update="step"),
        CONTESTANTS[ONE_TURN].steps,
        (2,),
    ),
    "4 layers a block, one turn, no momentum, rate anew in each turn": (
        hift(still, before=rate_of_turn, group_size=4, steps_per_block="once", lr_update="step"),
        CONTESTANTS[ONE_TURN].steps,
        (2, 3),
    ),
    "4 layers a block, beta1 0.5": (hift(adamw_with(beta1=0.5), group_size=4), _STEPS, (2,)),
    "4 layers a block, random, no momentum": (hift(still, group_size=4, order="random"), _STEPS, (2,)),
    "4 layers a block, no momentum, beta2 0.99": (hift(adamw_with(beta1=0.0, beta2=0.99), group_size=4), _STEPS, (2,)),
    OF_8: (hift(group_size=8), _STEPS_OF_8, (1, 2)),
    f"{OF_8}, no momentum": (hift(still, group_size=8), _STEPS_OF_8, (1, 2)),
    **{
        name: (hift(still, group_size=4, always_active=with_norm(number)), _STEPS_OF_ALWAYS[number], (2,))
        for number, name in ALWAYS.items()
    },
}
VARIANTS = {
    f"{kind}, rate 2^{exponent}": (method, steps, exponent)
    for kind, (method, steps, exponents) in _KINDS.items()
    for exponent in exponents
}


def measure(name: str) -> dict[str, object]:
    """Train and test a variant."""
    method, steps, exponent = VARIANTS[name]
    rate = rate_of(exponent)
    values = run(Contestant(method, exponent, steps), rate, SEARCH_SEED)
    return {"steps": steps, "seed": SEARCH_SEED, "rate": rate, **values}


def measure_cost(name: str) -> dict[str, object]:
    """FLOPs and bytes of a setting."""
    method, steps, _ = _KINDS[name]
    return cost(Contestant(method, 0, steps, _BLOCKS[name]))


TABLE = Table(Path(__file__).parent / "variants.csv", tuple(VARIANTS), measure)
_BLOCKS = {OF_8: 4, ALWAYS[1]: 8, ALWAYS[4]: 7, ALWAYS[12]: 5}
COST = Table(Path(__file__).parent / "variants_cost.csv", tuple(_BLOCKS), measure_cost)
"""Of the settings with other blocks; the rest have the cost of HiFT."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="run also what is in the record")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time, each on one core")
    arguments = parser.parse_args()
    COST.complete(COST.rows, arguments.again)
    TABLE.complete(TABLE.rows, arguments.again, arguments.jobs)
    for row in sorted(TABLE.load().values(), key=lambda row: float(row["validation_perplexity"])):
        print(f"{float(row['validation_perplexity']):.1f} {float(row['test_perplexity']):.1f} {row['name']}")


if __name__ == "__main__":
    main()
