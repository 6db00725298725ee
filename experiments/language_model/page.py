"""The page and its picture: every number comes from the CSV files beside it."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments.language_model.grid import LONGER, SEEDS, UNTRAINED, Run, best_exponent
from experiments.language_model.methods import CONTESTANTS, FULL, HIFT, LORA, ONE_TURN, ROWS, STEPS, STILL, TOKENS, TOP
from experiments.language_model.variants import ALWAYS, OF_8
from experiments.quality.comparison import mean
from experiments.quality.grid import SEARCH_SEED
from experiments.quality.methods import CLIP_NORM, WARMUP, rate_of
from experiments.table import Row, Rows, markdown

MIB = 2**20
BESIDE = {HIFT: (7, -4), STILL: (7, -12), TOP: (-7, -4)}
"""Where labels begin, or end if it is to the left, in points from theirs: most HiFT has the same peak."""


def perplexities(search: Rows, final: Rows, method: str) -> list[float]:
    """Of the test, by seed, at the method's best rate; empty until all seeds are there."""
    exponent = best_exponent(search, method)
    if exponent is None:
        return []
    names = [Run(method, exponent, CONTESTANTS[method].steps, seed).name for seed in SEEDS]
    return [float(final[name]["test_perplexity"]) for name in names] if final.keys() >= set(names) else []


def summary(search: Rows, final: Rows, longer: Rows, variants: Rows, before: Rows, cost: Rows) -> str:
    """Make it of the rows that there are.

    Args:
        search: of the search for learning rates (`search.csv`).
        final: of the final runs (`final.csv`).
        longer: of runs with more steps (`longer.csv`).
        variants: of HiFT with other settings (`variants.csv`).
        before: of the model without training (`untrained.csv`).
        cost: FLOPs and bytes of each method (`cost.csv`).
    """
    found = {method: values for method in CONTESTANTS if (values := perplexities(search, final, method))}
    missing = [method for method in CONTESTANTS if method not in found]
    parts = [
        _setting(before),
        _results(found, before, cost),
        f"± is the standard error over {len(SEEDS)} seeds, which decide the order of the rows; the difference is "
        "paired by seed. FLOPs are those of the mean step of a cycle. Peak bytes are counted on the simulated "
        "accelerator, the weights among them.",
        "![Perplexity against peak memory](language_model.png)",
        _told(found, cost),
        *_reasons(search, longer, variants),
        "## Learning rates",
        f"The best on the validation part among powers of two times 1e-4, tried until both its neighbours are worse, "
        f"with seed {SEARCH_SEED}, which the final runs do not have.",
        _rates(search),
        *_variants(variants),
        f"Not run yet: {'; '.join(missing)}." if missing else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _setting(before: Rows) -> str:
    tokens = ", ".join(f"{int(before[UNTRAINED][f'{part}_tokens']):,} for {part}" for part in ("validation", "test"))
    return (
        "SmolLM2-135M-Instruct (30 layers, the embeddings used again as head) goes on with the first 54 chapters of "
        f"Moby-Dick: the end of the text is for the test, what is before it for validation (tokens: {tokens}). fp32 on "
        f"one core, AdamW, batches of {ROWS} rows of {TOKENS} tokens, linear decay after a warm-up of {WARMUP:.0%} of "
        f"the steps, gradients clipped by norm at {CLIP_NORM:g}. Every method has as many steps as have the FLOPs of "
        f"{STEPS} steps of full fine-tuning, and not more."
    )


def _results(found: dict[str, list[float]], before: Rows, cost: Rows) -> str:
    lines = []
    if before:
        lines.append(["untrained", "", "", f"{float(before[UNTRAINED]['test_perplexity']):.1f}", "", "", ""])
    for method, contestant in CONTESTANTS.items():
        own = found.get(method, [])
        of_full = float(cost[method]["gflop"]) / float(cost[FULL]["gflop"]) if {method, FULL} <= cost.keys() else None
        lines.append(
            [
                method,
                str(contestant.steps),
                "" if of_full is None else f"{of_full:.3f}",
                str(mean(own)) if own else "",
                less(found, method, FULL) if method != FULL else "",
                f"{int(cost[method]['peak_bytes']) / MIB:.0f}" if method in cost else "",
                contestant.remark,
            ]
        )
    head = ["method", "steps", "FLOPs of a step of full", "test perplexity", "over full AdamW", "peak MiB", ""]
    return markdown(head, lines)


def less(found: dict[str, list[float]], method: str, other: str) -> str:
    """What a method has more than another, as mean and standard error; empty where one of them has not been run."""
    if not {method, other} <= found.keys():
        return ""
    return mean([own - theirs for own, theirs in zip(found[method], found[other], strict=True)]).signed()


def _told(found: dict[str, list[float]], cost: Rows) -> str:
    """Where HiFT stands, less being better."""
    sentences = []
    for method, words in (
        (HIFT, "As in the paper, with a new block in every step"),
        (STILL, "The same without momentum"),
        (ONE_TURN, "With one turn a block"),
        (TOP, "With a new block in every step, without momentum, and with the top 8 layers trained in all steps"),
    ):
        if against := [f"{gain} against {other}" for other in (FULL, LORA) if (gain := less(found, method, other))]:
            peaks = ", ".join(f"{name} {int(cost[name]['peak_bytes']) / MIB:.0f}" for name in (method, LORA, FULL))
            sentences.append(f"{words}: {' and '.join(against)} (less is better; peak in MiB: {peaks}).")
    return " ".join(sentences)


def _rates(search: Rows) -> str:
    lines = []
    for method in CONTESTANTS:
        rows = sorted((row for row in search.values() if row["method"] == method), key=lambda row: int(row["exponent"]))
        chosen = best_exponent(search, method)
        tried = [f"{float(row['rate']):.1e}: {float(row['validation_perplexity']):.1f}" for row in rows]
        lines.append([method, "" if chosen is None else f"{rate_of(chosen):.1e}", ", ".join(tried)])
    return markdown(["method", "rate", "tried, with validation perplexity"], lines)


def _perplexities(row: Row) -> list[str]:
    return [f"{float(row[f'{part}_perplexity']):.1f}" for part in ("validation", "test")]


def _reasons(search: Rows, longer: Rows, variants: Rows) -> list[str]:
    """What was tried to find out why HiFT loses, with the validation part and one seed."""

    def best(rows: Rows, belongs: Callable[[str], bool]) -> str:
        found = [float(row["validation_perplexity"]) for name, row in rows.items() if belongs(name)]
        return f"{min(found):.1f}" if found else "not run"

    def searched(method: str) -> str:
        return best(search, lambda name: name.startswith(f"{method}, rate "))

    def tried(kind: str) -> str:
        return best(variants, lambda name: name.rpartition(", rate ")[0] == kind)

    updates = CONTESTANTS[HIFT].steps / CONTESTANTS[HIFT].cycle
    parts = [
        "## Where HiFT loses, and why",
        f"Validation perplexity with seed {SEARCH_SEED} and the best rate that was tried: full AdamW {searched(FULL)}, "
        f"LoRA {searched(LORA)}. HiFT as in the paper {searched(HIFT)}, and without momentum {searched(STILL)}: the "
        "momentum that a block begins its turn with is a mean of gradients at other weights. By order: `top2down` "
        f"{searched(HIFT)}, `random` {tried('4 layers a block, random')}, `bottom2up` "
        f"{tried('4 layers a block, bottom2up')}; with a rate that is not delayed "
        f"{tried('4 layers a block, rate not delayed')}. With 8 layers a block "
        f"{tried(OF_8)}, and without momentum {tried(f'{OF_8}, no momentum')}. With one turn a block "
        f"{tried('4 layers a block, one turn')}, without momentum {searched(ONE_TURN)}, and with a rate that falls "
        f"anew in each turn {tried('4 layers a block, one turn, no momentum, rate anew in each turn')}. In these FLOPs "
        f"a weight has {updates:.0f} updates under HiFT and {STEPS} in full fine-tuning.",
        "Backward goes through the top layers for nearly every block, so to train them in all steps "
        "(`always_active`) adds the products for their own gradients, and takes the cheap turns of the top blocks "
        f"away: without momentum and with the top layer {tried(ALWAYS[1])}, with the top 4 {tried(ALWAYS[4])}, with 8 "
        f"{searched(TOP)}, with 12 {tried(ALWAYS[12])}.",
    ]
    if longer:
        parts += [
            f"With {LONGER} times as many steps, at that rate or half of it, and with seed {SEARCH_SEED}:",
            markdown(
                ["method", "rate", "steps", "validation", "test", "loss of the last 20 training batches"],
                [
                    [
                        row["method"],
                        f"{float(row['rate']):.1e}",
                        row["steps"],
                        *_perplexities(row),
                        f"{float(row['train_loss']):.2f}",
                    ]
                    for row in longer.values()
                ],
            ),
        ]
    return parts


def _variants(variants: Rows) -> list[str]:
    if not variants:
        return []
    ranked = sorted(variants.values(), key=lambda row: float(row["validation_perplexity"]))
    lines = [[row["name"], row["steps"], *_perplexities(row)] for row in ranked]
    return [
        "## Other settings of HiFT",
        f"With seed {SEARCH_SEED}, top2down where no order is named, in the same FLOPs "
        "(`python -m experiments.language_model.variants`). Where a block has several steps in turn the rate changes "
        "at every step (`lr_update=step`).",
        markdown(["setting", "steps", "validation", "test"], lines),
    ]


def plot(search: Rows, final: Rows, before: Rows, cost: Rows, path: Path) -> None:
    """Test perplexity against peak bytes, a point for each method.

    Args:
        search: of the search for learning rates.
        final: of the final runs.
        before: of the model without training.
        cost: FLOPs and bytes of each method.
        path: of the PNG.
    """
    figure, axis = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for method in CONTESTANTS:
        if values := perplexities(search, final, method):
            color = "tab:orange" if method.startswith("HiFT") else "black" if method == FULL else "tab:gray"
            place, height = int(cost[method]["peak_bytes"]) / MIB, mean(values)
            axis.errorbar(place, height.mean, yerr=height.error, fmt="o", capsize=4, color=color)
            beside = BESIDE.get(method, (7, 5))
            words, side = (textwrap.fill(method, 28), "right") if beside[0] < 0 else (method, "left")
            axis.annotate(words, (place, height.mean), beside, textcoords="offset points", color=color, ha=side)
    axis.axhline(float(before[UNTRAINED]["test_perplexity"]), color="tab:gray", linestyle=":", label="untrained")
    axis.set_xlim(0, 1.25 * max(int(row["peak_bytes"]) for row in cost.values()) / MIB)
    axis.set_xlabel("peak bytes on the device, MiB")
    axis.set_ylabel("test perplexity")
    axis.set_title(f"In the FLOPs of {STEPS} steps of full fine-tuning (bars: standard error over seeds)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="center right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
