"""What it costs in accuracy to park the moments in bf16: `python train.py` with and without.

    python -m experiments.parked_dtype [--again]

Twelve runs of a few minutes each; what is in `results.csv` beside this file is not run again unless `--again` is given.
Prints and writes `summary.md`.
"""

import argparse

from experiments.parked_dtype.runs import HERE, TABLE, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="run also what is in the record")
    arguments = parser.parse_args()
    TABLE.complete(TABLE.rows, arguments.again)
    text = summary(TABLE.load())
    (HERE / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
