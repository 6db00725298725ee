"""The page: every number comes from the CSV files beside it."""

import statistics
from collections.abc import Mapping

from experiments.memory.tables import PACKAGES
from experiments.step_cost.contestants import BLOCK, BY_HAND, FULL, PLAIN, PUBLISHED
from experiments.step_cost.measure import WARM_UP_CYCLES, Cost
from experiments.step_cost.phases import PHASES, SIZE, WAYS
from experiments.step_cost.runs import BASE, DIMENSIONS, RUNS, SIZES, Measured
from experiments.table import Row, Rows, markdown

TARGET = 0.6
"""The most that HiFT's step may take of full fine-tuning's."""

OVER = {
    "HiFT over the rotation by hand": (BLOCK, BY_HAND),
    "HiFT over the rotation by hand, both in a plain loop": (PLAIN, BY_HAND),
    "HiFT over the published one": (BLOCK, PUBLISHED),
    "HiFT over itself in a plain loop": (BLOCK, PLAIN),
    "streamed over block": ("HiFT streamed", BLOCK),
    "fused over block": ("HiFT fused", BLOCK),
    "full fine-tuning over itself in a plain loop": (FULL, "full AdamW, plain loop"),
}
"""What is compared with what."""


def ratios(cost: Cost, other: Cost) -> list[float]:
    """Of the times of the same rounds."""
    return [own / theirs for own, theirs in zip(cost.ms, other.ms, strict=True)]


def summary(times: Mapping[str, Measured], shares: Rows, machines: Rows) -> str:
    """All that has been measured so far.

    Args:
        times: runs by name.
        shares: phases by contestant.
        machines: on which this was measured.
    """
    sizes = {name: times[name] for name in SIZES if name in times}
    missing = unmeasured(times, shares)
    parts = [
        _how(times, machines),
        "" if missing else "![Time of a step of each method, how it scales, and its phases](step_cost.png)",
        *(_size(name, measured) for name, measured in sizes.items()),
        _overhead(sizes),
        _scaling(times),
        _phases(shares),
        f"Not measured yet: {', '.join(missing)}." if missing else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def unmeasured(times: Mapping[str, Measured], shares: Rows) -> list[str]:
    """Names of what the page should have and has not."""
    return [name for name in RUNS if name not in times] + [name for name in WAYS if name not in shares]


def _how(times: Mapping[str, Measured], machines: Rows) -> str:
    threads = "".join(f" with {count} threads" for count in sorted({measured.threads for measured in times.values()}))
    machine = "".join(
        f" {row['cores']} cores of {row['processor']}; {'; '.join(f'{each} {row[each]}' for each in PACKAGES)}."
        for row in machines.values()
    )
    return (
        f"LLaMAs with random weights, fp32, AdamW, on a CPU{threads}.{machine}\n\n"
        "The contestants of a table take turns, a cycle of steps each, while the others wait, so that a change in the "
        f"machine's speed meets all. Milliseconds are the median over cycles of the mean step of a cycle, after "
        f"{WARM_UP_CYCLES + 1} cycles of warm-up; 'of full' is the median of the ratio to full fine-tuning in the same "
        "round. FLOPs are those of matrix products, attention included.\n\n"
        "HiFT and full AdamW run under `Trainer`, everything else in plain loops, and so does what is said to. A "
        "cycle has as many steps as HiFT has blocks: the layers, the embeddings and the head. HiFT, LISA, BAdam and "
        "the rotations train a part of the weights in a step, LoRA none but its adapters; LOMO has no state. The "
        "peers are those of [Memory](../memory/summary.md): BAdam and LISA take other layers in each step, and BAdam "
        "runs Python's garbage collector whenever it does. GaLore and APOLLO compute their projections every 200 "
        "steps, which here is during the warm-up. The published HiFT code runs on old versions only; what is timed "
        "is `tests/reference_loop.py`, which equals it bit for bit: one AdamW over all weights, of which those of the "
        "active block require a gradient."
    )


def _describe(measured: Measured) -> str:
    task = measured.task
    return (
        f"{measured.parameters / 1e6:.1f}M parameters, {task.layers} layers, width {task.width}, batch {task.batch} x "
        f"{task.length}"
    )


def _size(name: str, measured: Measured) -> str:
    full = measured.costs[FULL]
    lines = []
    for contestant, cost in measured.costs.items():
        of_full = ratios(cost, full)
        milliseconds = statistics.median(cost.ms)
        lines.append(
            [
                f"**{contestant}**" if contestant.startswith("HiFT") else contestant,
                f"{milliseconds:.1f}",
                f"{min(cost.ms):.1f} to {max(cost.ms):.1f}",
                f"{statistics.median(of_full):.3f}",
                f"{min(of_full):.3f} to {max(of_full):.3f}",
                f"{1000 * measured.task.batch * measured.task.length / milliseconds:,.0f}",
                f"{cost.gflop:.2f}",
                f"{cost.gflop / full.gflop:.3f}",
            ]
        )
    head = [
        "",
        "ms per step",
        "fastest to slowest cycle",
        "of full",
        "of rounds",
        "tokens per second",
        "GFLOP per step",
        "of full",
    ]
    reached = statistics.median(ratios(measured.costs[BLOCK], full))
    verdict = "as asked" if reached <= TARGET else "more than asked"
    return (
        f"## {name.capitalize()}: {_describe(measured)}\n\n"
        f"{len(full.ms)} cycles of {measured.task.cycle} steps each. HiFT's step takes {reached:.3f} of full "
        f"fine-tuning's, {verdict} (at most {TARGET:.2f}).\n\n" + markdown(head, lines)
    )


def _overhead(sizes: Mapping[str, Measured]) -> str:
    if not sizes:
        return ""
    lines = [
        [
            words,
            *(
                f"{statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})"
                for measured in sizes.values()
                for found in [ratios(measured.costs[own], measured.costs[other])]
            ),
        ]
        for words, (own, other) in OVER.items()
    ]
    return (
        "## Time over that of another loop\n\n"
        "Median, least and most over rounds of the ratio of times.\n\n" + markdown(["", *sizes], lines)
    )


def _scaling(times: Mapping[str, Measured]) -> str:
    lines = [
        [
            dimension,
            str(value),
            *(f"{statistics.median(costs[name].ms):.1f}" for name in (FULL, BY_HAND, BLOCK)),
            f"{statistics.median(ratios(costs[BLOCK], costs[FULL])):.3f}",
            f"{costs[BLOCK].gflop / costs[FULL].gflop:.3f}",
            f"{statistics.median(ratios(costs[BLOCK], costs[BY_HAND])):.3f}",
        ]
        for dimension in DIMENSIONS
        for value, measured in varied(times, dimension).items()
        for costs in [measured.costs]
    ]
    if not lines:
        return ""
    head = [
        "",
        "",
        f"{FULL}, ms",
        f"{BY_HAND}, ms",
        f"{BLOCK}, ms",
        "time of full",
        "FLOPs of full",
        "time of the rotation by hand",
    ]
    return f"## Scaling\n\nThe {BASE} model with one thing changed.\n\n" + markdown(head, lines)


def varied(times: Mapping[str, Measured], dimension: str) -> dict[int, Measured]:
    """Runs in which a dimension of the base model is varied, by its value."""
    names = {
        value: BASE if value == getattr(SIZES[BASE].task, dimension) else f"{dimension} {value}"
        for value in DIMENSIONS[dimension]
    }
    return {value: times[name] for value, name in names.items() if name in times}


def milliseconds(row: Row) -> dict[str, float]:
    """Of each phase of a step."""
    return {phase: float(row[f"{phase}_ms"]) for phase in PHASES}


def _phases(shares: Rows) -> str:
    lines = []
    for name, row in shares.items():
        phases = milliseconds(row)
        total = sum(phases.values())
        lines.append(
            [
                name,
                f"{total:.1f}",
                *(f"{spent:.1f} ({spent / total:.1%})" for spent in phases.values()),
                f"{int(row['to_device_bytes']):,}",
                f"{int(row['to_host_bytes']):,}",
            ]
        )
    if not lines:
        return ""
    threads = " or ".join(sorted({row["threads"] for row in shares.values()}))
    return (
        "## Phases\n\n"
        f"Milliseconds of the mean step, and shares of it, of the {SIZE} model on the simulated accelerator ({threads} "
        "threads), where paging in and parking are copies of memory, one at a time; on the CPU itself nothing would be "
        "copied. Updating inside backward (fused) counts as update. 'Rest' is what the Trainer does between. The batch "
        "is among the bytes to the device.\n\n"
        + markdown(["", "ms per step", *PHASES, "bytes to the device", "bytes to the host"], lines)
    )
