"""Moving averages of exponentials, which are kept as logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def moved(log_u: Tensor, log_g: Tensor, gamma: float | Tensor) -> Tensor:
    """log((1 - gamma) u + gamma g); where u is 0, before the first step, log g."""
    if isinstance(gamma, Tensor):
        keep, take = torch.log1p(-gamma), torch.log(gamma)
    else:
        keep, take = math.log1p(-gamma) if gamma < 1 else -math.inf, math.log(gamma)
    found = torch.logaddexp(log_u + keep, log_g + take)
    return torch.where(log_u == -math.inf, log_g, found)
