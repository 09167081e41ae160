"""What a bad argument is told, and which unusual ones are taken: one row each.

The rows of a family stand in `ROWS` of `messages/<family>.py`; a new module there is found by
itself. What a Spec has in `errors` is checked in every way a function can be called; here is what
users have met, with the words that help them.
"""

from __future__ import annotations

import importlib
import pkgutil

import messages
import pytest
import torch
from messages._table import Accepted, Call, Refused

_TABLE = [
    pytest.param(row, id=f"{name}-{at}-{getattr(row.call.function, '__name__', 'call')}")
    for _, name, _ in pkgutil.iter_modules(messages.__path__)
    if not name.startswith("_")
    for at, row in enumerate(importlib.import_module(f"messages.{name}").ROWS)
]


@pytest.mark.parametrize("row", _TABLE)
def test_message(row: Refused | Accepted) -> None:
    if isinstance(row, Accepted):
        torch.testing.assert_close(row.call(), row.same_as(), rtol=0, atol=0, equal_nan=True)
    elif issubclass(row.error, Warning):
        with pytest.warns(row.error) as found:
            row.call()
        assert any(row.words in str(w.message) for w in found), [str(w.message) for w in found]
    else:
        with pytest.raises(row.error) as raised:
            row.call()
        assert type(raised.value) is row.error
        assert row.words in str(raised.value)


def test_the_table_finds_what_is_wrong() -> None:
    def silent() -> None: ...

    def other_words() -> None:
        raise ValueError("gamma must be positive")

    with pytest.raises(pytest.fail.Exception):
        test_message(Refused(ValueError, "gamma", Call(silent, (), {})))
    with pytest.raises(AssertionError):
        test_message(Refused(ValueError, "tau", Call(other_words, (), {})))
    with pytest.raises(AssertionError):
        test_message(Accepted(Call(float, (1,), {}), Call(float, (2,), {})))
