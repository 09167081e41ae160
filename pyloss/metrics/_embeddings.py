"""Tiles of the similarities of embeddings, for the metrics that look at pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# A side of a tile. Products of this size run at the full rate, and the passes over one stay in the
# cache.
TILE = 1024


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
