"""Numbers that change from call to call under torch.compile: as a tensor, one graph for all.

A number in an op's schema is a constant of the graph, and each value compiles anew. What Dynamo
holds as a symbol crosses in a tensor instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

# At the end of an op's schema: all options, where there are symbols for some; the list of options
# then serves the fakes.
NUMBERS = "Tensor? numbers=None"

# In place of a symbol: tells the fakes what they ask of a number, as is_soft does, which is whether
# it is one of its special values 0 and 1.
_SOME = 0.5


def split(options: tuple[float, ...]) -> tuple[tuple[float, ...], Tensor | None]:
    """(options, numbers) of a call that is compiled: where one is a symbol, all, on the CPU."""
    if all(map(_is_constant, options)):
        return options, None
    # Products of a tensor with a symbol: the form of it that torch.compile keeps as a tensor.
    numbers = torch.tensor([x if _is_constant(x) else 0.0 for x in options], dtype=torch.float64)
    for at, x in enumerate(options):
        if not _is_constant(x):
            unit = [float(i == at) for i in range(len(options))]
            numbers = numbers + torch.tensor(unit, dtype=torch.float64) * x
    return tuple([x if _is_constant(x) else _shown(x) for x in options]), numbers


def _shown(x) -> float:
    return 0.0 if x == 0 else 1.0 if x == 1 else _SOME


def _is_constant(x) -> bool:
    # Loaded by whoever compiles. torch 2.6 cannot tell: there every number is a constant.
    from torch.fx.experimental import symbolic_shapes

    known = getattr(symbolic_shapes, "has_static_value", None)
    return known is None or known(x)
