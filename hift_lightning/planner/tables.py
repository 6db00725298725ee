"""A plan in the terminal."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hift_lightning.planner.findings import Findings
from hift_lightning.planner.gpus import CONTEXT_BYTES, FRAGMENTATION, GIB, GPUS, needed_bytes
from hift_lightning.planner.result import Plan


def print_tables(findings: Findings, files: Mapping[str, Path]) -> None:
    """Print what was found out, and where it was written.

    Args:
        findings: of the planning application.
        files: that were written, by what is in them.
    """
    console = Console(highlight=False, soft_wrap=True)
    plan = findings.plan
    console.print(f"\n[bold]{findings.title}[/bold]")
    trained = "all trained" if plan.trained_numel == plan.numel else f"{plan.trained_numel:,} of them trained"
    console.print(f"{plan.numel:,} parameters, {trained}, in {len(plan.blocks)} block(s)")
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


def _at_peak(plan: Plan) -> Table:
    peak = plan.peak
    table = Table(title=f"At the peak: in the step of `{peak.name}`, in {peak.trace.peak_phase}", title_justify="left")
    table.add_column("bytes on the device for")
    table.add_column("GiB", justify="right")
    for role, nbytes in peak.trace.roles_at_peak.items():
        table.add_row(role, _gib(nbytes))
    table.add_section()
    table.add_row("all", _gib(plan.peak_bytes), style="bold")
    return table


def _step(findings: Findings) -> Table:
    plan = findings.plan
    title = "A step" if plan.ranks == 1 else f"A step of one of {plan.ranks} devices"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row(
        "peak of full fine-tuning in this precision, without masters", f"{_gib(findings.full.peak_bytes)} GiB"
    )
    table.add_row("parked in host memory or files", f"{_gib(plan.parked_bytes)} GiB")
    if plan.ranks > 1:
        table.add_row("by all devices of a machine, at most", f"{_gib(plan.ranks_of_machine * plan.parked_bytes)} GiB")
    table.add_row("moved between host and device, mean", f"{_gib(plan.moved_bytes)} GiB")
    table.add_row(f"which takes, at {findings.bandwidth / 1e9:g} GB/s", f"{findings.moving_ms:.0f} ms")
    if plan.ranks > 1:
        table.add_row("sent to other devices, mean", f"{_gib(plan.sent_bytes)} GiB")
        table.add_row("of that of full fine-tuning", f"{plan.sent_bytes / findings.full.sent_bytes:.0%}")
        table.add_row(f"which takes, at {findings.sending / 1e9:g} GB/s", f"{findings.sending_ms:.0f} ms")
    table.add_row("FLOPs, mean", f"{plan.flops / 1e12:.2f} TFLOP")
    table.add_row("of those of full fine-tuning", f"{plan.flops / findings.full.flops:.0%}")
    return table


def _compared(findings: Findings) -> Table:
    table = Table(title="What other ways save, in GiB (the one planned is bold)", title_justify="left")
    for name in ("", "peak", "saved", "needed", "TFLOP"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, way in findings.ways.items():
        saved = (findings.plan.peak_bytes - way.peak_bytes) / GIB
        table.add_row(
            name,
            _gib(way.peak_bytes),
            "" if way is findings.plan else f"{saved:+.2f}",
            _gib(needed_bytes(way.peak_bytes)),
            f"{way.flops / 1e12:.2f}",
            style="bold" if way is findings.plan else None,
        )
    return table


def _gpus(findings: Findings) -> Table:
    rows, tokens = findings.batch
    table = Table(title=f"Needed: {_gib(findings.needed_bytes)} GiB", title_justify="left")
    table.add_column("GPU")
    table.add_column("GiB", justify="right")
    table.add_column(f"fits {rows} x {tokens}")
    if findings.largest_batches is not None:
        table.add_column(f"largest batch of {tokens} tokens", justify="right")
    for gpu in GPUS:
        row = [gpu.name, _gib(gpu.nbytes), "yes" if findings.needed_bytes <= gpu.nbytes else "no"]
        if findings.largest_batches is not None:
            row.append(str(findings.largest_batches[gpu.name] or "none"))
        table.add_row(*row)
    return table


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.2f}"
