"""Formulas for torch.utils.flop_counter, which sees an op from outside only.

That module takes a quarter of a second to import, and few programs do. So a formula waits here:
for the module, if it is not loaded yet, and for nothing, if it is. A FlopCounterMode copies what is
registered when it is made; those that are active get what comes later too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch

_MODULE = "torch.utils.flop_counter"
_waiting: list[tuple[torch._ops.OpOverloadPacket, Callable[..., int]]] = []


def count_by(name: str, formula: Callable[..., int]) -> None:
    """Registers the number of multiplications and additions of ``torch.ops.pyloss.<name>``.

    Args:
        formula: of the op's arguments, with shapes in the place of tensors, and ``out_shape``.
    """
    _waiting.append((getattr(torch.ops.pyloss, name), formula))
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AtImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AtImport())


class _AtImport:
    """Registers what waits right after the module has been imported. Finds no module itself."""

    def __init__(self) -> None:
        self.asking = False

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE or self.asking:
            return None
        self.asking = True  # the other finders
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.asking = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    module = importlib.import_module(_MODULE)  # complete, where another thread is at it
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    counters = [getattr(mode, "counter", mode) for mode in modes]
    while True:
        try:  # another thread may have taken the last one
            op, formula = _waiting.pop()
        except IndexError:
            return
        if op in module.flop_registry:  # after a reload of this module
            continue
        module.register_flop_formula(op)(formula)
        for counter in counters:
            if isinstance(counter, module.FlopCounterMode):
                counter.flop_registry.setdefault(op, module.flop_registry[op])
