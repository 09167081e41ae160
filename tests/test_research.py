"""What all modules of pyloss.research share: documented names, and examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import pyloss.research

MODULES = [
    f"pyloss.research.{name}"
    for _, name, _ in pkgutil.iter_modules(pyloss.research.__path__)
    if not name.startswith("_")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_research(name: str) -> None:
    module = importlib.import_module(name)
    for public, found in vars(module).items():
        if callable(found) and found.__module__ == name and not public.startswith("_"):
            text = inspect.getdoc(found)
            assert "Example:" in text or issubclass(found, tuple), public
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0
