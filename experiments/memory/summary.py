"""The tables as Markdown."""

from experiments.memory.cap import CAP
from experiments.memory.methods import METHODS, OURS
from experiments.memory.task import Task
from experiments.table import Row, Rows, markdown

TARGETS = {
    "block": 1.25,
    "streamed": 1.15,
    "streamed, checkpointing": 1.10,
    "fused, checkpointing": 1.06,
    "masters, streamed": 0.60,
    "masters, streamed, checkpointing": 0.60,
}
"""The most that the peak may be, in multiples of the fp32 weights."""


def peak(row: Row) -> float:
    """The most bytes in use, in multiples of the fp32 weights."""
    return max(int(row["forward_backward_peak_bytes"]), int(row["update_peak_bytes"])) / int(row["weights_bytes"])


def in_weights(row: Row, column: str) -> float:
    """A figure in multiples of the fp32 weights."""
    return int(row[column]) / int(row["weights_bytes"])


def phase(name: str, row: Row) -> str:
    """Where the peak is."""
    if int(row["update_peak_bytes"]) > int(row["forward_backward_peak_bytes"]):
        return "update"
    fused = name.startswith(("fused", "LOMO", "step inside"))
    return "forward + backward, with the update" if fused else "forward + backward"


def summary(versions: Rows, peaks: Rows, cap: Rows, depth: Rows, offload: Rows) -> str:
    """All that has been measured so far."""
    told = ", ".join(f"{package} {row['version']}" for package, row in versions.items())
    parts = [
        f"{Task()}. P is the bytes of the fp32 weights. Versions: {told}.",
        "## Bytes on the device and FLOPs",
        *_peaks(peaks),
        f"## A device with {CAP} P",
        markdown(["method", "", "losses"], [[name, row["outcome"], row["losses"]] for name, row in cap.items()]),
        "## Bytes that the update needs, by depth",
        *_depth(depth),
        '## Host memory: `offload="cpu"` and `offload=<folder>`',
        *_offload(offload),
    ]
    return "\n\n".join(parts) + "\n"


def _peaks(rows: Rows) -> list[str]:
    measured = {name: row for name, row in rows.items() if row.get("weights_bytes")}
    lines = []
    for name, row in rows.items():
        shown = f"**{name}**" if name in OURS else name
        if name not in measured:
            lines.append([shown, *[""] * 8, row["note"]])
            continue
        lines.append(
            [
                shown,
                f"{peak(row):.4f}",
                f"{TARGETS[name]:.2f}" if name in TARGETS else "",
                phase(name, row),
                f"{in_weights(row, 'left_bytes'):.4f}",
                f"{in_weights(row, 'to_device_bytes'):.4f}",
                f"{in_weights(row, 'to_host_bytes'):.4f}",
                f"{float(row['gflop']):.2f}",
                f"{float(row['first_loss']):.4f} → {float(row['loss_of_last_cycle']):.4f}",
                row["note"],
            ]
        )
    head = [
        "method",
        "peak, P",
        "at most",
        "phase of the peak",
        "left between steps, P",
        "host to device per step, P",
        "device to host per step, P",
        "GFLOP per step",
        "first loss → mean of the last cycle",
        "",
    ]
    legend = (
        'This project\'s rows are in bold, under `Trainer`, with `window="1MiB"`; "masters" is `bf16-true` with '
        '`master_weights=True`. The others run in plain loops. "Left between steps" is what is on the device beside '
        "the model's weights: optimizer state, copies of weights, adapters. Bytes moved leave the batch out. Memory is "
        "the most over all steps of two cycles, bytes moved are the mean of the second, FLOPs (matrix products, "
        "attention included) are counted after that. Attention is eager in every row, since at this length it keeps "
        "fewer fp32 activations for backward than torch's fused kernel."
    )
    peers = (
        "The packages run as they are on PyPI, with nothing replaced (`bitsandbytes` is there since GaLore and APOLLO "
        "import it); LISA is written after its paper. `checkpointing` is that of transformers for peers "
        "(`gradient_checkpointing_enable`, per layer, not reentrant); it also makes the output of the embeddings "
        "require a gradient, so that backward runs through frozen layers (FLOPs of BAdam, LoRA and the rotation by "
        "hand). That of this project does not."
    )
    peak_of_streamed = (
        "`streamed` has its peak in the backward of the loss, at the turn of the lowest layer: all activations above "
        "it are held, beside three tensors of the logits' size. The rotation by hand has the same peak."
    )
    return [legend, peers, markdown(head, lines), peak_of_streamed, *_without_state(measured)]


def _without_state(measured: Rows) -> list[str]:
    """Which of this project's figures are reached by methods that keep no state, or do not train the weights."""
    sentences = []
    for name, row in measured.items():
        if name.startswith(("LOMO", "LoRA")):
            comparable = [ours for ours in OURS if ours in measured and METHODS[ours].bf16 == METHODS[name].bf16]
            reached = [f"`{ours}` ({TARGETS[ours]:.2f})" for ours in comparable if peak(row) <= TARGETS.get(ours, 0.0)]
            below = [f"`{ours}`" for ours in comparable if peak(row) <= peak(measured[ours])]
            sentences.append(
                f"- {name} ({row['note']}), {peak(row):.4f} P: reaches the figures asked of {_listed(reached)}; at or "
                f"below what is measured of {_listed(below)}."
            )
    return ["\n".join(sentences)] if sentences else []


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _depth(rows: Rows) -> list[str]:
    legend = (
        "Width 256, one layer a block, two cycles; `fused` with activation checkpointing. The update's own bytes are "
        "its peak without what was in use when it began, but with the gradients that it uses up. `streamed` updates "
        "after backward, so its peak without the weights is the same, but for the batch, the loss and the buffers; "
        "`fused` updates while backward still holds activations."
    )
    head = [
        "",
        "weights",
        "peak in the update, without the weights",
        "update's own bytes",
        "gradients",
        "window",
        "rest",
    ]
    lines = [
        [
            name,
            *(f"{int(row[column]):,}" for column in ("weights_bytes", "peak_minus_weights", "own_bytes")),
            f"{int(row['gradient_bytes']):,}",
            f"{int(row['window_bytes']):,}",
            f"{int(row['own_bytes']) - int(row['gradient_bytes']) - int(row['window_bytes']):,}",
        ]
        for name, row in rows.items()
    ]
    return [legend, markdown(head, lines)]


def _offload(rows: Rows) -> list[str]:
    columns = ("RssAnon", "RssFile", "RssShmem", "parked_bytes")
    lines = [[name, *(f"{int(row[column]):,}" for column in columns)] for name, row in rows.items()]
    found = [markdown(["`offload`", "RssAnon", "RssFile", "RssShmem", "parked"], lines)]
    if rows.keys() >= {"cpu", "folder"}:
        difference = int(rows["cpu"]["RssAnon"]) - int(rows["folder"]["RssAnon"])
        parked = int(rows["cpu"]["parked_bytes"])
        found.append(
            f"RssAnon differs by {difference:,} bytes, {difference / parked:.4f} of the {parked:,} that are parked."
        )
    return found
