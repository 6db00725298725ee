"""The faults that are tried, and the page on them."""

import functools
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.faults import files, runs
from experiments.faults.trials import Fault
from experiments.table import Rows, Table, markdown

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """A kind of fault."""

    ends: str
    """How a run, or a load, should end that meets it."""
    tries: int
    measure: Callable[..., runs.Outcome]
    """Takes `tries`, and the `case` of the runs if it is not the usual one."""


REFUSED = "a sentence, or nothing that is loaded has changed"
NOT_SAVED = "could not be saved|no room for|can be read or written no more"


def _met(ends: str, fault: Callable[[random.Random], Fault], words: str, **arguments: Any) -> Row:
    return Row(ends, 20, functools.partial(runs.met, fault, words, **arguments))


FAULTS = {
    "SIGKILL at a random moment": Row("dead", 100, functools.partial(runs.killed, signal.SIGKILL)),
    "SIGINT at a random moment": Row("stopped", 20, functools.partial(runs.killed, signal.SIGINT)),
    "SIGTERM at a random moment": Row(
        "stopped, or dead while it does not train", 20, functools.partial(runs.killed, signal.SIGTERM)
    ),
    "disk full while saving": _met("a sentence", runs.disk_full, NOT_SAVED),
    "disk full while parking": _met("a sentence", runs.no_room_to_park, "no room for", fresh=True),
    "folder of checkpoints made read-only": _met(
        "a sentence", runs.read_only, "could not be saved .EACCES", mend=runs.unprotect
    ),
    "files of parked state deleted": _met("a sentence", runs.file_lost, "a file of parked state is gone"),
    "files of parked state shortened": _met("a sentence", runs.file_cut, "a file of parked state is too short"),
    "NaN or inf in the loss": _met("a sentence", runs.spoiled_loss, "The loss has (NaN|inf)"),
    "an error in training code": _met("its own error", runs.error_in_training, "ZeroDivisionError"),
    "a data loader that raises": _met("its own error", runs.sample_broken, "LookupError: a broken sample"),
    "checkpoint of another model": _met(
        "a sentence", runs.another_model, "weights do not fit .Traced.", mend=runs.take_away
    ),
    "SIGINT while a checkpoint is loaded": _met("stopped", runs.stopped_while_loading, ""),
    "checkpoint cut short": Row("a sentence", 300, functools.partial(files.read, files.cut_short)),
    "checkpoint with a flipped bit": Row(REFUSED, 2000, functools.partial(files.read, files.bit_flipped)),
    "another file for a checkpoint, code in it": Row("a sentence", 6, functools.partial(files.read, files.foreign)),
}


def measure(name: str) -> dict[str, object]:
    return FAULTS[name].measure(tries=FAULTS[name].tries)


TABLE = Table(HERE / "results.csv", tuple(FAULTS), measure)


def summary(rows: Rows) -> str:
    """The text; its numbers come from the rows."""
    head = ["fault", "should end with", "tried", "ended so", "something lost"]
    lines = [[name, FAULTS[name].ends, row["tried"], row["ended"], row["lost"]] for name, row in rows.items()]
    tries, lost = (sum(int(row[key]) for row in rows.values()) for key in ("tried", "lost"))
    parts = [
        "A transformer of four layers with dropout, in bf16 with fp32 masters, AdamW, streamed, its state in files, "
        "validated in each epoch, with a checkpoint after each step and where an error ends it. A run meets a fault at "
        "a random moment, and another process goes on from its newest checkpoint, without the fault. Something is lost "
        "if a checkpoint is not whole, or if any loss on the way, or weights, masters, optimizer state or place at the "
        "end, differ in a bit from those of a run that never stopped. Checkpoint files are changed at random places "
        "and loaded; something is lost if another value is loaded than was saved.",
        markdown(head, lines),
        f"Tried {tries:,} times, lost {lost:,} times.",
    ]
    return "\n\n".join(parts) + "\n"
