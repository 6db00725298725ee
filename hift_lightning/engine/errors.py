"""The error for what a user can mend, and a way to what lies behind an error."""

from collections.abc import Iterator


class ConfigurationError(ValueError):
    """A value given by the user cannot work; the message names the value, the place and the remedy.

    The application ends with the message alone, without a traceback.
    """


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, the one that it was raised from or on top of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
