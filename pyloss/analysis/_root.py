"""Roots of increasing functions, many at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ENOUGH = 1e-13  # a Newton step this small leaves an error of its square


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    low: Tensor,
    high: Tensor,
    rounds: int = 120,
) -> Tensor:
    """Where an increasing function is 0, in each element by itself.

    `function` gives value and slope. Newton's step is taken where it stays between what is known to
    be too low and too high and the last one halved the value; elsewhere the interval is halved.
    """
    at, before = (low + high) / 2, torch.full_like(low, torch.inf)
    done = torch.zeros_like(low, dtype=torch.bool)
    for _ in range(rounds):
        value, slope = function(at)
        low, high = torch.where(value < 0, at, low), torch.where(value > 0, at, high)
        newton = at - value / slope
        small = (newton - at).abs() <= _ENOUGH * at.abs().clamp(min=1)
        useful = (newton >= low) & (newton <= high) & (value.abs() <= before / 2) | small
        at = torch.where(done, at, torch.where(useful, newton, (low + high) / 2))
        before = value.abs()
        done = done | small | (value == 0) | value.isnan()
        if bool(done.all()):
            break
    return at
