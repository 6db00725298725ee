"""FLOPs, milliseconds and tokens of a training step: full fine-tuning, HiFT, and other ways to train with less.

    python -m experiments.step_cost [--again] [--only NAME ...] [--threads 2]

Contestants are processes that take turns, a cycle of optimizer steps each, on three models; then a model is varied in
layers, width, length and batch; then the phases of a step are timed. All of it takes a quarter of an hour of two cores:
run it alone. Runs that `results.csv` and `phases.csv` beside this file have are not measured again unless `--again` is
given. Prints and writes `summary.md`, and plots `step_cost.png`. The peers come
from PyPI:

    pip install peft
    pip install --no-deps badam galore-torch apollo-torch adam-mini lomo-optim bitsandbytes
"""

import argparse

import torch

from experiments.step_cost.machine import MACHINE
from experiments.step_cost.phases import SHARES
from experiments.step_cost.plot import plot
from experiments.step_cost.runs import HERE, RUNS, TIMES
from experiments.step_cost.summary import summary, unmeasured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*RUNS, *SHARES.rows]
    parser.add_argument("--again", action="store_true", help="measure also what is in the record")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each contestant")
    arguments = parser.parse_args()
    TIMES.complete(arguments.only, arguments.threads, arguments.again)
    SHARES.complete(arguments.only, arguments.again)
    MACHINE.complete(MACHINE.rows, arguments.again)

    times, shares = TIMES.load(), SHARES.load()
    text = summary(times, shares, MACHINE.load())
    (HERE / "summary.md").write_text(text)
    if not unmeasured(times, shares):
        plot(times, shares, HERE / "step_cost.png")
    print(text)


if __name__ == "__main__":
    main()
