"""The page in front of all experiments: one table and two pictures, from their CSV files.

python -m experiments.front_page
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

from experiments.language_model import grid as language_model
from experiments.language_model import methods as of_language_model
from experiments.language_model.page import perplexities
from experiments.memory.tables import PEAKS
from experiments.paper_memory.jobs import LLAMA7B
from experiments.quality.comparison import accuracies, complete_data_sets, losses, mean, over_data_sets
from experiments.quality.cost import BYTES, times
from experiments.quality.data_sets import BATCH_SIZE, MAX_LENGTH
from experiments.quality.grid import FINAL
from experiments.quality.methods import (
    FULL,
    FULL_NO_DROPOUT,
    HIFT,
    IN_LESS,
    IN_MEMORY,
    LONG,
    LORA_NO_DROPOUT,
    ONE_TURN,
    TWO_IN_LORAS_TIME,
    equal_time,
    loras_steps,
)
from experiments.step_cost.runs import SIZES, TIMES
from experiments.step_cost.summary import ratios
from experiments.table import Row, markdown

PAGE = Path(__file__).with_name("README.md")
GIB, MIB = 2**30, 2**20
NONE = "—"
METHODS = (FULL, HIFT, "LoRA")
HEAD = ("", *METHODS, "page")
RECIPES = {
    HIFT: ("as in the paper", FULL, IN_MEMORY),
    LONG: ("20 steps a block, no momentum", FULL, IN_MEMORY),
    ONE_TURN: ("one turn a block, no momentum, head always, streamed", FULL, IN_LESS),
    TWO_IN_LORAS_TIME: (
        "so with two layers a block and the FFNs of the top two always, in the time of LoRA, and all three without "
        "dropout",
        FULL_NO_DROPOUT,
        LORA_NO_DROPOUT,
    ),
}
"""In words, and what it stands beside: full fine-tuning, and LoRA in as much memory."""


def text() -> str:
    """All of it."""
    parts = [
        "# Experiments",
        "Each folder has the program of an experiment, and where it has been run the raw results as CSV and a page in "
        "which every number comes from them, some with a picture; `python -m experiments.NAME` computes what is "
        "missing and writes the page anew. A page of what waits for its runs or for a GPU says so. "
        "[llama7b_cpu](llama7b_cpu/README.md) is a single run of `train.py`, with a page by hand. This page is "
        "written by `python -m experiments.front_page`.",
        markdown(HEAD, [*_memory(), *_steps(), *_quality(), *_language_model()]),
        f"{NONE}: not planned, since the paper's table has no LoRA; full fine-tuning does not fit in that memory.",
        "![Peak bytes of each method](memory/memory.png)",
        "![Accuracy of each method against peak memory](quality/against_memory.png)",
        "Nothing here was measured on a GPU: bytes are counted on a simulated accelerator or planned, times are of a "
        "CPU. [gpu_check](gpu_check/summary.md) is the page that waits for one.",
    ]
    return "\n\n".join(parts) + "\n"


def _line(words: str, cells: Iterable[str], page: str) -> list[str]:
    return [words, *cells, f"[{page}]({page}/summary.md)"]


def _memory() -> list[list[str]]:
    peaks, planned, own = PEAKS.load(), LLAMA7B.load(), BYTES.load()
    rows = [peaks[name] for name in ("full AdamW", "streamed", "LoRA r16")]
    llama = [planned[f"LLaMA-7B, AdamW, {way}"] for way in ("mixed, full", "Mixed^Hi, HiFT")]
    minilm = [own[f"{method}, batch {BATCH_SIZE}"] for method in METHODS]
    return [
        _line("peak over the bytes of the weights, small LLaMA", (f"{_over_weights(r):.2f}" for r in rows), "memory"),
        _line("GFLOP of a step of it", (f"{float(r['gflop']):.1f}" for r in rows), "memory"),
        _line(
            "peak of LLaMA-7B, mixed precision (HiFT: Mixed^Hi), batch 8 x 512, GiB",
            [*(f"{int(r['peak']) / GIB:.1f}" for r in llama), NONE],
            "paper_memory",
        ),
        _line(
            f"peak of MiniLM, batch {BATCH_SIZE} x {MAX_LENGTH}, MiB",
            (f"{int(r['peak_bytes']) / MIB:.0f}" for r in minilm),
            "quality",
        ),
    ]


def _over_weights(row: Row) -> float:
    return max(int(row["forward_backward_peak_bytes"]), int(row["update_peak_bytes"])) / int(row["weights_bytes"])


def _steps() -> list[list[str]]:
    lines, of_minilm = [], times()
    for size, measured in TIMES.load().items():
        if size in SIZES:
            costs = [measured.costs[name] for name in (FULL, "HiFT block", "LoRA r16")]
            over = [statistics.median(ratios(cost, costs[0])) for cost in costs]
            lines.append(_line(f"time of a step over full's, {size} LLaMA", map("{:.2f}".format, over), "step_cost"))
    over = [float(of_minilm[method]["time_of_full"]) for method in METHODS]
    return [*lines, _line("time of a step over full's, MiniLM", map("{:.2f}".format, over), "quality")]


def _quality() -> list[list[str]]:
    final = FINAL.load()
    right, lost = accuracies(final, equal_time), losses(final, equal_time)
    lines = []
    for recipe, (told, full, lora) in RECIPES.items():
        methods = (full, recipe, lora)
        if data_sets := complete_data_sets(right, methods):
            cells = [f"{over_data_sets(right, m, data_sets)}; {over_data_sets(lost, m, data_sets)}" for m in methods]
            words = (
                f"accuracy, and test loss in hundredths of a nat, on {len(data_sets)} data sets in equal time ({told}; "
                "LoRA in as much memory)"
            )
            lines.append(_line(words, cells, "quality"))
    pair = (TWO_IN_LORAS_TIME, LORA_NO_DROPOUT)
    right, lost = accuracies(final, loras_steps), losses(final, loras_steps)
    if data_sets := complete_data_sets(right, pair):
        cells = [f"{over_data_sets(right, m, data_sets)}; {over_data_sets(lost, m, data_sets)}" for m in pair]
        words = (
            f"accuracy, and test loss in hundredths of a nat, on {len(data_sets)} data sets in equal peak memory and "
            "equal steps (the same recipe, without dropout; HiFT has more texts in a batch, and takes longer)"
        )
        lines.append(_line(words, [NONE, *cells], "quality"))
    return lines


def _language_model() -> list[list[str]]:
    search, final = language_model.SEARCH.load(), language_model.FINAL.load()
    lines = []
    for recipe, told in (
        (of_language_model.HIFT, "as in the paper"),
        (of_language_model.STILL, "without momentum"),
        (of_language_model.TOP, "without momentum, top 8 of 30 layers always"),
    ):
        methods = (of_language_model.FULL, recipe, of_language_model.LORA)
        found = [perplexities(search, final, method) for method in methods]
        if all(found):
            words = f"perplexity of SmolLM2 on Moby-Dick in equal FLOPs, less is better ({told})"
            lines.append(_line(words, (str(mean(values)) for values in found), "language_model"))
    return lines


def main() -> None:
    PAGE.write_text(text())
    print(text())


if __name__ == "__main__":
    main()
