"""The errors that end a run with one sentence, what else an error can tell, and what lies behind it."""

import sys
import warnings
from collections.abc import Iterator


class ConfigurationError(ValueError):
    """A value given by the user cannot work; the message names the value, the place and the remedy.

    The application ends with the message alone, without a traceback.
    """


class NonfiniteError(FloatingPointError):
    """The loss, a gradient or a weight has NaN or inf; the message names update, block, tensor and remedies.

    The application ends with the message alone, without a traceback.
    """


class ParkedStateError(OSError):
    """Parked optimizer state is lost or not that of the weights, or there is no room for it; the message names it.

    The application ends with the message alone, without a traceback.
    """


def add_note(error: BaseException, sentence: str) -> None:
    """Let an error tell more below its traceback; before Python 3.11, which brought that, a warning tells it.

    Args:
        error: whatever has been raised; it stays what it is.
        sentence: what it could not know.
    """
    if sys.version_info >= (3, 11):
        error.add_note(sentence)
    else:
        warnings.warn(sentence, stacklevel=2)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the one that it was raised from or on top of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
