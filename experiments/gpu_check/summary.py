"""The page; every number in it comes from the record."""

import statistics
from collections.abc import Callable, Iterable

from experiments.gpu_check.card import PACKAGES
from experiments.gpu_check.figures import NOT_YET, Paged, Times, off, paged, pairs, that_ran, times_of
from experiments.gpu_check.profiles import CONTESTANTS, COPIES, PAGING, Profile
from experiments.gpu_check.record import Measured
from experiments.gpu_check.training import RAN, CycleTimes
from experiments.paper_memory.comparison import GIB, MIB, paper
from experiments.table import Row, Rows, markdown

WAITS = (
    "This page waits for a GPU: nothing has been measured on one yet. `python -m experiments.gpu_check` on a machine "
    "with a CUDA device measures the paper's memory table, tokens per second, and what paging costs, and writes it.\n"
)


def summary(profile: Profile, measured: Measured) -> str:
    """The whole page.

    Args:
        profile: what was to be measured.
        measured: what has been.
    """
    if not measured.card:
        return WAITS
    parts = [
        *_card(profile, measured.card),
        "![Peaks of memory, tokens per second, and times of a step with paging](gpu_check.png)",
        "## Memory",
        *_memory(profile, measured.memory),
        "## Error of the plans",
        *_errors(profile, measured.memory),
        "## Tokens per second",
        *_speed(profile, measured),
        "## Paging beside the compute",
        *_paging(measured),
        "## Copies by themselves",
        *_copies(measured.copies),
    ]
    return "\n\n".join(parts) + "\n"


def _card(profile: Profile, card: Row) -> list[str]:
    simulated = (
        ["**Not a GPU page**: the simulated accelerator of the tests, on which bytes are exact and times mean nothing."]
        if card["device"] == "sim"
        else []
    )
    versions = ", ".join(f"{package} {card[package]}" for package in PACKAGES)
    return [
        *simulated,
        f"{card['card']}, {_gib(card['total'])} GiB; driver {card['driver']}, CUDA {card['cuda']}; {versions}; "
        f"{_gib(card['host'])} GiB of host memory. Random weights, one made-up batch of {profile.batch} x "
        f"{profile.length} tokens, under Lightning's Trainer.",
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


def _memory(profile: Profile, rows: Rows) -> list[str]:
    totals, lines = paper(), []
    columns = ("planned", "allocated", "reserved", "driver", "parked", "pinned")
    for name in profile.cells:
        row = rows.get(name, {"outcome": NOT_YET})
        ran = row["outcome"] == RAN
        lines.append(
            [
                name,
                totals.get(name, {}).get("total_gib", ""),
                *(_gib(row[column]) if row.get(column) else "" for column in columns),
                f"{off(row, 'allocated'):+.1%}" if ran else "",
                "" if ran else row["outcome"],
            ]
        )
    head = ["cell", "paper", *columns, "off", ""]
    legend = (
        "GiB. The cells are those of [the paper's memory table](../paper_memory/summary.md); `paper` is its total. "
        "Planned: the planner's peak. Allocated: `max_memory_allocated` of the run, three cycles under HiFT, and off: "
        "by which part of the plan it is larger. Reserved: the most that torch's allocator took from the driver. "
        "Driver: in use on the whole card at the end of the run, as the driver counts"
        + _before(rows)
        + ". Parked: state and masters in host memory by the plan; pinned: what their allocator holds for them."
    )
    return [legend, markdown(head, lines), *_saved(rows)]


def _before(rows: Rows) -> str:
    before = [row["driver_before"] for row in that_ran(rows).values()]
    return f", of which {_span(before, _gib)} were there before the model" if before else ""


def _saved(rows: Rows) -> list[str]:
    lines = []
    for name, full in pairs(rows).items():
        ours, theirs = (int(rows[each]["allocated"]) for each in (name, full))
        lines.append([name, full, f"{_gib(theirs)} → {_gib(ours)}", f"{1 - ours / theirs:.1%}"])
    if not lines:
        return ["No full fine-tuning that a cell of HiFT could be compared with has run."]
    return [markdown(["cell", "against", "allocated, GiB", "saved"], lines)]


def _errors(profile: Profile, rows: Rows) -> list[str]:
    ran = that_ran(rows)
    if not ran:
        return ["No cell has run yet."]
    found = {column: [off(row, column) for row in ran.values()] for column in ("allocated", "requested")}
    sentences = [
        f"In {len(ran)} cells that ran, `max_memory_allocated` is off the plan's peak by "
        f"{_median(found['allocated'])}. Bytes as tensors asked for them, before the allocator rounds them up, are off "
        f"by {_median(found['requested'])}."
    ]
    if profile.device.type == "cuda":
        more = {n: int(row["driver"]) - profile.device.needed_bytes(int(row["planned"])) for n, row in ran.items()}
        most = max(more, key=more.__getitem__)
        sentences.append(
            "What the planner says a GPU must have (the peak, 3 % and 1 GiB) is at least what the driver counts in "
            f"{sum(bytes_more <= 0 for bytes_more in more.values())} of {len(ran)}; the most beyond it is "
            f"{more[most] / GIB:+.2f} GiB ({most}). Torch keeps what it has taken from the driver, needed or not, and "
            "what other processes have on the card is counted too."
        )
    return [" ".join(sentences)]


def _median(values: list[float]) -> str:
    return f"{statistics.median(values):+.2%} in the median ({min(values):+.2%} to {max(values):+.2%})"


# --- time -------------------------------------------------------------------------------------------------------------


def _speed(profile: Profile, measured: Measured) -> list[str]:
    contestants = times_of(CONTESTANTS, measured.speed)
    full = contestants[0]
    lines = []
    for times in contestants:
        package = CONTESTANTS[times.name].package
        if times.outcome != RAN:
            remedy = f"; it needs `pip install {package}`" if package and times.outcome == NOT_YET else ""
            lines.append([times.name, *[""] * 7, f"{times.outcome}{remedy}"])
            continue
        tokens = 1000 * int(times.rows[0]["tokens"])
        lines.append(
            [
                times.name,
                f"**{tokens / times.median:,.0f}**",
                f"{tokens / max(times.cycles_ms):,.0f} to {tokens / min(times.cycles_ms):,.0f}",
                f"{full.median / times.median:.3f}" if full.outcome == RAN else "",
                f"{times.median:.1f}",
                *(_gib(max(int(row[column]) for row in times.rows)) for column in ("allocated", "driver")),
                str(len(times.cycles_ms)),
                ", ".join(filter(None, (times.rows[0]["package"], _retries(times)))),
            ]
        )
    head = [
        "",
        "tokens per second",
        "slowest to fastest cycle",
        "of full",
        "ms per step",
        "allocated, GiB",
        "driver, GiB",
        "cycles",
        "",
    ]
    return [_how(profile, measured.card), markdown(head, lines)]


def _retries(times: Times) -> str:
    count = sum(int(row["retries"]) for row in times.rows)
    return f"slowed down by a card that was full ({count} times)" if count else ""


def _how(profile: Profile, card: Row) -> str:
    size = [word.rpartition(".")[2] for word in (*profile.size, f"num_hidden_layers={card['layers']}")]
    layers = int(card["layers"])
    return (
        f"LLaMA-7B with {', '.join(f'`{word}`' for word in size)}: of the depths {', '.join(map(str, profile.depths))} "
        "the first at which full fine-tuning fits nine tenths of what is free on the card by the plan, or the last. "
        "AdamW; bf16 autocast over fp32 weights, or 16-bit weights where the name says so (Mixed^Hi: with fp32 "
        f"masters). Medians of cycles of {layers + 2} steps in {profile.rounds} rounds, in which the contestants take "
        f"turns, each in a process of its own, which warms up for {CycleTimes.warm_up_cycles} cycles. The device is "
        "waited for at the two ends of a cycle only. A step of HiFT updates one block, one of the others all that they "
        "train. Adapters are in 16 bit where the weights are. Driver: what a run has taken of the card at its end; the "
        "state of paged Adam is in it, and not in what torch has allocated, and as long as the card is not full none "
        "of it is paged."
    )


def _paging(measured: Measured) -> list[str]:
    found = {each.times.name: each for each in paged(measured.paging, measured.copies)}
    lines = []
    for times in times_of(PAGING, measured.paging):
        if times.outcome != RAN:
            lines.append([times.name, *[""] * 8, times.outcome])
            continue
        lines.append([times.name, _ms(times), *_of_paged(found.get(times.name)), _pinned(times), ""])
    head = [
        "HiFT, bf16 autocast",
        "ms per step (slowest to fastest cycle)",
        "longer by, ms",
        "paged in, parked, MiB",
        "copies alone, ms",
        "hidden",
        "page in: waited, ms (hidden)",
        "park: waited, ms (hidden)",
        "state in host memory, GiB (pinned)",
        "",
    ]
    legend = (
        'The model above. Longer by: against the same update with `offload="none"`, where nothing is moved. Copies '
        "alone: what the bytes of a step would take at the bandwidth of pinned copies below. Hidden: the part of that "
        "by which the step is not longer; nothing where it is longer by more than that. Waited: between marks in the "
        "stream that computes, around paging in at the update (what prefetching in backward has left, and the wait for "
        "it) and around parking; `streamed` does both piece by piece in the update, which marks cannot tell apart."
    )
    return [legend, markdown(head, lines)]


def _of_paged(found: Paged | None) -> list[str]:
    if found is None:
        return [""] * 6
    moved = [f"{found.times.mean(column) / MIB:.1f}" for column in ("paged_in", "parked")]
    waits = []
    for what in ("page_in", "park"):
        hidden = found.hidden_of(what)
        waits.append("" if hidden is None else f"{found.times.mean(f'{what}_ms'):.2f} ({_share(hidden)})")
    alone = f"{found.page_in_ms:.2f} + {found.park_ms:.2f}"
    return [f"{found.extra_ms:+.1f}", ", ".join(moved), alone, f"**{_share(found.hidden)}**", *waits]


def _share(hidden: float) -> str:
    return f"{max(hidden, 0.0):.0%}"


def _ms(times: Times) -> str:
    return f"**{times.median:.1f}** ({max(times.cycles_ms):.1f} to {min(times.cycles_ms):.1f})"


def _pinned(times: Times) -> str:
    row = times.rows[0]
    parked = int(row["in_host_memory"])
    return f"{_gib(parked)} ({int(row['of_it_pinned']) / parked:.0%})" if parked else "0"


def _copies(rows: Rows) -> list[str]:
    lines = []
    for name in COPIES:
        row = rows.get(name)
        if row is None or row["outcome"] != RAN:
            lines.append([name, "", "", NOT_YET if row is None else row["outcome"]])
            continue
        speeds = [int(row["bytes"]) / float(row[column]) / 1e6 for column in ("ms", "slowest_ms", "fastest_ms")]
        lines.append(
            [name, f"**{speeds[0]:.1f}**", f"{speeds[1]:.1f} to {speeds[2]:.1f}", f"{int(row['bytes']):,} bytes"]
        )
    return [markdown(["", "GB/s", "slowest to fastest", ""], lines)]


# --- words ------------------------------------------------------------------------------------------------------------


def _gib(nbytes: int | str) -> str:
    figure = int(nbytes) / GIB
    return f"{figure:.2f}" if figure >= 1 or not figure else f"{figure:.4f}"


def _span(values: Iterable[str], word: Callable[[str], str]) -> str:
    ordered = sorted(values, key=int)
    return " to ".join(dict.fromkeys(word(value) for value in (ordered[0], ordered[-1])))
