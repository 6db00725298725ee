"""Device memory of this project and of other ways to train with less, counted to the byte without a GPU.

    python -m experiments.memory [--again] [--only NAME ...]

Every row is measured by a process of its own, on the simulated accelerator of the tests (host memory on the CPU). What
is in the record (the .csv files beside this one) is not measured again unless `--again` is given. Prints and writes
`summary.md`, and plots `memory.png`. The peers come from PyPI:

    pip install peft
    pip install --no-deps badam galore-torch apollo-torch adam-mini lomo-optim bitsandbytes
"""

import argparse

from experiments.memory.plot import plot
from experiments.memory.summary import summary
from experiments.memory.tables import CAP, DEPTH, HERE, OFFLOAD, PEAKS, VERSIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure also what is in the record")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows, or whole files such as cap.csv")
    arguments = parser.parse_args()

    tables = (PEAKS, CAP, DEPTH, OFFLOAD)
    known = {name for table in tables for name in (table.path.name, *table.rows)}
    if unknown := sorted(set(arguments.only) - known):
        parser.error(f"--only: {', '.join(unknown)} is not among {'; '.join(sorted(known))}")
    VERSIONS.complete(VERSIONS.rows, arguments.again)
    for table in tables:
        whole = not arguments.only or table.path.name in arguments.only
        table.complete(table.rows if whole else arguments.only, arguments.again)

    text = summary(*(table.load() for table in (VERSIONS, *tables)))
    (HERE / "summary.md").write_text(text)
    plot(PEAKS.load(), HERE / "memory.png")
    print(text)


if __name__ == "__main__":
    main()
