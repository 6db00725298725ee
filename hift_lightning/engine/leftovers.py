"""What a killed process has left behind, told from what is in use by a lock.

Process ids are used again, above all in containers; a lock goes with the process that holds it.
"""

import contextlib
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

if sys.platform != "win32":
    import fcntl


def mark_in_use(descriptor: int) -> bool:
    """Lock an open file for as long as it is open.

    Args:
        descriptor: of a file that has just been made.

    Returns:
        Whether the file is still there: another process may have taken it for a leftover before it was locked.
    """
    if sys.platform == "win32":
        return True
    with contextlib.suppress(OSError):  # a file system without locks: nobody will take it for a leftover
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fstat(descriptor).st_nlink > 0


def remove_leftovers(paths: Iterable[Path], remove: Callable[[Path], object]) -> None:
    """Remove what is not in use.

    Args:
        paths: files that their makers have marked.
        remove: called with each that is a leftover.
    """
    if sys.platform == "win32":  # which has no such locks
        return
    for path in paths:
        with contextlib.suppress(OSError):  # it is in use, is already gone, or is not ours to remove
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(descriptor)


IN_USE = "in-use"
"""Name of the file in a folder whose lock tells that the folder is in use."""


def new_folder_in_use(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder in which a file is locked for as long as it is open.

    Args:
        parent: where it is made.
        prefix: of its name.

    Returns:
        The folder, and the descriptor of the file.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder / IN_USE, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        if mark_in_use(lock):
            return folder, lock
        os.close(lock)


def remove_folders_left(parent: Path, prefix: str) -> None:
    """Remove folders of :func:`new_folder_in_use` that are no more in use.

    Args:
        parent: where they were made.
        prefix: of their names.
    """
    remove_leftovers(parent.glob(f"{glob.escape(prefix)}*/{IN_USE}"), lambda lock: shutil.rmtree(lock.parent))
