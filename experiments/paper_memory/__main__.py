"""The paper's tables of memory with this project's planner beside every cell, without a GPU.

    python -m experiments.paper_memory [--again] [--only NAME ...]

Every cell is a plan of one training step, by a process of its own. What is in the record (the .csv files beside this
one; `paper.csv` holds the paper's figures) is not planned again unless `--again` is given; all of it takes half an
hour on one core. Prints and writes `summary.md`, and plots `paper_memory.png`.
"""

import argparse

from experiments.paper_memory.comparison import paper
from experiments.paper_memory.jobs import BEYOND, HERE, LLAMA7B, OTHERS
from experiments.paper_memory.plot import plot
from experiments.paper_memory.summary import summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="plan also what is in the record")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows, or whole files such as others.csv")
    arguments = parser.parse_args()

    tables = (LLAMA7B, OTHERS, BEYOND)
    known = {name for table in tables for name in (table.path.name, *table.rows)}
    if unknown := sorted(set(arguments.only) - known):
        parser.error(f"--only: {'; '.join(unknown)} is not among {'; '.join(sorted(known))}")
    for table in tables:
        whole = not arguments.only or table.path.name in arguments.only
        table.complete(table.rows if whole else arguments.only, arguments.again)

    records = [table.load() for table in tables]
    if missing := [
        name for table, rows in zip(tables, records, strict=True) for name in table.rows if name not in rows
    ]:
        print(f"{len(missing)} rows are missing yet, the first is {missing[0]}; the page wants all of them.")
        return
    llama, others, beyond = records
    text = summary(paper(), llama, others, beyond)
    (HERE / "summary.md").write_text(text)
    plot(paper(), llama, others, beyond, HERE / "paper_memory.png")
    print(text)


if __name__ == "__main__":
    main()
