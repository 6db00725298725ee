"""What is lost when something goes wrong: runs that are killed, disks that are full, files that are damaged.

    python -m experiments.faults [--again] [--only WORD]

Takes about ten minutes; what is in `results.csv` beside this file is not tried again unless `--again` is given. Prints
and writes `summary.md`.
"""

import argparse

from experiments.faults.summary import HERE, TABLE, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="try also what is in the record")
    parser.add_argument("--only", default="", help="part of the names of the faults to try")
    arguments = parser.parse_args()
    TABLE.complete([name for name in TABLE.rows if arguments.only in name], arguments.again)
    text = summary(TABLE.load())
    (HERE / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
