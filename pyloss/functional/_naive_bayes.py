"""Inputs of Gaussian naive Bayes, and its distances."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_rows
from pyloss.ops._labels import outside
from pyloss.ops._launch import without_autocast as without_autocast

_BLOCK = 2**22  # numbers of distances that are made at a time


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
