"""Does the order of the blocks matter, and their size: a sweep by one multirun of the application.

    python -m experiments.order_and_group [--again]

runs `python train.py -m ...` with what stands in `SWEPT` (27 runs, less than an hour of two cores) unless its table,
`results.csv`, is there; `--again` runs it in any case. Then writes `summary.md` and `order_and_group.png`, and prints
the page.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.order_and_group.page import HERE, RESULTS, load, plot, summary
from hift_lightning.sweep import TABLE_FILE

SWEPT = {
    "strategy.order": "top2down,bottom2up,random",
    "strategy.group_size": "1,2,4",
    "learning_rate": "1.0e-4,2.0e-4,4.0e-4",
}
FIXED = (
    "trainer.max_steps=250",
    "trainer.enable_progress_bar=false",
    "callbacks.progress_bar=null",
    "trainer.enable_checkpointing=false",
    "callbacks.checkpoint=null",
    "logger=none",
)


def run_sweep() -> None:
    """Run the application, and keep the table that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["train.py", "-m", *(f"{key}={values}" for key, values in SWEPT.items()), *FIXED]
        subprocess.run([sys.executable, *words, f"hydra.sweep.dir={folder}"], cwd=HERE.parents[1], check=True)
        shutil.copy(Path(folder) / TABLE_FILE, RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="run the sweep also where its table is there")
    if parser.parse_args().again or not RESULTS.exists():
        run_sweep()
    rows = load()
    text = summary(rows)
    (HERE / "summary.md").write_text(text)
    plot(rows, HERE / "order_and_group.png")
    print(text)


if __name__ == "__main__":
    main()
