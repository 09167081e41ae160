"""Count, mean and sum of squares of the samples of each class, which merge in any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_rows
from pyloss.ops._labels import outside
from pyloss.ops._launch import without_autocast as without_autocast

_BLOCK = 2**22  # numbers of distances that are made at a time


class ClassStats(NamedTuple):
    count: Tensor  # (C,)
    mean: Tensor  # (C, D), 0 of no samples
    ssd: Tensor  # (C, D): sum of squared distances from the mean


def class_stats(x: Tensor, y: Tensor, classes: int, dtype: torch.dtype) -> ClassStats:
    """Of one batch, by two passes over it."""
    x = x.detach().to(dtype)
    count = torch.zeros(classes, dtype=dtype, device=x.device)
    count = count.index_add(0, y, torch.ones_like(y, dtype=dtype))
    zero = torch.zeros(classes, x.shape[1], dtype=dtype, device=x.device)
    mean = zero.index_add(0, y, x) / count.clamp(min=1).unsqueeze(1)
    return ClassStats(count, mean, zero.index_add(0, y, (x - mean[y]).square()))


def merged(a: ClassStats, b: ClassStats) -> ClassStats:
    """Of the samples of both (Chan, Golub, LeVeque)."""
    count = a.count + b.count
    share = (b.count / count.clamp(min=1)).unsqueeze(1)
    off = b.mean - a.mean
    return ClassStats(
        count, a.mean + off * share, a.ssd + b.ssd + off.square() * share * a.count.unsqueeze(1)
    )


def over_ranks(own: ClassStats, group) -> ClassStats:
    """Of the samples of all ranks, merged in their order: the same on each."""
    from pyloss.functional import _contrastive_group as of_group  # with its first use

    every = [ClassStats(*parts) for parts in zip(*(of_group.of_all(t, group) for t in own))]
    found = every[0]
    for other in every[1:]:
        found = merged(found, other)
    return found


def check_batch(x, y, features: int, classes: int) -> Tensor:
    """The labels, int64."""
    check_samples("x", x, features)
    checks.check_tensor("y", y)
    if y.dtype not in checks.INTEGERS:
        raise TypeError(f"y must hold integers, got {y.dtype}")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y must have the shape {[x.shape[0]]}, got {list(y.shape)}")
    checks.check_device("y", y, x, "x")
    if checks.can_look_at(y) and y.numel():
        bad = y[outside(y, classes)]
        if bad.numel():
            raise IndexError(f"y {int(bad[0])} is out of range for {classes} classes")
    return y.long()


def check_samples(name: str, x, features: int) -> None:
    check_rows(name, x)
    checks.check_supported("GaussianNaiveBayes", x)
    if x.shape[1] != features:
        raise ValueError(f"{name} must have {features} features, got {list(x.shape)}")


def squared_distances(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """sum_j (x_j - m_cj)^2 / v_cj, (N, C): some classes at a time, and not as a square of sums,
    of which a small variance would leave nothing."""
    step = max(1, _BLOCK // max(1, x.numel()))
    parts = []
    for at in range(0, len(mean), step):
        off = x.unsqueeze(1) - mean[at : at + step]
        parts.append((off.square() / variance[at : at + step]).sum(2))
    return torch.cat(parts, 1)
