"""One Spec per public callable, a file per family; see `_spec.py`."""

from __future__ import annotations

import importlib
import pkgutil

from specs._spec import Spec


def _collect() -> dict[str, Spec]:
    found: dict[str, Spec] = {}
    for info in pkgutil.iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        for spec in importlib.import_module(f"specs.{info.name}").SPECS:
            if spec.name in found:
                raise ValueError(f"two specs are called {spec.name!r}")
            found[spec.name] = spec
    return found


SPECS = _collect()
