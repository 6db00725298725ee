"""Memory, speed and paging on a GPU: measured, beside the paper's figures and the planner's.

    python -m experiments.gpu_check [--device sim] [--folder FOLDER] [--again] [--only NAME ...]

Every row is measured by a process of its own. What is in the record (the .csv files beside this one) is not measured
again unless `--again` is given, so that it can be stopped and go on. Prints and writes `summary.md`, and plots
`gpu_check.png`. Without a CUDA device only the page is written, from the record as it is. Two of the peers come from
PyPI: pip install peft bitsandbytes

`--device sim` goes the same ways in small on the simulated accelerator of the tests, whose times mean nothing, and
writes to `outputs/gpu_check`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.gpu_check.card import differences
from experiments.gpu_check.plot import plot
from experiments.gpu_check.profiles import PROFILES
from experiments.gpu_check.record import Record, waiting_for_packages
from experiments.gpu_check.summary import summary


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=PROFILES, default="cuda", help="default: cuda")
    parser.add_argument("--folder", type=Path, help="where record, page and picture go")
    parser.add_argument("--again", action="store_true", help="measure also what is in the record")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="rows, or whole files such as memory.csv")
    arguments = parser.parse_args(words)

    profile = PROFILES[arguments.device]
    record = Record(profile, arguments.folder or profile.folder)
    known = {name for table in record.tables(layers=0) for name in (table.path.name, *table.rows)}
    if unknown := sorted(set(arguments.only) - known):
        parser.error(f"--only: {'; '.join(unknown)} is not among {'; '.join(sorted(known))}")
    record.folder.mkdir(parents=True, exist_ok=True)
    if reason := profile.device.missing():
        write_page(record)
        sys.exit(reason)
    measure(record, arguments.only, arguments.again)
    print(write_page(record))
    if failed := record.load().failed:
        sys.exit(
            f"{len(failed)} rows failed, as the page says; mend what it names, and measure them anew with "
            f"`--again --only {shlex.join(failed)}`."
        )


def measure(record: Record, only: Sequence[str], again: bool) -> None:
    """Measure what is missing and chosen.

    Args:
        record: what is there, and where it goes.
        only: names of rows, or of whole files; all if there are none.
        again: measure also what is there.
    """
    known = record.card.load()
    if known and not (again and not only) and (told := differences(known["card"], record.profile)):
        sys.exit(
            f"The record in `{record.folder}` is of another machine ({told}); measure all of it anew with `--again`, "
            "or keep another record with `--folder`."
        )
    record.card.complete(("card",), again and not only)
    for table in record.tables(int(record.card.load()["card"]["layers"])):
        waiting = waiting_for_packages(table.rows)
        for package, rows in waiting.items():
            print(f"{table.path.name}: {len(rows)} rows wait for a package: pip install {package}")
        whole = not only or table.path.name in only
        chosen = set(table.rows if whole else only).difference(*waiting.values())
        table.complete(chosen, again)


def write_page(record: Record) -> str:
    """Write the page and its picture from the record, and return the page."""
    measured = record.load()
    text = summary(record.profile, measured)
    (record.folder / "summary.md").write_text(text)
    if measured.card:
        plot(record.profile, measured, record.folder / "gpu_check.png")
    return text


if __name__ == "__main__":
    main()
