"""The faults that are tried, and the page on them."""

import functools
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments.faults import files, runs
from experiments.table import Rows, Table, markdown

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """A kind of fault."""

    ends: str
    """How a run, or a load, should end that meets it."""
    measure: Callable[[], runs.Outcome]


REFUSED = "a sentence, or nothing that is loaded has changed"
FAULTS = {
    "SIGKILL at a random moment": Row("dead", functools.partial(runs.killed, signal.SIGKILL, 100)),
    "SIGINT at a random moment": Row("stopped", functools.partial(runs.killed, signal.SIGINT, 20)),
    "SIGTERM at a random moment": Row("stopped", functools.partial(runs.killed, signal.SIGTERM, 20)),
    "disk full while saving": Row(
        "a sentence",
        functools.partial(
            runs.met, runs.disk_full, "could not be saved|no room for|can be read or written no more", 20
        ),
    ),
    "disk full while parking": Row(
        "a sentence", functools.partial(runs.met, runs.no_room_to_park, "no room for", 20, fresh=True)
    ),
    "files of parked state deleted": Row(
        "a sentence", functools.partial(runs.met, runs.file_lost, "a file of parked state is gone", 20)
    ),
    "files of parked state shortened": Row(
        "a sentence", functools.partial(runs.met, runs.file_cut, "a file of parked state is too short", 20)
    ),
    "NaN or inf in the loss": Row(
        "a sentence", functools.partial(runs.met, runs.spoiled_loss, "The loss has (NaN|inf)", 20)
    ),
    "an error in training code": Row(
        "its own error", functools.partial(runs.met, runs.error_in_training, "ZeroDivisionError", 20)
    ),
    "checkpoint cut short": Row("a sentence", functools.partial(files.read, files.cut_short, 300)),
    "checkpoint with a flipped bit": Row(REFUSED, functools.partial(files.read, files.bit_flipped, 2000)),
    "another file for a checkpoint, code in it": Row("a sentence", functools.partial(files.read, files.foreign, 6)),
}


def measure(name: str) -> dict[str, object]:
    return FAULTS[name].measure()


TABLE = Table(HERE / "results.csv", tuple(FAULTS), measure)


def summary(rows: Rows) -> str:
    """The text; its numbers come from the rows."""
    head = ["fault", "should end with", "tried", "ended so", "something lost"]
    lines = [[name, FAULTS[name].ends, row["tried"], row["ended"], row["lost"]] for name, row in rows.items()]
    tries, lost = (sum(int(row[key]) for row in rows.values()) for key in ("tried", "lost"))
    parts = [
        "A transformer of four layers with dropout, in bf16 with fp32 masters, AdamW, streamed, its state in files, "
        "validated in each epoch, with a checkpoint after each step. A run meets a fault at a random moment, and "
        "another process goes on from its newest checkpoint, without the fault. Something is lost if a checkpoint is "
        "not whole, or if any loss on the way, or weights, masters, optimizer state or place at the end, differ in a "
        "bit from those of a run that never stopped. Checkpoint files are changed at random places and loaded; "
        "something is lost if another value is loaded than was saved.",
        markdown(head, lines),
        f"Tried {tries:,} times, lost {lost:,} times.",
    ]
    return "\n\n".join(parts) + "\n"
