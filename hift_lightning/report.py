"""What a run ends with: `metrics.json`, a closing table, or one sentence that says what is wrong."""

import contextlib
import json
import math
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from hift_lightning.callbacks.monitor import HiFTMonitor
from hift_lightning.engine.errors import ConfigurationError, NonfiniteError, ParkedStateError, add_note

METRICS_FILE = "metrics.json"

# name in metrics.json, words in the table, how the number is written
ROWS = (
    ("test/accuracy_before", "test accuracy before", "share"),
    ("test/accuracy", "test accuracy after", "share"),
    ("val/accuracy", "validation accuracy", "share"),
    ("test/f1_before", "test macro F1 before", "share"),
    ("test/f1", "test macro F1 after", "share"),
    ("val/f1", "validation macro F1", "share"),
    ("test/perplexity_before", "test perplexity before", "perplexity"),
    ("test/perplexity", "test perplexity after", "perplexity"),
    ("val/perplexity", "validation perplexity", "perplexity"),
    ("hift/blocks", "blocks", "count"),
    ("hift/cycles", "cycles", "count"),
    ("hift/skipped_steps", "steps left out for NaN or inf", "count"),
    ("time/step_ms_mean", "time per step", "milliseconds"),
    ("memory/peak_weights_bytes", "peak bytes: weights", "bytes"),
    ("memory/peak_gradients_bytes", "peak bytes: gradients", "bytes"),
    ("memory/peak_optimizer_state_bytes", "peak bytes: optimizer state", "bytes"),
    ("memory/peak_device_bytes", "peak bytes on the device", "bytes"),
    ("memory/parked_bytes", "parked optimizer state", "bytes"),
    ("memory/peak_rss_bytes", "peak memory of the process (RSS)", "bytes"),
    ("flops/step_mean", "compute per step", "flops"),
)


def collect_metrics(
    trainer: L.Trainer, before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Gather all numbers of a run under their flat names.

    Args:
        trainer: after the run; its `HiFTMonitor`, where it has one, tells what was measured.
        before: results of the test before training; they get the ending `_before`.
        after: results of validation and test after training.
    """
    metrics = {f"{name}_before": float(value) for results in before for name, value in results.items()}
    for results in after:
        metrics.update({name: float(value) for name, value in results.items()})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, HiFTMonitor):
            metrics.update(callback.numbers)
    metrics["steps"] = trainer.global_step
    if not in_sweep():  # where it is that of the largest run so far
        metrics["memory/peak_rss_bytes"] = peak_rss_bytes()
    return metrics


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def write_metrics(metrics: Mapping[str, float], folder: str | Path) -> Path:
    """Write `metrics.json` into `folder` and return its path."""
    path = Path(folder) / METRICS_FILE
    numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
    path.write_text(json.dumps(numbers, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    return path


def print_table(
    metrics: Mapping[str, float], checkpoint: Path | None, folder: str | Path, best: Sequence[str] = ()
) -> None:
    """Print the closing table of a run.

    Args:
        metrics: as `collect_metrics` gives them.
        checkpoint: the last one.
        folder: where `metrics.json` is.
        best: as `best_checkpoints` tells them.
    """
    table = Table(show_header=False)
    for name, words, kind in ROWS:
        if name in metrics:
            table.add_row(words, written(metrics[name], kind))
    console = Console()
    console.print(table)
    # below the table, since a narrow terminal would cut them in it
    for line in (
        *([f"The table is of the last weights, of step {metrics['steps']:.0f}."] if best else []),
        *(f"best:        {one}" for one in best),
        f"checkpoint:  {'none' if checkpoint is None else shown(checkpoint)}",
        f"all numbers: {shown(Path(folder) / METRICS_FILE)}",
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def written(value: float, kind: str) -> str:
    """Write a number as a person reads it.

    Args:
        value: the number.
        kind: `share` (written in percent), `perplexity`, `bytes` (in MiB), `milliseconds`, `flops` (in TFLOP) or
            `count`.
    """
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind == "perplexity":
        return f"{value:.2f}"
    if kind == "bytes":
        return f"{value / 2**20:.1f} MiB"
    if kind == "milliseconds":
        return f"{value:.0f} ms"
    if kind == "flops":
        return f"{value / 1e12:.2f} TFLOP"
    return f"{value:.0f}"


def saved_checkpoints(trainer: L.Trainer) -> dict[Path, int]:
    """Return the checkpoints in the folders that the run saves to, and when each was written, in nanoseconds."""
    # looked up on disk, since ModelCheckpoint does not record in its paths what it saves on an exception
    return {
        path: path.stat().st_mtime_ns
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None
        # a name that has folders in it is looked for in them
        for path in Path(callback.dirpath).glob("**/*.ckpt" if "/" in (callback.filename or "") else "*.ckpt")
    }


def last_checkpoint(trainer: L.Trainer, before: Mapping[Path, int], ckpt_path: str | None) -> Path | None:
    """Return the newest checkpoint that the run has saved, or what it goes on from, if anything.

    Args:
        trainer: whose run it is.
        before: what `saved_checkpoints` returned at its start, of another run in the same folder.
        ckpt_path: what it goes on from.
    """
    own = {path: written for path, written in saved_checkpoints(trainer).items() if before.get(path) != written}
    return max(own, key=lambda path: own[path], default=None if ckpt_path is None else Path(ckpt_path))


def best_checkpoints(trainer: L.Trainer) -> list[str]:
    """Tell of each checkpoint that a monitor has found to be the best where it is, and of how much.

    Args:
        trainer: after the run.
    """
    return [
        f"{shown(Path(callback.best_model_path))} ({callback.monitor} {float(callback.best_model_score):.4g})"
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None
        if callback.best_model_path and callback.best_model_score is not None
    ]


@contextlib.contextmanager
def one_sentence_errors() -> Iterator[None]:
    """End the process with a sentence, and no traceback, for what the user can mend; all else keeps its own.

    A run of a sweep ends alone.

    Raises:
        FailedRun: in a sweep.
    """
    try:
        yield
    except (ConfigurationError, MisconfigurationException, NonfiniteError, ParkedStateError) as error:
        _end_with(_one_line(error))
    except InstantiationException as error:
        cause = error.__cause__
        key = re.search(r"full_key: (\S+)", str(error))
        place = f"In `{key.group(1)}`: " if key else ""
        if isinstance(cause, ConfigurationError):
            _end_with(_one_line(cause))
        if cause is None or isinstance(cause, (ValueError, TypeError, ImportError, MisconfigurationException)):
            no_backend = "backend found" in str(cause)  # Lightning's words
            remedy = " Give `trainer.accelerator=auto` or `cpu`, or install a torch build for the device."
            _end_with(place + _one_line(cause or error) + (remedy if no_backend else ""))
        raise
    except KeyboardInterrupt:
        sys.exit("Interrupted.")


class FailedRun(CompactHydraException):
    """Of a sweep, with what is wrong in a sentence, which Hydra prints as it is."""


def in_sweep() -> bool:
    """Whether a run of a sweep is going on in this process."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _end_with(sentence: str) -> NoReturn:
    if in_sweep():
        raise FailedRun(sentence)  # which Hydra catches, and goes on with the next run
    sys.exit(sentence)


@contextlib.contextmanager
def failure_names_checkpoint(
    trainer: L.Trainer, last: Callable[[], Path | None], ckpt_path: str | None
) -> Iterator[None]:
    """Let whatever ends a run before its time tell where the last checkpoint is.

    Ctrl-C and SIGTERM end the process with a sentence. An error stays what it is and tells it below its own message.

    Args:
        trainer: whose run it is.
        last: tells the last checkpoint, if there is one.
        ckpt_path: what the run goes on from, which may be what it cannot go on from.
    """
    try:
        yield
    except SystemExit:
        # how the Trainer ends on Ctrl-C, after its callbacks and the strategy have put things in order
        if not (trainer.interrupted or trainer.received_sigterm):
            raise
        sys.exit(f"Interrupted; {_way_on(last())}")
    except Exception as error:
        mendable = isinstance(error, (ConfigurationError, MisconfigurationException))
        if trainer.interrupted and not (mendable and last() in (None, ckpt_path and Path(ckpt_path))):
            told = _way_on(last())
            add_note(error, f"{told[0].upper()}{told[1:]}")
        raise


def end_on_sigterm(trainer: L.Trainer) -> None:
    """End the process if SIGTERM has come while the Trainer worked and it has done all its work nevertheless.

    Lightning looks at the signal between two batches, and after the last of them no more.

    Args:
        trainer: after `fit`, `validate` or `test`.

    Raises:
        SIGTERMException: as Lightning's loops do.
    """
    if trainer.received_sigterm:
        raise SIGTERMException


def _way_on(checkpoint: Path | None) -> str:
    if checkpoint is None:
        return "no checkpoint had been saved yet."
    return f"the last checkpoint is {checkpoint}; go on with `ckpt_path={checkpoint}`."


def _one_line(error: BaseException) -> str:
    """The error's message, and what it was told to tell, in one line."""
    return " ".join(" ".join([str(error), *getattr(error, "__notes__", [])]).split())


def shown(path: Path) -> str:
    """Return a path as seen from the present folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
