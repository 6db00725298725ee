"""The page: every number comes from the CSV files beside it."""

import statistics
from collections.abc import Callable, Collection, Iterator

from experiments.quality.comparison import (
    Results,
    accuracies,
    chosen_exponents,
    complete_data_sets,
    less,
    losses,
    mean,
    missing_in_steps,
    missing_in_time,
    over_data_sets,
    within,
)
from experiments.quality.cost import bytes_row, one_more
from experiments.quality.data_sets import BATCH_SIZE, DATA_SETS, MAX_LENGTH
from experiments.quality.grid import RUN_OFF_SEEDS
from experiments.quality.methods import (
    CLIP_NORM,
    CONTESTANTS,
    FEW_SEEDS,
    FULL,
    FULL_NO_DROPOUT,
    HIFT,
    IN_LESS,
    IN_MEMORY,
    LONG,
    LORA_NO_DROPOUT,
    LORAS_STEPS,
    MOST_TEXTS,
    ONE_TURN,
    ONE_TURN_NO_DROPOUT,
    OTHERS_OF_ALL_WEIGHTS,
    PLANNED_SEEDS,
    STEPS,
    TOP,
    TOP_IN_LORAS_TIME,
    TOP_NO_DROPOUT,
    TWO_IN_LORAS_TIME,
    WARMUP,
    equal_steps,
    equal_time,
    loras_steps,
    rate_of,
)
from experiments.quality.pair_times import IN_LORAS_TIME, ratios, steps_in_loras_time
from experiments.quality.variants import COUNTS, DATA, NO_DECAY, VARIANTS, WARM_UP
from experiments.table import Row, Rows, markdown

MIB = 2**20
CLOSELY = [name for name, contestant in CONTESTANTS.items() if contestant.closely]
COMPARED = (
    *((method, FULL) for method in (HIFT, LONG, ONE_TURN, TOP, TOP_NO_DROPOUT)),
    *((method, FULL_NO_DROPOUT) for method in (ONE_TURN_NO_DROPOUT, TOP_NO_DROPOUT, *IN_LORAS_TIME)),
    *((method, other) for method in (HIFT, LONG, ONE_TURN) for other in OTHERS_OF_ALL_WEIGHTS),
    *((method, IN_MEMORY) for method in (HIFT, LONG, ONE_TURN)),
    *((method, IN_LESS) for method in (ONE_TURN, TOP_NO_DROPOUT)),
    *((method, LORA_NO_DROPOUT) for method in (ONE_TURN_NO_DROPOUT, TOP_NO_DROPOUT, *IN_LORAS_TIME)),
)
"""Recipes of HiFT, and what each is put beside: full fine-tuning, other methods that train all weights, and LoRA with
as many texts as fit in its memory."""


def summary(data: Rows, search: Rows, final: Rows, variants: Rows, cost: Rows, pairs: Rows, peaks: Rows) -> str:
    """Make it of the records.

    Args:
        data: of the data sets (`data.csv`).
        search: of the search for learning rates (`search.csv`).
        final: of the final runs (`final.csv`).
        variants: of HiFT with other settings (`variants.csv`).
        cost: of a step's time and FLOPs (`cost.csv`).
        pairs: of steps of HiFT and LoRA in turn (`pair_times.csv`).
        peaks: of bytes (`bytes.csv`).
    """
    in_time, in_steps = accuracies(final, equal_time), accuracies(final, equal_steps)
    lost = losses(final, equal_time)
    *others, last = (str(CONTESTANTS[name].seeds) for name in CLOSELY)
    parts = [
        f"MiniLM (pretrained, 6 layers) with a new head, fine-tuned in fp32 on one core: AdamW, batch {BATCH_SIZE}, at "
        f"most {MAX_LENGTH} tokens, linear decay after a warm-up of {WARMUP:.0%} of the steps, gradients clipped by "
        f"norm at {CLIP_NORM:g}. {FEW_SEEDS} seeds, each with its own new head and batches, the same for all. "
        "Test accuracy in points; ± is the standard error over seeds. Every method has its own learning rate on each "
        "data set, the best on the validation part among powers of two times 1e-4, with a seed that the final runs do "
        f"not have. {_list(CLOSELY)} are compared closely: of theirs the rates within a standard error of the "
        f"best are tried with {len(RUN_OFF_SEEDS)} seeds, and the final runs have {', '.join(others)} and {last}. "
        "What a method has over another is paired by seed, over the seeds that both have.",
        markdown(
            ["data set", "texts for training", "for the test", "classes", "most frequent class"],
            [
                [
                    f"{name}: {DATA_SETS[name].what}",
                    f"{int(row['train']):,}",
                    f"{int(row['test']):,}",
                    row["classes"],
                    f"{100 * float(row['majority']):.1f}",
                ]
                for name, row in data.items()
            ],
        ),
        *_accuracies(in_time, lost, in_steps, cost, pairs),
        *_in_memory(in_time, final, peaks, pairs),
        *_over_others(in_time, lost),
        *_reasons(in_time, variants),
        "## What a step costs",
        "Milliseconds are the median over cycles of the mean step of a cycle, the methods in turn in one process on "
        "one thread; 'time of full' is the median of the ratio in the same rounds. Those with one turn a block or "
        f"without dropout, and {' and '.join((IN_MEMORY, IN_LESS))}, were timed in other sessions, with full "
        "fine-tuning: compare their ratios, not "
        "their milliseconds. FLOPs are those of rounds after the timed ones. Peak bytes are counted on the simulated "
        f"accelerator with batches of {BATCH_SIZE} x {MAX_LENGTH} tokens, the weights among them; "
        + ", ".join(
            f"'{name}' has batches of {each.batch_size}"
            for name, each in CONTESTANTS.items()
            if each.batch_size != BATCH_SIZE
        )
        + ", in all columns.",
        _costs(cost, peaks),
        "## Learning rates",
        _rates(final),
        "## Other settings of HiFT",
        _variants(variants),
        _missing(search, final, variants),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _accuracies(in_time: Results, lost: Results, in_steps: Results, cost: Rows, pairs: Rows) -> list[str]:
    if not in_time:
        return ["No method has all its final runs yet."]
    return [
        "## In equal time",
        f"At most as many steps, in tens, as take as long as {STEPS} steps of full fine-tuning (measured, see below)."
        + _fewer({name: row for name, row in cost.items() if any(method == name for _, method in in_time)})
        + _in_loras_time(in_time, cost, pairs),
        _table(in_time, equal_time),
        "![Accuracy over full fine-tuning](quality.png)",
        "The test loss of the same runs: mean cross entropy in hundredths of a nat, less is better.",
        _table(lost, equal_time),
        "## In equal steps",
        f"{STEPS} steps each.",
        _table(in_steps, equal_steps),
    ]


def _fewer(cost: Rows) -> str:
    """Which methods have fewer steps than their time allows."""
    of_full = {name: row for name, row in cost.items() if name not in IN_LORAS_TIME}
    names = [name for name, row in of_full.items() if equal_time(name) < _steps(row["time_of_full"])]
    # the reason that is given
    assert all(equal_time(name) * float(cost[name]["flops_of_full"]) < 1.01 * STEPS for name in names)
    return f" Fewer than their time allows, about as many as their FLOPs do, have {_list(names)}." if names else ""


def _in_loras_time(in_time: Results, cost: Rows, pairs: Rows) -> str:
    """How the steps of the recipes that are put beside LoRA in its time were found."""
    parts = []
    for method in dict.fromkeys(name for _, name in in_time if name in IN_LORAS_TIME):
        steps, found = equal_time(method), ratios(pairs, method)
        same = TOP_NO_DROPOUT if method == TOP_IN_LORAS_TIME else method
        parts.append(
            f"'{method}'{f', which is {same!r} with more steps' if same != method else ''}: a step takes "
            f"{statistics.fmean(found):.3f} times as long in the mean, {min(found):.2f} to {max(found):.2f} by data "
            f"set, so it could have {steps_in_loras_time(pairs, method)} steps and has {steps}, with "
            f"{steps / STEPS * float(cost[same]['flops_of_full']):.2f} of the FLOPs of {FULL}"
        )
    if not parts:
        return ""
    return (
        f" As many as take as long as the {equal_time(LORA_NO_DROPOUT)} of '{LORA_NO_DROPOUT}', when both train in "
        "turn on each data set, loading of batches included (`python -m experiments.quality.pair_times`), have "
        f"{'; and '.join(parts)}."
    )


def _list(names: Collection[str]) -> str:
    """In quotation marks, since names have commas."""
    *first, last = (f"'{name}'" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def _steps(of_full: str) -> int:
    return int(STEPS / float(of_full)) // 10 * 10


def _table(found: Results, steps_of: Callable[[str], int]) -> str:
    methods = [name for name in CONTESTANTS if any((data_set, name) in found for data_set in DATA_SETS)]
    shown = [name for name in DATA_SETS if any((name, method) in found for method in methods)]
    common = complete_data_sets(found, [FULL])
    lines = [[method, str(steps_of(method)), *_cells(found, method, shown, common, FULL)] for method in methods]
    return markdown(["method", "steps", *shown, "mean", f"over {FULL}"], lines)


def _cells(found: Results, method: str, shown: Collection[str], common: Collection[str], other: str) -> Iterator[str]:
    """What a method has on each data set that is shown, its mean over the common ones, and what it has over another."""
    for name in shown:
        yield str(mean(found[name, method])) if (name, method) in found else ""
    complete = bool(common) and all((name, method) in found for name in common)
    yield str(over_data_sets(found, method, common)) if complete else ""
    yield less(found, method, other, common).signed() if complete and method != other else ""


def _in_memory(in_time: Results, final: Rows, peaks: Rows, pairs: Rows) -> list[str]:
    lost = losses(final, equal_time)
    tables = [part for lora, method in MOST_TEXTS.items() for part in _within(in_time, lost, peaks, method, lora)]
    picture = "![Mean accuracy against peak memory](against_memory.png)"
    return ["## In equal peak memory", picture, *tables, *_in_loras_steps(final, peaks, pairs)] if tables else []


def _in_loras_steps(final: Rows, peaks: Rows, pairs: Rows) -> list[str]:
    """HiFT beside LoRA in as much memory and as many steps."""
    methods = (TWO_IN_LORAS_TIME, LORA_NO_DROPOUT)
    right, lost = (found(final, loras_steps) for found in (accuracies, losses))
    common = complete_data_sets(right, methods)
    if not common:
        return []
    lines = [
        [
            method.removesuffix(", in LoRA's time"),
            _mib(peaks[bytes_row(method)]),
            str(CONTESTANTS[method].batch_size),
            *_cells(right, method, common, common, LORA_NO_DROPOUT),
            *_cells(lost, method, [], common, LORA_NO_DROPOUT),
        ]
        for method in methods
    ]
    of_each = [f"{name} {less(right, *methods, [name]).signed()}" for name in common]
    return [
        f"The same two in equal peak memory and equal steps, {LORAS_STEPS} each, so that what a method does not need "
        "for gradients and activations goes into texts: a step of HiFT takes "
        f"{statistics.fmean(ratios(pairs, TWO_IN_LORAS_TIME)):.3f} times as long there. HiFT has the learning rates "
        f"of its runs in LoRA's time. Over LoRA by data set: {', '.join(of_each)}.",
        markdown(["method", "peak MiB", "batch", *common, "mean", "over LoRA", "mean loss", "over LoRA"], lines),
        *added_seeds(right, lost, *methods),
    ]


def _within(in_time: Results, lost: Results, peaks: Rows, method: str, lora: str) -> list[str]:
    """What trains within the peak of a method, beside LoRA with as many texts as fit there."""
    common = complete_data_sets(in_time, [lora, method])
    if not common:
        return []
    lines = [
        [
            name,
            _mib(peaks[bytes_row(name)]),
            str(CONTESTANTS[name].batch_size),
            str(equal_time(name)),
            *_cells(in_time, name, common, common, lora),
            *_cells(lost, name, [], common, lora),
        ]
        for name in within(peaks, method)
        if any((data_set, name) in in_time for data_set in common)
    ]
    most = peaks[one_more(lora)]
    return [
        f"What trains within the {_mib(peaks[bytes_row(method)])} MiB of '{method}', in equal time. LoRA has the "
        f"largest batch that fits: with {most['batch_size']} texts its peak is {_mib(most)} MiB. Full AdamW fits with "
        "none: its weights, gradients and moments alone are more.",
        markdown(
            ["method", "peak MiB", "batch", "steps", *common, "mean", f"over {lora}", "mean loss", f"over {lora}"],
            lines,
        ),
    ]


def _over_others(in_time: Results, lost: Results) -> list[str]:
    """What recipes of HiFT have more than full fine-tuning and than LoRA, by data set."""
    lines = []
    for method, other in COMPARED:
        common = complete_data_sets(in_time, [method, other])
        if common:
            of_each = [less(in_time, method, other, [name]).signed() if name in common else "" for name in DATA_SETS]
            means = [less(found, method, other, common).signed() for found in (in_time, lost)]
            lines.append([method, other, *of_each, *means])
    if not lines:
        return []
    return [
        "## What HiFT has over the others",
        "In equal time: points of accuracy more, and hundredths of a nat of test loss more. Means are over the "
        "data sets that both have been run on. What the recipes of HiFT are was found by trials on the validation "
        "parts of some of these data sets; of LoRA nothing but the learning rate and the dropout was varied.",
        markdown(["recipe", "over", *DATA_SETS, "mean", "mean loss"], lines),
        *added_seeds(in_time, lost, TWO_IN_LORAS_TIME, LORA_NO_DROPOUT),
    ]


def added_seeds(right: Results, lost: Results, method: str, other: str) -> list[str]:
    """What the seeds show that were planned, and what those that were added when these were known."""
    common = complete_data_sets(right, [method, other])
    if not common:
        return []

    def lead(seeds: slice) -> str:
        points, nats = (less(found, method, other, common, seeds).signed() for found in (right, lost))
        return f"{points} points of accuracy and {nats} hundredths of a nat of test loss"

    added = CONTESTANTS[method].seeds - PLANNED_SEEDS
    return [
        f"{PLANNED_SEEDS} seeds were planned for '{method}' and '{other}', and {added} were added when those were "
        f"known. Alone, the planned ones show {lead(slice(PLANNED_SEEDS))}, the added ones "
        f"{lead(slice(PLANNED_SEEDS, None))}."
    ]


def _reasons(in_time: Results, variants: Rows) -> list[str]:
    def against(other: str, method: str) -> str:
        common = complete_data_sets(in_time, [other, method])
        return f"{less(in_time, method, other, common).signed()} points" if common else "not run"

    def orders() -> str:
        found = [
            f"{words} {mean(in_time[DATA, method])}"
            for method, words in ((HIFT, "`top2down`"), ("HiFT bottom2up", "`bottom2up`"), ("HiFT random", "`random`"))
            if (DATA, method) in in_time
        ]
        return f"by order, on {DATA}, {', '.join(found)}"

    def best(kind: str) -> str:
        rows = [row for name, row in variants.items() if name.rpartition(", rate ")[0] == kind]
        if not rows:
            return "not run"
        return _points(max(rows, key=lambda row: float(row["validation_accuracy"])), "validation_accuracy")

    return [
        "## Where HiFT loses, and why",
        f"As in the paper, with a new block in every step, it is behind full AdamW in equal time: "
        f"{against(FULL, HIFT)}; {orders()}. With 20 steps a block and without momentum: {against(FULL, LONG)}. With "
        'one turn for each block in the whole run (`steps_per_block="once"`), without momentum, and with the new head '
        f'trained in every step (`always_active=["head.*"]`): {against(FULL, ONE_TURN)}.',
        "Validation accuracy on film reviews, of one seed and with the best rate that was tried, from the settings at "
        f"the end of this page: as in the paper {best('as in the paper')}, and with a rate that is not delayed "
        f"{best('rate not delayed')}. Without momentum {best('beta1 0')}, with 20 "
        f"steps a block {best('20 steps a block')}, with both {best('beta1 0, 20 steps a block')}: the momentum that a "
        "block begins its turn with is a mean of gradients at other weights, from before the other blocks' turns. The "
        f"order matters: without momentum `top2down` has {best('beta1 0')}, `random` {best('beta1 0, random')} and "
        f"`bottom2up` {best('beta1 0, bottom2up')}. Beside the {best('beta1 0, 20 steps a block')} of 20 steps a block "
        f"without momentum: with a warm-up in each turn {best(WARM_UP)}, with Adam's bias correction by the steps of "
        f"the run instead of a weight's own updates {best(COUNTS)}, without weight decay {best(NO_DECAY)}. In equal "
        "steps HiFT updates each weight in a few of them only, and is behind.",
    ]


def _mib(row: Row) -> str:
    return f"{int(row['peak_bytes']) / MIB:.0f}"


def _costs(cost: Rows, peaks: Rows) -> str:
    lines = []
    for name, row in cost.items():
        peak = peaks.get(bytes_row(name))
        lines.append(
            [
                name,
                f"{float(row['ms']):.0f}",
                f"{float(row['ms_least']):.0f} to {float(row['ms_most']):.0f}",
                row["cycles"],
                f"{float(row['time_of_full']):.3f}",
                f"{float(row['flops_of_full']):.3f}",
                _mib(peak) if peak else "",
                CONTESTANTS[name].remark,
            ]
        )
    return markdown(["method", "ms", "of cycles", "cycles", "time of full", "FLOPs of full", "peak MiB", ""], lines)


def _rates(final: Rows) -> str:
    chosen = chosen_exponents(final)
    data_sets = [name for name in DATA_SETS if any(key[0] == name for key in chosen)]
    lines = [
        [method, *(f"{rate_of(chosen[name, method]):.1e}" if (name, method) in chosen else "" for name in data_sets)]
        for method in CONTESTANTS
        if any(key[1] == method for key in chosen)
    ]
    return markdown(["method", *data_sets], lines)


def _variants(rows: Rows) -> str:
    ranked = sorted(rows.values(), key=lambda row: -float(row["validation_accuracy"]))
    lines = [[row["name"], _points(row, "validation_accuracy"), _points(row, "test_accuracy")] for row in ranked]
    steps: Collection[str] = sorted({row["steps"] for row in rows.values()})
    return (
        f"On film reviews, with one seed and {', '.join(steps)} steps (`python -m experiments.quality.variants`); "
        "where a block has several steps in a row the rate changes at every step (`lr_update=step`).\n\n"
        + markdown(["setting", "validation", "test"], lines)
    )


def _points(row: dict[str, str], column: str) -> str:
    return f"{100 * float(row[column]):.1f}"


def _missing(search: Rows, final: Rows, variants: Rows) -> str:
    def listed(by_data_set: dict[str, list[str]]) -> list[str]:
        return [
            f"- {name}: {'all methods' if methods == list(CONTESTANTS) else '; '.join(methods)}"
            for name, methods in by_data_set.items()
            if methods
        ]

    parts = {
        "In equal time:": listed(missing_in_time(search, final)),
        "In equal steps, of the methods that are there in equal time:": listed(missing_in_steps(final)),
        "Other settings of HiFT:": [f"- {name}" for name in VARIANTS if name not in variants],
    }
    lines = [line for head, items in parts.items() if items for line in (head, "", *items, "")]
    return "\n".join(["## Not run", "", *lines[:-1]]) if lines else ""
