"""Sums in an order that the number of threads does not change."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from pyloss.ops._shards import is_dtensor

_MANY = 4096  # numbers that torch adds up in one thread


def summed(each: Tensor) -> Tensor:
    """The sum, in an order that the number of threads does not change, as that of torch's may."""
    if is_dtensor(each):  # which has an order of its own, and may lie in a way that none flattens
        return each.sum()
    each = each.reshape(-1)
    if each.shape[0] > _MANY:
        each = F.pad(each, (0, -each.shape[0] % 256)).view(-1, 256).sum(1)
    return each.sum()


def reduced(each: Tensor, reduction: str) -> Tensor:
    """As reduction says, each (N,); the mean of nothing is NaN."""
    if reduction == "none":
        return each
    total = summed(each)
    return total / each.shape[0] if reduction == "mean" else total


def log_summed(z: Tensor) -> Tensor:
    """The logarithm of the sum of e^z, z (N,), likewise."""
    if z.shape[0] > _MANY:
        z = F.pad(z, (0, -z.shape[0] % 256), value=-math.inf).view(-1, 256).logsumexp(1)
    return z.logsumexp(0)
