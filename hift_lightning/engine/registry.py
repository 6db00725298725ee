"""What a setting can name: the orders, tiers and layouts that are built in, and those that a user registers."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from hift_lightning.engine.errors import ConfigurationError

T = TypeVar("T")
Registered = TypeVar("Registered", bound=Callable[..., Any])

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


class Registry(Mapping[str, T]):
    """Functions or classes of one kind by name, in the order in which they were registered.

    Args:
        decorator: the name of the function that registers one, for messages.
    """

    def __init__(self, decorator: str) -> None:
        self._decorator = decorator
        self._registered: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator that gives a function or a class a name.

        What is defined anew where it was defined before, as a notebook's cell that is run again does, takes the old
        one's place.

        Args:
            name: letters, digits, ``_``, ``.`` and ``-``.

        Raises:
            ConfigurationError: if it is no such name, or (when it decorates) belongs to another one.
        """
        if not isinstance(name, str) or re.fullmatch(_NAME, name) is None:
            raise ConfigurationError(
                f"`{self._decorator}` was given {name!r} as name; write `@{self._decorator}('a_name')`, with letters, "
                "digits, `_`, `.` and `-`."
            )

        def decorate(registered: Registered) -> Registered:
            before = self._registered.get(name)
            if before is not None and (_place(before) != _place(registered) or "<" in _place(registered)):
                raise ConfigurationError(
                    f"`@{self._decorator}({name!r})` is on `{_place(registered)}`, and the name belongs to "
                    f"`{_place(before)}`; choose another than {self.names()}."
                )
            self._registered[name] = registered  # type: ignore[assignment]
            return registered

        return decorate

    def names(self) -> str:
        """The names in alphabetical order, for messages."""
        return ", ".join(sorted(self._registered))

    def __getitem__(self, name: str) -> T:
        return self._registered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._registered)

    def __len__(self) -> int:
        return len(self._registered)


def _place(registered: Any) -> str:
    named = registered if hasattr(registered, "__qualname__") else type(registered)  # a `functools.partial` has no name
    return f"{named.__module__}.{named.__qualname__}"
