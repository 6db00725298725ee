"""The page; every number in it comes from the records."""

from collections.abc import Iterable, Sequence

from experiments.paper_memory.comparison import (
    COUNTED,
    GIB,
    TOLERANCE,
    UNITS,
    Cell,
    cells,
    figure,
    groups,
    pgs,
    saved,
    with_early_zeroing,
)
from experiments.paper_memory.jobs import BATCH, FULL_CHECKPOINTING, LENGTH, OPTIMIZERS, WAYS
from experiments.table import Row, Rows, markdown

WHY = {
    (
        "parameters",
        "mixed",
    ): "the paper counts the fp32 weights and a 16-bit copy of them (1.5 copies); torch keeps the "
    "fp32 weights alone, and autocast makes 16-bit copies in the forward pass, which are in our residual",
    ("gradients", "Mixed^Hi"): "16-bit weights get 16-bit gradients; the paper counts them in fp32. For the update the "
    "optimizer is given an fp32 copy of them, which counts in the bytes of that phase and not here",
    ("pgs", "mixed"): "the 16-bit copy among the parameters",
    ("pgs", "Mixed^Hi"): "the 16-bit gradients",
}
"""Why a column differs under a precision; the sizes are checked by `Cell.explained`."""

UNKNOWN = "not known"

HEADLINE = 0.6

TITLES = {"pgs": "PGS"}


def summary(paper_rows: Rows, llama: Rows, others: Rows, beyond: Rows) -> str:
    """The whole page.

    Args:
        paper_rows: the paper's figures.
        llama: LLaMA-7B as in the paper's table.
        others: the other models.
        beyond: LLaMA-7B in ways that the paper does not have.
    """
    compared = cells(paper_rows, llama)
    parts = [
        f"Figures of the paper (HiFT, arXiv 2401.15207), and beside them those of this project's planner, for batches "
        f"of {BATCH} rows of {LENGTH} tokens. The planner runs the real model, optimizer and strategy on tensors that "
        "have no memory; ours are bytes of tensors in use, with CUDA's fused attention. fp32 is `32-true`, mixed "
        "`bf16-mixed`, Mixed^Hi `bf16-true` with `master_weights=True`; HiFT has one layer a block and "
        '`update="block"`.',
        "## What is saved at 7B",
        *_headline(paper_rows, llama),
        "## LLaMA-7B, cell by cell",
        *_llama(compared, llama),
        "## Where counted figures differ",
        *_counted(compared, "LLaMA-7B"),
        "## Where residual and total differ",
        *_residual(compared, llama),
        "## Other models",
        *_others(paper_rows, others),
        "## What the paper does not have",
        *_beyond(llama, beyond),
    ]
    return "\n\n".join(parts) + "\n"


def _headline(paper_rows: Rows, llama: Rows) -> list[str]:
    lines, above = [], []
    for optimizer in OPTIMIZERS:
        for full, ours in (("fp32, full", "fp32, HiFT"), ("mixed, full", "Mixed^Hi, HiFT")):
            names = [f"LLaMA-7B, {optimizer}, {cell}" for cell in (full, ours)]
            full_row, our_row = (llama[name] for name in names)
            theirs = [float(paper_rows[name]["total_gib"]) for name in names]
            peak, peak_early = int(our_row["peak"]), with_early_zeroing(full_row)
            above.append([part > HEADLINE for part in (saved(*theirs), saved(int(full_row["peak"]), peak))])
            lines.append(
                [
                    optimizer,
                    f"{ours} against {full}",
                    f"{theirs[0]:.2f} → {theirs[1]:.2f}",
                    f"{saved(*theirs):.1%}",
                    f"{_gib(full_row['peak'])} → {_gib(peak)}",
                    f"**{saved(int(full_row['peak']), peak):.1%}**",
                    f"{_gib(peak_early)} → {_gib(peak)}",
                    f"{saved(peak_early, peak):.1%}",
                ]
            )
    head = ["optimizer", "", "paper, GiB", "saved", "ours, GiB", "saved", "gradients zeroed early, GiB", "saved"]
    adamw = llama["LLaMA-7B, AdamW, fp32, full"]
    early = (
        '"Ours" is full fine-tuning under Lightning, which zeroes gradients after the *next* forward pass, so all of '
        "them are there beside its activations; the paper's fp32 totals are that sum too (below). In a loop that "
        "zeroes them right after the update they are not, and the last two columns are against that. The peak of AdamW "
        f"in fp32 is then {_gib(with_early_zeroing(adamw))} GiB"
        + (
            f", in the update, where torch's foreach kernels take {_gib(int(adamw['update']) - pgs(adamw))} GiB of "
            "temporaries"
            if with_early_zeroing(adamw) == int(adamw["update"])
            else ""
        )
        + ". HiFT frees gradients right after the update in any case."
    )
    counts = [sum(column) for column in zip(*above, strict=True)]
    claim = (
        f"The paper's headline is more than {HEADLINE:.0%} saved. With AdamW it is {lines[0][3]} in fp32 and "
        f"{lines[1][3]} in Mixed^Hi by the paper's totals, {lines[0][5]} and {lines[1][5]} by ours. Of the "
        f"{len(above)} comparisons {counts[0]} are above it by the paper's totals and {counts[1]} by ours: the less "
        "state an optimizer has, the less there is to save."
    )
    return [claim, markdown(head, lines), early]


def _llama(compared: Sequence[Cell], llama: Rows) -> list[str]:
    lines = []
    for (name,), row_cells in _by_name(compared).items():
        _, optimizer, precision, method = row_cells[0].words
        row = llama[name]
        figures = [f"{cell.paper:.2f} / {cell.ours:.2f}" for cell in row_cells]
        lines.append([optimizer, precision, method, *figures, _peak(row)])
    head = ["optimizer", "precision", "method"]
    head += [f"{TITLES.get(column, column)}, {'GiB' if unit == GIB else 'MiB'}" for column, unit in UNITS.items()]
    legend = (
        "Paper / ours. Parameters are weights and, in Mixed^Hi, the masters of the active block; gradients and states "
        "are the most that is on the device; PGS is the sum of the three; total is the peak; residual is total less "
        "PGS. Under HiFT our peak is in the backward pass before the block has a gradient, so gradients and states, "
        "which PGS counts, are not there at that moment, and activations are more than the residual. The last column "
        "tells where our peak is. The paper has no full fine-tuning in Mixed^Hi."
    )
    return [legend, markdown([*head, "our peak"], lines)]


def _by_name(compared: Sequence[Cell]) -> dict[tuple[str], list[Cell]]:
    found: dict[tuple[str], list[Cell]] = {}
    for cell in compared:
        found.setdefault((cell.name,), []).append(cell)
    return found


def _counted(compared: Sequence[Cell], what: str) -> list[str]:
    """Which of the counted cells agree, and all that do not, with the reason."""
    counted = [cell for cell in compared if cell.column in COUNTED]
    off = [cell for cell in counted if not cell.agrees]
    columns = dict.fromkeys(TITLES.get(cell.column, cell.column) for cell in counted)
    sentences = [
        f"{what}: of {len(counted)} cells of {_listed(columns)}, "
        f"{len(counted) - len(off)} agree within {TOLERANCE:.0%}."
    ]
    for title, chosen in (
        ("In fp32", [cell for cell in counted if cell.words[2] == "fp32"]),
        ("States under every precision", [cell for cell in counted if cell.column == "states"]),
    ):
        if chosen:
            sentences.append(f"{title}: {sum(cell.agrees for cell in chosen)} of {len(chosen)}.")
    lines = [
        [
            TITLES.get(column, column),
            precision,
            _which(group, compared),
            _range([cell.off for cell in group]),
            WHY.get((column, precision), UNKNOWN) if all(cell.explained for cell in group) else UNKNOWN,
        ]
        for (column, precision), group in groups(off, ("column", "precision")).items()
    ]
    if not lines:
        return [" ".join(sentences)]
    head = ["off by more", "precision", "cells", "ours is larger by", "why"]
    unexplained = sum(not cell.explained for cell in off)
    sentences.append(
        f"All others are below. Counted as torch has it, {len(off) - unexplained} of these {len(off)} agree too."
    )
    return [" ".join(sentences), markdown(head, lines)]


def _residual(compared: Sequence[Cell], llama: Rows) -> list[str]:
    differing = [cell for cell in compared if cell.column not in COUNTED and not cell.agrees]
    total = sum(cell.column not in COUNTED for cell in compared)
    lines = [
        [
            column,
            precision,
            method,
            _which(group, [cell for cell in compared if cell.words[2:] == (precision, method)]),
            f"{min(cell.paper for cell in group):.2f} to {max(cell.paper for cell in group):.2f}",
            f"{min(cell.ours for cell in group):.2f} to {max(cell.ours for cell in group):.2f}",
            _range([cell.off for cell in group]),
        ]
        for (column, precision, method), group in groups(differing, ("column", "precision", "method")).items()
    ]
    head = ["off by more", "precision", "method", "cells", "paper, GiB", "ours, GiB", "ours is larger by"]
    intro = (
        f"{total - len(differing)} of {total} cells agree within {TOLERANCE:.0%}; the others, by precision and method:"
    )
    return [intro, markdown(head, lines), *_reasons(llama)]


def _reasons(llama: Rows) -> list[str]:
    def row(precision: str, method: str) -> Row:
        return llama[f"LLaMA-7B, AdamW, {precision}, {method}"]

    full, hift, mixed, mixed_hift, high = (
        row(*cell)
        for cell in (("fp32", "full"), ("fp32", "HiFT"), ("mixed", "full"), ("mixed", "HiFT"), ("Mixed^Hi", "HiFT"))
    )
    casts = 2 * int(full["numel"])
    in_update = {
        name.split(", ")[1]: other
        for name, other in llama.items()
        if name.endswith("fp32, full") and other["peak_phase"] == "update"
    }
    temporary = [
        f"{optimizer}'s foreach update takes {_gib(other['at_peak_temporary'])} GiB of temporaries over all weights at "
        "once, more than the activations of the forward pass, and the peak is there"
        for optimizer, other in in_update.items()
    ]
    reasons = [
        f"fp32, full: activations at our peak are {_gib(full['at_peak_activations'])} GiB, which is the paper's "
        f"residual; the logits and their fp32 copy, {_gib(full['at_peak_logits'])} GiB, come on top."
        + "".join(f" {sentence}." for sentence in temporary),
        "fp32, HiFT: at our peak, in the backward pass of the loss at the turn of the lowest layer, activations are "
        f"{_gib(hift['at_peak_activations'])} GiB and logits {_gib(hift['at_peak_logits'])} GiB, and neither gradients "
        "nor states are there. The total is the same for all optimizers, in the paper's table as in ours.",
        f"mixed: the 16-bit copies of the weights, {_gib(casts)} GiB, are parameters for the paper. Autocast makes "
        "them in the forward pass and the graph keeps those that backward needs, so in our table they are part of the "
        f"residual: of {figure(mixed, 'residual'):.2f} GiB (full) and {figure(mixed_hift, 'residual'):.2f} GiB (HiFT). "
        "The totals can be compared as they are. Under HiFT ours is "
        f"{figure(mixed_hift, 'total'):.2f} GiB against {figure(hift, 'total'):.2f} in fp32: what activations in 16 "
        "bits save, the copies take.",
        f"Mixed^Hi: of our total, {_gib(high['at_peak_weights'])} GiB are weights, "
        f"{_gib(high['at_peak_activations'])} GiB activations and {_gib(high['at_peak_logits'])} GiB logits.",
        "What is left of the differences cannot be told from the paper, which does not say what its residual is made "
        "of. Its totals come from a GPU, where the CUDA context, workspaces of kernels and fragmentation count too, "
        "and from another framework and version of the model, whose attention, norms and loss need not keep the same "
        "tensors for backward. Ours are tensors in use, so a GPU has to have somewhat more (the planner's allowance "
        "for that is stated where it says which GPUs fit).",
    ]
    return ["\n".join(f"- {reason}" for reason in reasons)]


def _others(paper_rows: Rows, others: Rows) -> list[str]:
    compared = cells(paper_rows, others)
    lines = []
    for cell in compared:
        model, _, precision, method = cell.words
        row = others[cell.name]
        counts = [f"{int(row[column]) / 1e6:.2f}" for column in ("numel", "largest_block_numel")]
        lines.append(
            [
                *(model, *counts, precision, method),
                *(f"{cell.paper:.2f}", f"{cell.ours:.2f}", f"{cell.off:+.1%}"),
                *(f"{cell.converted:.2f}", f"{figure(row, 'total'):.2f}"),
            ]
        )
    head = ["model", "parameters, M", "updated at once, M", "precision", "method", "PGS by the formulas, GiB"]
    head += ["ours, GiB", "off", "formulas as torch counts, GiB", "our total, GiB"]
    legend = (
        "AdamW. The paper's formulas give PGS alone; RoBERTa is a classifier here, the others are language models. "
        "Buffers that are no parameters (GPT-Neo's masks) count in the total. transformers has no fused attention for "
        "GPT-Neo, so its total has the scores of all layers."
    )
    return [legend, markdown(head, lines), *_counted(compared, "Other models")]


def _beyond(llama: Rows, beyond: Rows) -> list[str]:
    lines = []
    for precision, compared in (("fp32", "fp32"), ("Mixed^Hi", "mixed")):
        full = llama[f"LLaMA-7B, AdamW, {compared}, full"]
        checkpointed = beyond[f"{compared}, {FULL_CHECKPOINTING}"]
        rows = {f"{compared}, full": full, f"{compared}, {FULL_CHECKPOINTING}": checkpointed}
        rows |= {f"{precision}, {way}": beyond[f"{precision}, {way}"] for way in WAYS}
        for name, row in rows.items():
            reference = checkpointed if "checkpointing" in name else full
            lines.append(
                [
                    name,
                    f"**{_gib(row['peak'])}**",
                    "" if row is reference else f"{saved(int(reference['peak']), int(row['peak'])):.1%}",
                    *(_gib(row[phase]) for phase in ("forward", "backward", "update")),
                    _peak(row),
                    f"{float(row['gflop']) / 1e3:.0f}",
                ]
            )
    head = ["LLaMA-7B, AdamW", "total, GiB", "saved", "forward", "backward", "update", "peak", "TFLOP per step"]
    legend = (
        "`update` and `activation_checkpointing` of `HiFTStrategy`, beside full fine-tuning without and with "
        'transformers\' checkpointing; "saved" is against the full fine-tuning that does likewise. forward, backward '
        "and update are the highest in each phase, in GiB; FLOPs are the mean over a cycle."
    )
    return [legend, markdown(head, lines), _on_beyond(beyond)]


def _on_beyond(beyond: Rows) -> str:
    sentences = []
    for precision in ("fp32", "Mixed^Hi"):
        block, streamed, fused, checkpointed, *_ = (beyond[f"{precision}, {way}"] for way in WAYS)
        smallest = min((beyond[f"{precision}, {way}"] for way in WAYS), key=lambda row: int(row["peak"]))
        sentences.append(
            f"- {precision}: in the update {_gib(block['update'])} GiB are in use with `block`, "
            f"{_gib(streamed['update'])} with `streamed`; `fused` updates in the backward pass and leaves "
            f"{_gib(fused['update'])}. The peak of `block` is in {block['peak_phase']} at this batch; `streamed` alone "
            f"lowers it by {_gib(int(block['peak']) - int(streamed['peak']))} GiB, checkpointing alone by "
            f"{_gib(int(block['peak']) - int(checkpointed['peak']))} GiB, and the least of all is "
            f"{_gib(smallest['peak'])} GiB."
        )
    return "\n".join(sentences)


def _peak(row: Row) -> str:
    return row["peak_phase"] if row["peak_block"] == "all" else f"`{row['peak_block']}`, {row['peak_phase']}"


def _gib(nbytes: str | int) -> str:
    return f"{int(nbytes) / GIB:.2f}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _which(group: Sequence[Cell], among: Sequence[Cell]) -> str:
    """The rows of these cells, and "all" where that is every row of the same precision and column."""
    precision, column = group[0].words[2], group[0].column
    alike = [cell for cell in among if (cell.words[2], cell.column) == (precision, column)]
    if len(group) == len(alike):
        return "all"
    several = len({cell.words[0] for cell in among}) > 1
    return "; ".join(f"{cell.words[0 if several else 1]} {cell.words[3]}" for cell in group)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):+.1%}", f"{max(values):+.1%}"
    return low if low == high else f"{low} to {high}"
