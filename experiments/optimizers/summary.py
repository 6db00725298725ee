"""The page: every number comes from the CSV files beside it."""

from experiments.optimizers.grid import EXPONENTS, SEEDS, Run
from experiments.optimizers.methods import CONTESTANTS, MOMENTUM, OPTIMIZERS
from experiments.quality.comparison import mean
from experiments.quality.data_sets import BATCH_SIZE, MAX_LENGTH
from experiments.quality.grid import SEARCH_SEED, climb, on_validation
from experiments.quality.methods import CLIP_NORM, STEPS, WARMUP, rate_of
from experiments.table import Rows, markdown

MIB = 2**20
WAYS = ("full", "HiFT")


def summary(search: Rows, final: Rows, peaks: Rows) -> str:
    """Make it of the rows that there are.

    Args:
        search: of the search for learning rates (`search.csv`).
        final: of the final runs (`final.csv`).
        peaks: of bytes (`bytes.csv`).
    """
    in_time = CONTESTANTS["AdamW", "HiFT"].steps[-1]
    missing = unfinished(search, final)
    parts = [
        f"MiniLM on film reviews, as in [Accuracy](../quality/summary.md): batch {BATCH_SIZE}, at most {MAX_LENGTH} "
        f"tokens, linear decay after a warm-up of {WARMUP:.0%} of the steps, gradients clipped by norm at "
        f"{CLIP_NORM:g}, on one core. The optimizers are those of the paper, from `torch.optim`, untouched: SGDM is "
        f"SGD with momentum {MOMENTUM:g}. AdamW is that of the page on accuracy; runs that are in its record are not "
        f"done again here. HiFT has its default settings; {in_time} of its steps take as long as {STEPS} of full "
        "fine-tuning with AdamW; with the other optimizers neither was timed.",
        _results(final, peaks, in_time),
        "Test accuracy in points, mean and standard error over "
        f"{len(SEEDS)} seeds; the difference is paired by seed. Peak bytes are counted on the simulated accelerator "
        "with full batches, the weights among them.",
        "![Accuracy and peak memory of each optimizer](optimizers.png)",
        "## Learning rates",
        "Each optimizer has its own rate in full fine-tuning and under HiFT: the best on the validation part among "
        f"powers of two times 1e-4, tried until both its neighbours are worse, with seed {SEARCH_SEED}. Adafactor's "
        "rate is relative to the size of a weight.",
        _rates(search),
        f"Not run yet: {'; '.join(missing)}." if missing else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def accuracies(final: Rows, optimizer: str, way: str, steps: int) -> list[float]:
    """Test accuracies in points, by seed; empty until all seeds are there."""
    rows = [
        row for row in final.values() if (row["optimizer"], row["way"], row["steps"]) == (optimizer, way, str(steps))
    ]
    by_seed = {int(row["seed"]): 100 * float(row["test_accuracy"]) for row in rows}
    return [by_seed[seed] for seed in SEEDS] if by_seed.keys() == set(SEEDS) else []


def best(search: Rows, optimizer: str, way: str) -> int | None:
    """The exponent that the search has ended with; `None` if it has not."""
    contestant = CONTESTANTS[optimizer, way]

    def merit(exponent: int) -> tuple[float, float]:
        return on_validation(search[Run(optimizer, way, exponent, contestant.steps[-1], SEARCH_SEED).name])

    try:
        return climb(contestant.guess, merit, EXPONENTS)
    except KeyError:
        return None


def unfinished(search: Rows, final: Rows) -> list[str]:
    """What is missing, in words."""
    found = []
    for (optimizer, way), contestant in CONTESTANTS.items():
        if best(search, optimizer, way) is None:
            found.append(f"{optimizer}, {way}: its search and all after it")
            continue
        found += [
            f"{optimizer}, {way}, {steps} steps"
            for steps in contestant.steps
            if not accuracies(final, optimizer, way, steps)
        ]
    return found


def _results(final: Rows, peaks: Rows, in_time: int) -> str:
    lines = []
    for optimizer in OPTIMIZERS:
        full = accuracies(final, optimizer, "full", STEPS)
        same_steps, same_time = (accuracies(final, optimizer, "HiFT", steps) for steps in (STEPS, in_time))
        gains = [own - theirs for own, theirs in zip(same_time, full, strict=True)] if full and same_time else []
        lines.append(
            [
                optimizer,
                *(str(mean(each)) if each else "" for each in (full, same_steps, same_time)),
                mean(gains).signed() if gains else "",
                *_bytes(peaks, optimizer),
            ]
        )
    head = [
        "",
        f"full, {STEPS} steps",
        f"HiFT, {STEPS} steps",
        f"HiFT, {in_time} steps",
        f"over full, {in_time} steps",
        "peak of full, MiB",
        "peak of HiFT, MiB",
        "of full",
    ]
    return markdown(head, lines)


def _bytes(peaks: Rows, optimizer: str) -> list[str]:
    found = [peak for way in WAYS if (peak := peak_bytes(peaks, optimizer, way)) is not None]
    if len(found) < len(WAYS):
        return ["", "", ""]
    full, hift = found
    return [f"{full / MIB:.0f}", f"{hift / MIB:.0f}", f"{hift / full:.3f}"]


def peak_bytes(peaks: Rows, optimizer: str, way: str) -> int | None:
    """Most bytes on the device, if they have been counted."""
    row = peaks.get(f"{optimizer}, {way}")
    return None if row is None else int(row["peak_bytes"])


def _rates(search: Rows) -> str:
    lines = []
    for optimizer, way in CONTESTANTS:
        rows = [row for row in search.values() if (row["optimizer"], row["way"]) == (optimizer, way)]
        rows.sort(key=lambda row: int(row["exponent"]))
        chosen = best(search, optimizer, way)
        tried = [f"{rate_of(int(row['exponent'])):.1e}: {100 * float(row['validation_accuracy']):.1f}" for row in rows]
        lines.append([f"{optimizer}, {way}", "" if chosen is None else f"{rate_of(chosen):.1e}", ", ".join(tried)])
    return markdown(["", "rate", "tried, with validation accuracy"], lines)
