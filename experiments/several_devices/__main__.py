"""What HiFT needs, parks and sends on 8 and on 64 devices, for 70B and 8B parameters: computed by the planner.

    python -m experiments.several_devices [--again]

Each row is a run of `plan.py`; what is in `results.csv` is not planned again unless `--again` is given. Prints and
writes `summary.md`.
"""

import argparse

from experiments.several_devices.plans import HERE, TABLE, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="plan also what is in the record")
    arguments = parser.parse_args()
    TABLE.complete(TABLE.rows, arguments.again)
    text = summary(TABLE.load())
    (HERE / "summary.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
