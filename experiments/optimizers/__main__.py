"""Any optimizer: five of them under HiFT and in full fine-tuning, accuracy on film reviews and peak bytes.

    python -m experiments.optimizers [--only AdamW SGDM ...] [--jobs 1] [--page]

A run takes a minute or two of one core, all of them some four hours. Runs that the CSV files beside this one have are
not done again, so that it can be stopped and go on. Then, or at once with `--page`, `summary.md` and `optimizers.png`
are made of the rows that there are.
"""

import argparse

from experiments.optimizers.grid import BYTES, FINAL, HERE, SEARCH, complete
from experiments.optimizers.methods import OPTIMIZERS
from experiments.optimizers.plot import plot
from experiments.optimizers.summary import summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time, each on one core")
    parser.add_argument("--page", action="store_true", help="only make the page")
    arguments = parser.parse_args()
    if not arguments.page:
        complete(arguments.only, arguments.jobs)
    search, final, peaks = (table.load() for table in (SEARCH, FINAL, BYTES))
    text = summary(search, final, peaks)
    (HERE / "summary.md").write_text(text)
    plot(final, peaks, HERE / "optimizers.png")
    print(text)


if __name__ == "__main__":
    main()
