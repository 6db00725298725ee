"""The command line of the scripts that make packaged data from an archive."""

import argparse
from collections.abc import Callable
from pathlib import Path

from hift_lightning.engine.errors import ConfigurationError


def make_from_archive(make: Callable[[Path, Path], int], archive: str, file: Path, what: str) -> None:
    """Read the command line, make the file, and tell what was written.

    Args:
        make: called with the archive and the folder to write to, it returns how much it has written.
        archive: the archive's usual name.
        file: the file that is made; by default where it lies in the package.
        what: is counted, such as `sentences`.
    """
    parser = argparse.ArgumentParser(description=f"Make {file.name} from {archive}.")
    parser.add_argument("archive", type=Path, help=archive)
    parser.add_argument("--folder", type=Path, default=file.parent, help="where the files go (default: the package)")
    arguments = parser.parse_args()
    try:
        count = make(arguments.archive, arguments.folder)
    except ConfigurationError as error:
        raise SystemExit(str(error)) from error
    print(f"{count} {what} written to {arguments.folder / file.name}")
