"""The table of a run's blocks."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hift_lightning.callbacks.block_watch import BlockWatch
from hift_lightning.engine.measure import ON_DEVICE

NOT_KNOWN = "-"
HEADINGS = ("params", "visits", "gradient\nnorm", "update\n/ weight", "last\nrate", "page-in\nms", "parked\nMiB")


def block_table(watches: Sequence[BlockWatch], ratio_every: int, ranks: int, peaks: Mapping[str, int]) -> Table:
    """Make a table with a row for each block.

    Args:
        watches: one for each optimizer.
        ratio_every: updates of a block from one whose update-to-weight ratio was measured to the next; 0: none.
        ranks: processes that trained together.
        peaks: most bytes on the device by role (`bytes_by_role`), and at one time (`"device"`); empty before a step.
    """
    table = Table(
        title="Blocks",
        caption=" ".join(_notes(watches, ratio_every, ranks, peaks)),
        caption_justify="left",
        # 80 columns are enough
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", justify="right")
    table.add_column("layers", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for watch in watches:
        report = watch.engine.report()
        for block in report.parts:
            record = watch.records[block.index]
            table.add_row(
                "" if block is report.always_active else str(block.index),
                watch.names[block.index],
                _count(block.numel),
                str(block.visits),
                _written(record.gradient_norm.value, "{:.3g}"),
                _written(record.update_ratio.value, "{:.1e}"),
                _written(record.rate, "{:.1e}"),
                _written(record.page_in_ms.value, "{:.2f}"),
                f"{block.parked_bytes / 2**20:.1f}",
            )
    return table


def _count(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:  # which three digits round to 1
            return f"{number / size:.3g}{letter}"
    return str(number)


def _written(value: float | None, form: str) -> str:
    return NOT_KNOWN if value is None else form.format(value)


def _notes(watches: Sequence[BlockWatch], ratio_every: int, ranks: int, peaks: Mapping[str, int]) -> list[str]:
    notes = ["Means over the updates of this run."]
    for watch in watches:
        notes.extend(watch.engine.report().notes)
    if any(watch.fused for watch in watches):
        notes.append("With update=fused each gradient is used inside backward, so their norm is not known.")
    else:
        notes.append("Gradient norms are those before clipping.")
    if ratio_every:
        notes.append(f"Update / weight: norm of an update over that of the weights, {_measured(ratio_every)}.")
    if peaks:
        most = ", ".join(f"{role.replace('_', ' ')} {peaks[role] / 2**20:.1f}" for role in ON_DEVICE)
        notes.append(f"Most MiB on the device: {most}; at one time {peaks['device'] / 2**20:.1f}.")
    if ranks > 1:
        notes.append("Bytes are those of rank 0.")
    return notes


def _measured(ratio_every: int) -> str:
    return "measured in each update" if ratio_every == 1 else f"measured in one of {ratio_every} updates of a block"
