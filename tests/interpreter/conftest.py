"""Triton's interpreter, without its repeated work; every launch under the access recorder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Whoever collects all of tests/ loads this file too, perhaps without a Triton that the others need.
if os.environ.get("TRITON_INTERPRET") == "1":
    from access_recorder import recording
    from quick_interpreter import pytest_configure  # noqa: F401

# Kernels that load memory which nothing has written, and why.
MAY_LOAD_UNWRITTEN: dict[str, str] = {}


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Programs run in a shuffled order; what no kernel may do fails the test."""
    if request.module.__name__ in ("check_recorder", "check_addresses"):  # have their own
        yield None
        return
    with recording("random", MAY_LOAD_UNWRITTEN) as state:
        yield state
