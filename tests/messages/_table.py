"""Rows of the table of messages: bad calls and what they say, unusual calls and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Call(NamedTuple):
    """function(*args, **options), made when the test runs."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        return self.function(*self.args, **self.options)


class Refused(NamedTuple):
    """A call that raises, or warns, with these words in the message."""

    error: type[Exception]
    words: str
    call: Call


class Accepted(NamedTuple):
    """A call that means the same as another one."""

    call: Call
    same_as: Call


def refused(
    error: type[Exception], words: str, function: Callable[..., Any], *args: Any, **options: Any
) -> Refused:
    """A row: the words, as they stand, name the argument and what was found."""
    return Refused(error, words, Call(function, args, options))


def accepted(function: Callable[..., Any], *args: Any, **pairs: Any) -> Accepted:
    """A row: each option is a pair (given, what it stands for)."""
    given = {name: pair[0] for name, pair in pairs.items()}
    meant = {name: pair[1] for name, pair in pairs.items()}
    return Accepted(Call(function, args, given), Call(function, args, meant))
