"""Whether folders can be written to, and by this run alone, found out before any long work."""

import contextlib
import fcntl
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.report import one_sentence_errors


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
