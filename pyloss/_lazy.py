"""Names that are imported at their first use (PEP 562), from one table per package.

A package says in its ``__init__.py`` which module holds which public names::

    __getattr__, __dir__, __all__ = _lazy.exports(__name__, {"sorting": ("soft_rank", "soft_sort")})

and says the same to type checkers in ``__init__.pyi``; tests/test_exports.py compares the two.
A resolved name becomes an ordinary global of the package, so only its first use comes here: later
ones, and the guards of compiled graphs, see a plain attribute. Two threads that come at once meet
at the import lock and find the same object.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

# The packages that have a table, where a missing name is looked for; to import them costs little.
PACKAGES = (
    "adversarial",
    "analysis",
    "distributed",
    "functional",
    "metrics",
    "nn",
    "nn.lie",
    "optim",
    "optim.lr_scheduler",
    "regularizers",
    "visualize",
)

_names: dict[str, list[str]] = {}  # public names of those imported so far, and of pyloss


def exports(
    package: str, table: Mapping[str, Iterable[str]], *, submodules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes the public names of a package resolve at their first use.

    Args:
        package: ``__name__`` of the package that calls.
        table: names by the module of the package that holds them; the modules resolve too. No
            name may be that of a module: importing the module would put it in the name's place.
        submodules: further modules of the package that resolve.

    Returns:
        ``__getattr__`` and ``__dir__`` of the package, and the sorted names of the table.
    """
    home = {name: module for module, names in table.items() for name in names}
    modules = {*table, *submodules}
    names = _names[package] = sorted(home)
    module = sys.modules[package]

    def resolve(name: str) -> Any:
        if name in home:
            value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        elif name in modules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            _missing(package, name)
        setattr(module, name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(module), *names, *modules})

    return resolve, listed, names


def _missing(package: str, name: str) -> NoReturn:
    """Raises the AttributeError of a name that a package lacks, and says where it may be found."""
    text = f"module {package!r} has no attribute {name!r}"
    # Not for private and special names: the import system, pickle and inspect ask in passing.
    if not name.startswith("_") and (hint := _hint(package, name)):
        # Without obj, or Python would append its own guess to a traceback.
        raise AttributeError(f"{text}; {hint}", name=name, obj=None)
    raise AttributeError(text)


def _hint(package: str, name: str) -> str | None:
    import difflib

    for child in PACKAGES:
        importlib.import_module(f"pyloss.{child}")
    for place, names in sorted(_names.items()):
        if name in names:
            return f"it is {place}.{name}"

    def plain(candidate: str) -> str:  # soft_sort, softsort and SoftSort are close
        return candidate.replace("_", "").lower()

    for places in ([package], sorted(_names)):
        full = {}
        for place in places:
            for candidate in _names[place]:
                full.setdefault(plain(candidate), f"{place}.{candidate}")
        if close := difflib.get_close_matches(plain(name), full, n=1, cutoff=0.7):
            return f"did you mean {full[close[0]]}?"
    return None
