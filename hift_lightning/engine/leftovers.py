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


class FolderInUse:
    """A new folder, with a file in it that is locked until it is released or removed, or the process ends.

    Args:
        parent: where it is made; folders there with this prefix that are no more in use are removed.
        prefix: of its name.

    Attributes:
        path: the folder.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        remove_leftovers(parent.glob(f"{glob.escape(prefix)}*/{IN_USE}"), lambda lock: shutil.rmtree(lock.parent))
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock: int | None = os.open(self.path / IN_USE, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
            if mark_in_use(self._lock):
                return
            self._unlock()

    def release(self) -> None:
        """Let it be a folder like any other, which may be given another name."""
        if sys.platform == "win32":  # which removes no file that is open
            self._unlock()
        (self.path / IN_USE).unlink()
        self._unlock()

    def remove(self) -> None:
        """Remove it with all that is in it, if it is still there."""
        if sys.platform == "win32":
            self._unlock()
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
