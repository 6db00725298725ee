"""What the recipe of HiFT could be: variants of it on film reviews, with one seed, on the validation part.

    python -m experiments.quality.variants [--again] [--jobs 1]

All have as many steps, which take about as long as `STEPS` of full fine-tuning. Rows that `variants.csv` has are not
run again unless `--again` is given.
"""

import argparse
from pathlib import Path

from torch.optim import Optimizer

from experiments.quality.grid import SEARCH_SEED
from experiments.quality.methods import CONTESTANTS, BeforeUpdate, Method, adamw_with, hift, rate_of
from experiments.quality.training import run
from experiments.table import Table
from hift_lightning import HiFT

DATA = "film reviews"
STEPS = CONTESTANTS["HiFT"].steps_in_time
WARM_UP = "beta1 0, 20 steps a block, warm-up of 5 steps in each turn"
COUNTS = "beta1 0, 20 steps a block, bias correction by the steps of the run"
NO_DECAY = "beta1 0, 20 steps a block, no weight decay"


def anew(engine: HiFT, optimizer: Optimizer) -> None:
    """The first moment begins anew at each turn."""
    if engine.updates % engine.rotation.steps_per_block == 0:
        for state in optimizer.state.values():
            state["exp_avg"].zero_()


def warm_up_of_turn(steps: int) -> BeforeUpdate:
    """The rate rises from 0 within so many steps at the beginning of each turn."""

    def slower(engine: HiFT, optimizer: Optimizer) -> None:
        done = engine.updates % engine.rotation.steps_per_block
        for group in optimizer.param_groups:  # the schedule sets the rate again after each step
            group["lr"] *= min(1.0, (done + 1) / steps)

    return slower


def counts_of_the_run(engine: HiFT, optimizer: Optimizer) -> None:
    """Adam corrects its moments as if each weight had been updated in every step of the run."""
    for state in optimizer.state.values():
        state["step"].fill_(engine.updates)


# with many steps a block a cycle is most of the run, through which a delayed rate would be that of the warm-up
_KINDS: dict[str, tuple[Method, tuple[int, ...]]] = {
    "as in the paper": (hift(), (0, 1, 2, 3)),
    "rate not delayed": (hift(lr_update="step"), (1,)),
    "5 steps a block": (hift(steps_per_block=5, lr_update="step"), (2,)),
    "10 steps a block": (hift(steps_per_block=10, lr_update="step"), (1, 2, 3)),
    "10 steps a block, bottom2up": (hift(steps_per_block=10, order="bottom2up", lr_update="step"), (2,)),
    "20 steps a block": (hift(steps_per_block=20, lr_update="step"), (2,)),
    "2 layers a block": (hift(group_size=2), (1,)),
    "beta1 0.5": (hift(adamw_with(beta1=0.5)), (2,)),
    "beta1 0": (hift(adamw_with(beta1=0.0)), (2, 3)),
    "beta1 0, bottom2up": (hift(adamw_with(beta1=0.0), order="bottom2up"), (2,)),
    "beta1 0, random": (hift(adamw_with(beta1=0.0), order="random"), (2,)),
    "beta1 0, beta2 0.99": (hift(adamw_with(beta1=0.0, beta2=0.99)), (2,)),
    "beta1 0.5, 2 layers a block": (hift(adamw_with(beta1=0.5), group_size=2), (2,)),
    "beta1 0, 2 layers a block": (hift(adamw_with(beta1=0.0), group_size=2), (2,)),
    "beta1 0, 10 steps a block": (hift(adamw_with(beta1=0.0), steps_per_block=10, lr_update="step"), (2,)),
    "beta1 0, 20 steps a block": (hift(adamw_with(beta1=0.0), steps_per_block=20, lr_update="step"), (1, 2, 3)),
    "beta1 0, 20 steps a block, head always": (
        hift(adamw_with(beta1=0.0), steps_per_block=20, lr_update="step", always_active=["head.*"]),
        (1, 2, 3),
    ),
    "beta1 0, 40 steps a block": (hift(adamw_with(beta1=0.0), steps_per_block=40, lr_update="step"), (2,)),
    "beta1 0, 20 steps a block, bottom2up": (
        hift(adamw_with(beta1=0.0), steps_per_block=20, order="bottom2up", lr_update="step"),
        (2,),
    ),
    "20 steps a block, first moment anew at each turn": (
        hift(before=anew, steps_per_block=20, lr_update="step"),
        (1, 2, 3),
    ),
    WARM_UP: (
        hift(adamw_with(beta1=0.0), before=warm_up_of_turn(5), steps_per_block=20, lr_update="step"),
        (2,),
    ),
    COUNTS: (
        hift(adamw_with(beta1=0.0), before=counts_of_the_run, steps_per_block=20, lr_update="step"),
        (2,),
    ),
    NO_DECAY: (
        hift(adamw_with(beta1=0.0, weight_decay=0.0), steps_per_block=20, lr_update="step"),
        (2,),
    ),
}
VARIANTS = {
    f"{kind}, rate 2^{exponent}": (method, exponent)
    for kind, (method, exponents) in _KINDS.items()
    for exponent in exponents
}


def measure(name: str) -> dict[str, object]:
    """Train and test a variant."""
    method, exponent = VARIANTS[name]
    rate = rate_of(exponent)
    values = run(DATA, method, rate, STEPS, SEARCH_SEED)
    return {"steps": STEPS, "seed": SEARCH_SEED, "rate": rate, **values}


TABLE = Table(Path(__file__).parent / "variants.csv", tuple(VARIANTS), measure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="run also what is in the record")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time, each on one core")
    arguments = parser.parse_args()
    TABLE.complete(TABLE.rows, arguments.again, arguments.jobs)
    for row in sorted(TABLE.load().values(), key=lambda row: -float(row["validation_accuracy"])):
        print(f"{float(row['validation_accuracy']):.4f} {float(row['test_accuracy']):.4f} {row['name']}")


if __name__ == "__main__":
    main()
