"""The table of demo sections. A section is one job on real input; each op may add its own.

To add one: write `pyloss/demo/<name>.py` with a function under `@section(...)`, and add the
module's name to MODULES. The function gets the options, prints its report, writes its files under
`options.out`, and returns the checks that failed, one sentence each (none: success).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODULES = ("language_model", "match3", "segmentation", "sorting")


@dataclass(frozen=True)
class Options:
    """What the command line says; the same for every section."""

    out: Path
    quick: bool = False
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True)
class Section:
    name: str
    summary: str
    run: Callable[[Options], list[str]]


_TABLE: dict[str, Section] = {}


def section(
    name: str, summary: str
) -> Callable[[Callable[[Options], list[str]]], Callable[[Options], list[str]]]:
    """Decorator: enters a function into the table under `name`."""

    def register(run: Callable[[Options], list[str]]) -> Callable[[Options], list[str]]:
        if name in _TABLE:
            raise ValueError(f"demo section {name!r} is registered twice")
        _TABLE[name] = Section(name, summary, run)
        return run

    return register


def load() -> dict[str, Section]:
    """Imports every section module and returns the table, in the order of MODULES."""
    for module in MODULES:
        importlib.import_module(f"{__package__}.{module}")
    return dict(_TABLE)
