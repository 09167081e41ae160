"""Checks of embeddings and tiles of their similarities, for the metrics that look at pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks

# A side of a tile. Products of this size run at the full rate, and the passes over one stay in the
# cache.
TILE = 1024


def checked(name: str, x, least: int = 0) -> None:
    checks.check_floating(name, x)
    checks.check_dense(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} must be (N, D), got {list(x.shape)}")
    if x.shape[0] < least:
        raise ValueError(f"{name} must hold at least {least} rows, got {list(x.shape)}")


def check_labels(labels, like: Tensor, name: str = "labels") -> None:
    checks.check_tensor(name, labels)
    if labels.dtype not in checks.INTEGERS:
        raise TypeError(f"{name} must hold integers, got {labels.dtype}")
    if labels.shape != like.shape[:1]:
        raise ValueError(f"{name} must have the shape {[like.shape[0]]}, got {list(labels.shape)}")
    checks.check_device(name, labels, like, "embeddings")


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """In float32 at least, of length 1 if asked for; a row of zeros stays."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.normalize(x, dim=1) if normalize else x


def triangle(x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles (rows, columns, inner products) that hold each pair i < j once.

    One on the diagonal holds its pairs twice, and its rows with themselves. The memory of a tile is
    that of the next one.
    """
    n = x.shape[0]
    buffer = x.new_empty(min(TILE, n) ** 2)
    for i in range(0, n, TILE):
        rows = x[i : i + TILE]
        for j in range(i, n, TILE):
            columns = x[j : j + TILE]
            shape = (rows.shape[0], columns.shape[0])
            tile = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(rows, columns.t(), out=tile)
            yield slice(i, i + shape[0]), slice(j, j + shape[1]), tile


def lower(tile: Tensor) -> Tensor:
    """Of a tile on the diagonal: what stands in it a second time, and the diagonal."""
    return torch.ones_like(tile, dtype=torch.bool).tril_()
