"""Rows of scores by tiles, of which only the k largest are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.ops._gemm import product
from pyloss.ops._launch import without_autocast

# Scores in flight. Larger tiles leave the cache and gain nothing: a product over 256 rows or more
# runs at the full rate already.
TILE = 1 << 20
# A GPU takes a block of threads for each row of torch.topk, and hundreds of blocks to be busy; its
# cache holds these 32 MiB of float32.
CUDA_TILE = 1 << 23


def tile_rows(width: int, device: torch.device) -> int:
    return max(1, (CUDA_TILE if device.type == "cuda" else TILE) // max(1, width))


def forward(queries: Tensor, keys: Tensor, k: int, first: int) -> tuple[Tensor, Tensor]:
    count = queries.shape[0]
    values = queries.new_empty((count, k))
    indices = torch.empty((count, k), dtype=torch.int64, device=queries.device)
    rows = tile_rows(keys.shape[0], queries.device)
    others = keys.t()
    buffer = queries.new_empty((min(rows, count), keys.shape[0]))
    # Autocast would round the products to half types, which orders near keys wrongly.
    with without_autocast(queries):
        for begin in range(0, count, rows):
            end = min(begin + rows, count)
            scores = buffer[: end - begin]
            product(queries[begin:end], others, scores)
            if first >= 0:
                scores.diagonal(first + begin).fill_(-math.inf)
            torch.topk(scores, k, dim=1, out=(values[begin:end], indices[begin:end]))
    return values, indices


def key_gradient(grad: Tensor, queries: Tensor, indices: Tensor, keys: Tensor) -> Tensor:
    """Of the keys: each gets its queries times their cotangents."""
    count, k = indices.shape
    found = torch.zeros_like(keys)
    rows = tile_rows(k * keys.shape[1], keys.device)
    for begin in range(0, count, rows):
        part = slice(begin, begin + rows)
        terms = grad[part].unsqueeze(2) * queries[part].unsqueeze(1)
        found.index_add_(0, indices[part].reshape(-1), terms.view(-1, keys.shape[1]))
    return found
