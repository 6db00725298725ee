"""The runs of the application, and the page on them."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from experiments.table import Rows, Table, markdown

HERE = Path(__file__).parent
STEPS = 250
SEEDS = (42, 43, 44)
DTYPES = {"fp32": "null", "bf16": "bfloat16"}
RUNS = {f"{dtype}, seed {seed}": (dtype, seed) for seed in SEEDS for dtype in DTYPES}


def measure(name: str) -> dict[str, object]:
    """One run of the application."""
    dtype, seed = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "train.py",
            f"strategy.parked_dtype={DTYPES[dtype]}",
            f"seed={seed}",
            f"trainer.max_steps={STEPS}",
            "trainer.enable_progress_bar=false",
            "callbacks.progress_bar=null",
            "logger=none",
            f"hydra.run.dir={folder}",
        ]
        subprocess.run([sys.executable, *command], cwd=HERE.parents[1], check=True)
        metrics = json.loads(Path(folder, "metrics.json").read_text())
    columns = ("steps", "test/accuracy_before", "test/accuracy", "test/loss", "val/loss", "memory/parked_bytes")
    return {"dtype": dtype, "seed": seed, **{column: metrics[column] for column in columns}}


def summary(rows: Rows) -> str:
    """The text; every number in it comes from the rows."""
    lines = [
        [
            row["dtype"],
            row["seed"],
            f"{float(row['test/accuracy']):.2%}",
            f"{float(row['test/loss']):.4f}",
            f"{float(row['val/loss']):.4f}",
            f"{int(row['memory/parked_bytes']):,}",
        ]
        for row in rows.values()
    ]
    first = next(iter(rows.values()))
    parts = [
        f"`python train.py`, stopped after {first['steps']} steps: MiniLM on film reviews, AdamW, HiFT with the "
        "moments parked in the dtype in which they are computed (fp32) and in bf16 (`strategy.parked_dtype=bfloat16`). "
        "They are computed on in fp32 either way, and rounded each time that a block is parked.",
        markdown(["moments parked in", "seed", "test accuracy", "test loss", "validation loss", "parked bytes"], lines),
    ]
    if rows.keys() == RUNS.keys():
        parts.append(_comparison(rows))
    return "\n\n".join(parts) + "\n"


def _comparison(rows: Rows) -> str:
    def column(dtype: str, name: str) -> list[float]:
        return [float(rows[f"{dtype}, seed {seed}"][name]) for seed in SEEDS]

    accuracy = {dtype: column(dtype, "test/accuracy") for dtype in DTYPES}
    loss = {dtype: column(dtype, "test/loss") for dtype in DTYPES}
    points = [100 * (bf16 - fp32) for fp32, bf16 in zip(accuracy["fp32"], accuracy["bf16"], strict=True)]
    losses = [bf16 - fp32 for fp32, bf16 in zip(loss["fp32"], loss["bf16"], strict=True)]
    kept = [
        bf16 / fp32
        for fp32, bf16 in zip(column("fp32", "memory/parked_bytes"), column("bf16", "memory/parked_bytes"), strict=True)
    ]
    spread = 100 * (max(accuracy["fp32"]) - min(accuracy["fp32"]))
    return (
        f"With bf16, {statistics.mean(kept):.4f} of the bytes are parked. Over the {len(SEEDS)} seeds the mean test "
        f"accuracy is {statistics.mean(accuracy['bf16']):.2%} against {statistics.mean(accuracy['fp32']):.2%}; of one "
        f"seed it changes by {min(points):+.2f} to {max(points):+.2f} points, and the test loss by {min(losses):+.4f} "
        f"to {max(losses):+.4f}. With fp32, the seeds alone are {spread:.2f} points apart."
    )


TABLE = Table(HERE / "results.csv", tuple(RUNS), measure)
