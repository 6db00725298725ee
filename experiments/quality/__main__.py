"""Accuracy of methods on data sets: the search for each one's learning rate, then runs with five seeds.

    python -m experiments.quality [--data-sets "film reviews"] [--methods "full AdamW" HiFT] [--jobs 1] [--again]

A run takes about a minute and a half of one core. Runs that `search.csv` and `final.csv` have are not done again unless
`--again` is given, so that it can be stopped and go on. Then, or at once with `--page`, `summary.md`, `quality.png` and
`against_memory.png` are made of what there is. Three other commands have records for the page:
`python -m experiments.quality.cost` and `python -m experiments.quality.pair_times`, which want the machine for
themselves, and `python -m experiments.quality.variants`. Three of the methods are packages:

    pip install peft
    pip install --no-deps badam galore-torch bitsandbytes
"""

import argparse

from experiments.quality.comparison import accuracies
from experiments.quality.cost import BYTES, times
from experiments.quality.data_sets import DATA_SETS
from experiments.quality.grid import DATA, FINAL, HERE, SEARCH, complete
from experiments.quality.methods import CONTESTANTS, equal_steps, equal_time
from experiments.quality.pair_times import TABLE as PAIRS
from experiments.quality.plot import against_memory, plot
from experiments.quality.summary import summary
from experiments.quality.variants import TABLE as VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time, each on one core")
    parser.add_argument("--again", action="store_true", help="run also what is in the record")
    parser.add_argument("--page", action="store_true", help="only make the page")
    arguments = parser.parse_args()
    if not arguments.page:
        complete(arguments.data_sets, arguments.methods, arguments.again, arguments.jobs)
    data, search, final, variants, pairs, peaks = (t.load() for t in (DATA, SEARCH, FINAL, VARIANTS, PAIRS, BYTES))
    text = summary(data, search, final, variants, times(), pairs, peaks)
    (HERE / "summary.md").write_text(text)
    if in_time := accuracies(final, equal_time):
        plot(in_time, accuracies(final, equal_steps), HERE / "quality.png")
        against_memory(in_time, peaks, HERE / "against_memory.png")
    print(text)


if __name__ == "__main__":
    main()
