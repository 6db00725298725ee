"""Whether folders can be written to, found out before any long work."""

import tempfile
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
