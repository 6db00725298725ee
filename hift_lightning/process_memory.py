"""Memory of the process, as the kernel counts it."""

import threading
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

_STATUS = Path("/proc/self/status")
_INTERVAL_SECONDS = 0.02


class PeakAnonymousMemory:
    """Watch the anonymous memory of this process within a `with` block (RssAnon: what is not backed by a file).

    It is looked at 50 times a second by a thread, so a shorter peak can be missed.
    """

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        """The most bytes seen; `None` where the kernel does not tell (it is Linux that does)."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        if _STATUS.exists():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        self._look()
        while not self._over.wait(_INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(anonymous_bytes(), self.peak_bytes or 0)


def anonymous_bytes() -> int:
    """Return the bytes of anonymous memory that this process has resident now (Linux)."""
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"`{_STATUS}` has no line `RssAnon`.")
