"""Ctrl-C that waits until weights, optimizer state and the Trainer's counters belong together again."""

import signal
import threading
from types import FrameType


class PatientInterrupt:
    """While it is started, a first Ctrl-C between :meth:`hold` and :meth:`release` takes effect at the release.

    A second one takes effect at once. Only Python's own handler is replaced, and only in the main thread: where the
    user or a notebook has set another, that one stays.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending = False
        self._started = False

    def start(self) -> None:
        """Take over the handling of SIGINT, where it is Python's own."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._started = True

    def stop(self) -> None:
        """Give SIGINT back."""
        if self._started and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._started = self._holding = self._pending = False

    def hold(self) -> None:
        """From here on what is in memory is not a state that a run could go on from."""
        self._holding = True

    def release(self) -> None:
        """From here on it is.

        Raises:
            KeyboardInterrupt: if one has come meanwhile.
        """
        self._holding = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._holding and not self._pending:
            self._pending = True
        else:
            signal.default_int_handler(signum, frame)
