"""Accuracy of methods on data sets: the search for each one's learning rate, then runs with five seeds.

    python -m experiments.quality [--data-sets "film reviews"] [--methods "full AdamW" HiFT] [--jobs 1] [--again]

A run takes about a minute and a half of one core. Runs that `search.csv` and `final.csv` have are not done again unless
`--again` is given, so that it can be stopped and go on.
"""

import argparse

from experiments.quality.data_sets import DATA_SETS
from experiments.quality.grid import complete
from experiments.quality.methods import CONTESTANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time, each on one core")
    parser.add_argument("--again", action="store_true", help="run also what is in the record")
    arguments = parser.parse_args()
    complete(arguments.data_sets, arguments.methods, arguments.again, arguments.jobs)


if __name__ == "__main__":
    main()
