"""The page of the run of LLaMA-7B on a CPU is written by hand: its numbers are those of the files that the run left."""

import csv
import json
import re
from pathlib import Path

HERE = Path(__file__).parents[2] / "experiments" / "llama7b_cpu"
GIB, MIB = 2**30, 2**20


def test_the_page_has_the_figures_of_the_record():
    metrics = json.loads((HERE / "metrics.json").read_text())
    steps = json.loads((HERE / "changed_parameters.json").read_text())
    with (HERE / "metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    anon, peak = metrics["memory/peak_rss_anon_bytes"], metrics["memory/peak_rss_bytes"]
    weights, gradients, parked = (
        f"{metrics[f'memory/{key}_bytes'] / MIB:,.1f}" for key in ("peak_weights", "peak_gradients", "parked")
    )
    log, page = ((HERE / name).read_text() for name in ("log.txt", "README.md"))
    parameters = re.search(r"of ([\d,]+) parameters", log)
    minutes, seconds = re.search(r"real\s+(\d+)m(\d+)", log).groups()
    for line in (
        f"{parameters[1]} random bf16 weights",
        f"{minutes} min {int(seconds):02d} s in all",
        f"| peak RssAnon | {anon:,} bytes, {anon / GIB:.2f} GiB (",
        f"| peak RSS | {peak:,} bytes, {peak / GIB:.2f} GiB |",
        f"| weights and gradients at their most | {weights} and {gradients} MiB |",
        f"| parked in files after two steps | {parked} MiB |",
        f"| losses | {losses[0]:.4f} (the head's turn), {losses[1]:.4f} (the top layer's) |",
    ):
        assert line in page
    assert [step["loss"] for step in steps] == losses
    assert [len(step["changed"]) for step in steps] == [1, 7]  # `lm_head`, and the seven matrices of the top layer
    assert not any(step["changed_outside_the_block"] or step["unchanged_in_the_block"] for step in steps)
    assert all(step["changed_in_its_master_only"] for step in steps)
