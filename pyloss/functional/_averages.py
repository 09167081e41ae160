"""Averages of exponentials, which are kept as logarithms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional._sums import summed


def moved(log_u: Tensor, log_g: Tensor, gamma: float | Tensor) -> Tensor:
    """log((1 - gamma) u + gamma g); where u is 0, before the first step, log g."""
    if isinstance(gamma, Tensor):
        keep, take = torch.log1p(-gamma), torch.log(gamma)
    else:
        keep, take = math.log1p(-gamma) if gamma < 1 else -math.inf, math.log(gamma)
    found = torch.logaddexp(log_u + keep, log_g + take)
    return torch.where(log_u == -math.inf, log_g, found)


def log_mean_exp(x: Tensor, share: Tensor | None = None) -> Tensor:
    """log of the mean of e^x, x (N,): also of numbers that are all but equal, whose logarithm of a
    sum would be no more exact than log N is. `share`: weights of the mean, which add up to 1."""
    m = x.detach().amax()
    m = torch.where(m.isfinite(), m, 0.0)
    if share is None:
        share = 1 / x.numel()
    u = x - m
    near = summed(torch.expm1(u) * share)
    far = summed(torch.exp(u) * share)
    is_near = near > -0.5
    near = torch.log1p(torch.where(is_near, near, 0.0))
    return m + torch.where(is_near, near, torch.log(torch.where(is_near, 1.0, far)))
