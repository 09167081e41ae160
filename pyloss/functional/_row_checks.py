"""Checks of rows and of their labels, without the ops that compare embeddings."""

from __future__ import annotations

from torch import Tensor

from pyloss.functional import _checks as checks


def check_rows(name: str, x, least: int = 0) -> None:
    checks.check_floating(name, x)
    checks.check_dense(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got {list(x.shape)}")
    if x.shape[0] < least:
        raise ValueError(f"{name} must hold at least {least} rows, got {list(x.shape)}")


def check_integers(name: str, labels, rows: int) -> None:
    """One a row."""
    checks.check_tensor(name, labels)
    if labels.dtype not in checks.INTEGERS:
        raise TypeError(f"{name} must hold integers, got {labels.dtype}")
    if labels.shape != (rows,):
        raise ValueError(f"{name} must have the shape {[rows]}, got {list(labels.shape)}")


def check_labels(labels, like: Tensor, name: str = "labels", like_name: str = "embeddings") -> None:
    check_integers(name, labels, like.shape[0])
    checks.check_device(name, labels, like, like_name)
