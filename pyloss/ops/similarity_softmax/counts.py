"""How many pairs of each class lie between two thresholds of their distance."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops import _gemm
from pyloss.ops._flops import count_by
from pyloss.ops._launch import DTYPE_CODES, address, scratch
from pyloss.ops._registry import define_op
from pyloss.ops.similarity_softmax import records
from pyloss.ops.similarity_softmax.call import WHOLE, otherwise

# A side of a tile of torch's products: they run at the full rate, and a tile stays in the cache.
TILE = 1024


def _empty(x: Tensor, edges: Tensor, classes: int) -> Tensor:
    shape = (2, classes + 1, edges.shape[0])
    return torch.empty(shape, dtype=torch.int64, device=x.device)


def _by_kernel(x, half, labels, edges, classes):
    if _gemm.by_torch():
        return _by_tiles(x, half, labels, edges, classes)
    x, half, labels, edges = (t.contiguous() for t in (x, half, labels, edges))
    counts, threads = _empty(x, edges, classes), torch.get_num_threads()
    problem = records.Counts(
        *x.shape, classes, edges.shape[0], DTYPE_CODES[x.dtype], *map(address, (x, half, labels)),
        address(edges),
    )  # fmt: skip
    size = _C.similarity_counts_scratch_bytes(problem, threads)
    buffer, start = scratch(x, size)
    _C.similarity_counts(problem, address(counts), start, size, threads)
    del buffer
    return counts


def _by_tiles(x, half, labels, edges, classes, tile=TILE):
    n, steps = x.shape[0], edges.shape[0]
    counts = _empty(x, edges, classes).zero_()
    width = (classes + 1) * steps
    for i in range(0, n, tile):
        rows = slice(i, i + tile)
        for j in range(i, n, tile):
            columns = slice(j, j + tile)
            v = half[columns] - torch.mm(x[rows], x[columns].mT) + half[rows, None]
            near = v <= edges[-1]
            if i == j:
                near.triu_(1)
            at = near.view(-1).nonzero().squeeze(1)
            step = torch.bucketize(v.view(-1)[at], edges)
            first, second = labels[rows][at // v.shape[1]], labels[columns][at % v.shape[1]]
            same = (first == second) & (first < classes)
            place = first * steps + step + torch.where(same, 0, width)
            # A pair within a class counts once.
            other = (second * steps + step + width)[~same]
            counts.view(-1).add_(torch.bincount(torch.cat([place, other]), minlength=2 * width))
    return counts


def _by_reference(x, half, labels, edges, classes):
    """One tile: all pairs at once."""
    return _by_tiles(x, half, labels, edges, classes, max(1, x.shape[0]))


define_op(
    "similarity_counts(Tensor x, Tensor half, Tensor labels, Tensor edges, SymInt classes) "
    "-> Tensor",
    fake=lambda x, half, labels, edges, classes: _empty(x, edges, classes),
    impls={
        "cpu": _by_kernel,
        "triton": _by_tiles,
        "reference": otherwise(_by_reference, _by_tiles),
    },
    shards=WHOLE,
    plain="which pairs are counted is found by looking at their distances",
)
# Each pair once.
count_by("similarity_counts", lambda x, *rest, out_shape=None: x[0] * x[0] * x[1])


def similarity_counts(
    x: Tensor, half: Tensor, labels: Tensor, edges: Tensor, classes: int
) -> Tensor:
    """(2, classes + 1, T), int64: pairs i < j by the first k with |x_i - x_j|^2 / 2 <= edge_k.

    Row 0: pairs within the class; row 1: with one end in it. Pairs beyond the last edge count
    nowhere. Not differentiable.

    Args:
        x: (N, D), float32 or float64.
        half: (N,), |x_i|^2 / 2.
        labels: (N,), int64, from 0 to `classes`, whose rows are alone: none is of another's class.
        edges: (T,), ascending, of the dtype of x.
    """
    return torch.ops.pyloss.similarity_counts(x, half, labels, edges, classes)
