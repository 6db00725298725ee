"""The folders of a run: whether it can write to them, and alone, found out before any long work; what stays in them."""

import contextlib
import fcntl
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from hydra.experimental.callback import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter as CSVExperimentWriter
from omegaconf import DictConfig

from hift_lightning.callbacks import HiFTMonitor
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.report import one_sentence_errors
from hift_lightning.strategies.blockwise import BlockwiseTraining


def check_writable(key: str, folder: str | Path) -> None:
    """Make a folder and try to write into it.

    Args:
        key: of the configuration, for the message.
        folder: its parents are made too; it stays.

    Raises:
        ConfigurationError: it cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ConfigurationError(
            f"`{key}={folder}` cannot be written to ({error.strerror}); give a folder that can, with room on its disk."
        ) from error


def check_folders(trainer: L.Trainer) -> None:
    """Find out before any long work whether checkpoints, pictures, logs and parked state can be written.

    Args:
        trainer: knows where they go.

    Raises:
        ConfigurationError: one of the folders cannot be made or written to.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            check_writable("callbacks.checkpoint.dirpath", callback.dirpath)
        if isinstance(callback, HiFTMonitor) and callback.folder is not None:
            check_writable("callbacks.monitor.folder", callback.folder)
    for logger in trainer.loggers:
        if logger.save_dir is not None:
            check_writable("logger.save_dir", logger.save_dir)
    offload = trainer.strategy.settings.offload if isinstance(trainer.strategy, BlockwiseTraining) else "none"
    if Path(offload).is_dir():
        check_writable("strategy.offload", offload)


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Hold a run's output folder, so that no second one writes into it; a process that has ended holds it no more.

    Args:
        folder: an existing one.

    Raises:
        ConfigurationError: another process holds it.
    """
    path = Path(folder) / ".running"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise ConfigurationError(
                f"Another run, process {file.read()}, writes to `output_dir={folder}`; wait for its end, or give "
                "another folder (`hydra.run.dir=...`)."
            ) from error
        except OSError as error:  # as on some file systems of several machines
            warnings.warn(
                f"`output_dir={folder}` cannot be locked ({error.strerror}), so a second run in it would not be "
                "refused; give each run a folder of its own.",
                stacklevel=3,
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def set_earlier_logs_aside(trainer: L.Trainer) -> None:
    """Keep what an earlier run in this folder has logged, which Lightning's logger would delete."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            log = Path(logger.log_dir) / CSVExperimentWriter.NAME_METRICS_FILE
            if log.exists():
                asides = (log.with_stem(f"{log.stem}-{number}") for number in itertools.count(1))
                log.rename(next(aside for aside in asides if not aside.exists()))


class OutputFolder(Callback):
    """Check Hydra's own output folder before Hydra makes it, so that a sentence tells what is wrong with it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a single run."""
        with one_sentence_errors():
            check_writable("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a sweep."""
        with one_sentence_errors():
            check_writable("hydra.sweep.dir", config.hydra.sweep.dir)
