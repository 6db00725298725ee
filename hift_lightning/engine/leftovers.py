"""What a killed process has left behind, told from what is in use by a lock.

Process ids are used again, above all in containers; a lock goes with the process that holds it.
"""

import contextlib
import os
import sys
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
    with contextlib.suppress(OSError):  # a file system without locks: nobody will take it for a leftover
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fstat(descriptor).st_nlink > 0


def remove_leftovers(paths: Iterable[Path], remove: Callable[[Path], object]) -> None:
    """Remove what is not in use.

    Args:
        paths: files that their makers have marked.
        remove: called with each that is a leftover.
    """
    for path in paths:
        with contextlib.suppress(OSError):  # it is in use, is already gone, or is not ours to remove
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(descriptor)
