"""A plan in the terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hift_lightning.planner.findings import Findings
from hift_lightning.planner.gpus import CONTEXT_BYTES, FRAGMENTATION, GIB, GPUS, MIB, needed_bytes
from hift_lightning.planner.result import Plan

_UNITS = {"GiB": GIB, "MiB": MIB}


def print_tables(findings: Findings, files: Mapping[str, Path]) -> None:
    """Print what was found out, and where it was written.

    Args:
        findings: of the planning application.
        files: that were written, by what is in them.
    """
    console = Console(highlight=False, soft_wrap=True)
    plan = findings.plan
    console.print(f"\n[bold]{findings.title}[/bold]")
    console.print(_parameters(plan))
    if findings.reason is not None:
        console.print(findings.reason)
    console.print(_at_peak(plan))
    console.print(_step(findings))
    if findings.ways:
        console.print(_compared(findings))
        if findings.why_not_fused:
            console.print(f"update=fused is left out: {findings.why_not_fused}.")
    console.print(_gpus(findings))
    console.print(
        f"\"Needed\" allows {CONTEXT_BYTES / GIB:g} GiB for the driver's context and the libraries' workspaces, and "
        f"{FRAGMENTATION:.0%} of the peak for what the allocator rounds up and cannot use."
    )
    for content, path in files.items():
        console.print(f"{content}: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def written(plan: Plan) -> str:
    """Write a plan as a person reads it, without what only the planning application finds out.

    Args:
        plan: of a step.
    """
    console = Console(highlight=False, soft_wrap=True, color_system=None)
    with console.capture() as text:
        console.print(_parameters(plan))
        console.print(_at_peak(plan))
    return text.get().rstrip()


def _parameters(plan: Plan) -> str:
    trained = "all trained" if plan.trained_numel == plan.numel else f"{plan.trained_numel:,} of them trained"
    return f"{plan.numel:,} parameters, {trained}, in {len(plan.blocks)} block(s)"


def _at_peak(plan: Plan) -> Table:
    peak, unit = plan.peak, _unit(plan.peak_bytes)
    table = Table(title=f"At the peak: in the step of `{peak.name}`, in {peak.trace.peak_phase}", title_justify="left")
    table.add_column("bytes on the device for")
    table.add_column(unit, justify="right")
    for role, nbytes in peak.trace.roles_at_peak.items():
        table.add_row(role, _in(unit, nbytes))
    table.add_section()
    table.add_row("all", _in(unit, plan.peak_bytes), style="bold")
    return table


def _step(findings: Findings) -> Table:
    plan, unit = findings.plan, _unit(findings.full.peak_bytes)

    def size(nbytes: float) -> str:
        return f"{_in(unit, nbytes)} {unit}"

    title = "A step" if plan.ranks == 1 else f"A step of one of {plan.ranks} devices"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("peak of full fine-tuning in this precision, without masters", size(findings.full.peak_bytes))
    table.add_row("parked in host memory or files", size(plan.parked_bytes))
    if plan.ranks > 1:
        table.add_row("by all devices of a machine, at most", size(plan.ranks_of_machine * plan.parked_bytes))
    table.add_row("moved between host and device, mean", size(plan.moved_bytes))
    table.add_row(f"which takes, at {findings.bandwidth / 1e9:g} GB/s", f"{findings.moving_ms:.0f} ms")
    if plan.ranks > 1:
        table.add_row("sent to other devices, mean", size(plan.sent_bytes))
        table.add_row("of that of full fine-tuning", f"{plan.sent_bytes / findings.full.sent_bytes:.0%}")
        table.add_row(f"which takes, at {findings.sending / 1e9:g} GB/s", f"{findings.sending_ms:.0f} ms")
    table.add_row("FLOPs, mean", f"{plan.flops / 1e12:.2f} TFLOP")
    table.add_row("of those of full fine-tuning", f"{plan.flops / findings.full.flops:.0%}")
    return table


def _compared(findings: Findings) -> Table:
    unit = _unit(findings.plan.peak_bytes)
    table = Table(title=f"What other ways save, in {unit} (the one planned is bold)", title_justify="left")
    for name in ("", "peak", "saved", "needed", "TFLOP"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, way in findings.ways.items():
        saved = findings.plan.peak_bytes - way.peak_bytes
        table.add_row(
            name,
            _in(unit, way.peak_bytes),
            "" if way is findings.plan else f"{saved / _UNITS[unit]:+.2f}",
            _in(unit, needed_bytes(way.peak_bytes)),
            f"{way.flops / 1e12:.2f}",
            style="bold" if way is findings.plan else None,
        )
    return table


def _gpus(findings: Findings) -> Table:
    rows, tokens = findings.batch
    table = Table(title=f"Needed: {_in('GiB', findings.needed_bytes)} GiB", title_justify="left")
    table.add_column("GPU")
    table.add_column("GiB", justify="right")
    table.add_column(f"fits {rows} x {tokens}")
    if findings.largest_batches is not None:
        table.add_column(f"largest batch of {tokens} tokens", justify="right")
    for gpu in GPUS:
        row = [gpu.name, _in("GiB", gpu.nbytes), "yes" if findings.needed_bytes <= gpu.nbytes else "no"]
        if findings.largest_batches is not None:
            row.append(str(findings.largest_batches[gpu.name] or "none"))
        table.add_row(*row)
    return table


def _unit(most_bytes: float) -> str:
    """What the sizes of a table are written in, of which this is the largest."""
    return "GiB" if most_bytes >= 0.1 * GIB else "MiB"


def _in(unit: str, nbytes: float) -> str:
    return f"{nbytes / _UNITS[unit]:.2f}"
