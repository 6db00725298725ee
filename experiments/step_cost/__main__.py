"""FLOPs and milliseconds of a training step: full fine-tuning, HiFT, and a rotation written by hand.

    python -m experiments.step_cost [--cycles 12]

Each contestant is a process of its own. They take turns, a cycle of optimizer steps each, while the others wait, so
that a change in the machine's speed meets all three. The figure of a contestant is the median over cycles of the mean
step of a cycle. Writes ``results.csv`` and ``summary.md`` beside this file.
"""

import argparse
import csv
import statistics
from pathlib import Path

import torch

from experiments.step_cost.contestants import BATCH, CONTESTANTS, CYCLE, LAYERS, LENGTH, WIDTH
from experiments.step_cost.measure import flops_of, times_of_all

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=12, help="cycles that are measured, of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each contestant")
    arguments = parser.parse_args()

    times = times_of_all(CONTESTANTS, arguments.cycles, arguments.threads)
    flops = {contestant: flops_of(contestant) for contestant in CONTESTANTS}
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["contestant", "cycle", "step_ms", "step_gflop"])
        for contestant, values in times.items():
            for cycle, value in enumerate(values):
                writer.writerow([contestant, cycle, f"{value:.3f}", f"{flops[contestant]:.4f}"])

    medians = {contestant: statistics.median(values) for contestant, values in times.items()}
    lines = [
        f"LLaMA of {LAYERS} layers, width {WIDTH}, fp32, AdamW, batch {BATCH} x {LENGTH}, {arguments.threads} threads, "
        f"{arguments.cycles} cycles of {CYCLE} steps each, interleaved.",
        "",
        "| | GFLOP per step | of full | ms per step (median of cycles) | fastest to slowest cycle | of full |",
        "|---|---|---|---|---|---|",
        *(
            f"| {contestant} | {flops[contestant]:.3f} | {flops[contestant] / flops['full']:.3f} "
            f"| {medians[contestant]:.1f} | {min(times[contestant]):.1f} to {max(times[contestant]):.1f} "
            f"| {medians[contestant] / medians['full']:.3f} |"
            for contestant in CONTESTANTS
        ),
        "",
        f"HiFT's step takes {medians['hift'] / medians['by_hand']:.3f} of the time of the loop by hand.",
    ]
    (HERE / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
