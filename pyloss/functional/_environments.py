"""Rows of several environments, one behind the other: checks, and the gradient in each."""

from __future__ import annotations

from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional.segment import segment_reduce


def check_environments(features: Tensor, target: Tensor, env_offsets: Tensor) -> None:
    """That there are rows of features, a response each, and offsets that may cut them."""
    checks.check_floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"features must be (N, k), got {list(features.shape)}")
    checks.check_floating("target", target)
    checks.check_device("target", target, features, "features")
    if target.dim() not in (1, 2) or target.shape[0] != features.shape[0]:
        raise ValueError(
            f"target must be (N,) or (N, m) with the N = {features.shape[0]} rows of features, got "
            f"{list(target.shape)}"
        )
    segment.check_offsets(env_offsets, features.shape[0], "env_offsets")
    checks.check_device("env_offsets", env_offsets, features, "features")


def gradients(phi: Tensor, y: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """G of each environment, (E, k) or (E, k, m)."""
    off = phi @ w - y
    rows = phi * off.unsqueeze(1) if y.dim() == 1 else phi.unsqueeze(2) * off.unsqueeze(1)
    return segment_reduce(rows, offsets, "mean")
