"""similarity_softmax and similarity_sums by torch operations on tiles: any device, any dtype.

A tile of logits is a product of some queries with some keys; statistics of rows and of columns are
merged from tile to tile, and the gradients form each tile once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype, without_autocast
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    DROP,
    MEAN,
    NEGATIVES,
    POSITIVE,
    SIGMOID,
    Pairs,
    gradients,
    softmax_outputs,
    sums_outputs,
)

# Rows and columns of a tile: some arrays of this size are in flight. A GPU wants more at a time.
TILE, CUDA_TILE = (512, 2048), (4096, 16384)


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    queries: Tensor  # times their scales
    keys: Tensor
    z: Tensor
    left_out: Tensor | None  # None: no pair
    positive: Tensor | None

    def counted(self, flags: int) -> Tensor | None:
        """The denominator; None: every pair."""
        out = self.left_out
        if flags & NEGATIVES and self.positive is not None:
            out = self.positive if out is None else out | self.positive
        return None if out is None else ~out


def _tiles(p: Pairs) -> Iterator[_Tile]:
    keys = p.queries if p.keys is None else p.keys
    (n, _), (m, _) = p.queries.shape, keys.shape
    acc = accumulator_dtype(p.queries.dtype)
    step_n, step_m = TILE if p.queries.device.type == "cpu" else CUDA_TILE
    for i in range(0, n, step_n):
        rows = slice(i, min(i + step_n, n))
        queries = p.queries[rows].to(acc) * _scale(p, rows)
        for j in range(0, m, step_m):
            columns = slice(j, min(j + step_m, m))
            part = keys[columns].to(acc)
            z = torch.mm(queries, part.t())
            yield _Tile(rows, columns, queries, part, z, *_kinds(p, rows, columns, z))


def _scale(p: Pairs, rows: slice):
    if p.scales is None:
        return p.scale
    return p.scales if p.scales.dim() == 0 else p.scales[rows].unsqueeze(1)


def _kinds(p: Pairs, rows: slice, columns: slice, z: Tensor):
    """Pairs left out, and positive ones."""
    own = equal = positive = None
    at = torch.arange(columns.start, columns.stop, device=z.device)
    if p.first >= 0:
        begin, end = p.first + rows.start, p.first + rows.stop
        if begin < columns.stop and columns.start < end:
            own = at == torch.arange(begin, end, device=z.device).unsqueeze(1)
    if p.target is not None:
        positive = at == p.target[rows].unsqueeze(1)
    if p.flags & (POSITIVE | DROP):
        equal = p.query_ids[rows].unsqueeze(1) == p.key_ids[columns]
    left_out = own
    if p.flags & DROP:
        dropped = equal if positive is None else equal & ~positive
        left_out = dropped if own is None else dropped | own
    elif p.flags & POSITIVE:
        positive = equal if positive is None else positive | equal
    if own is not None and positive is not None:
        positive = positive & ~own
    return left_out, positive


def _without_autocast(function):
    """Autocast would round the products to half types."""

    def call(*args):
        with without_autocast(next(a for a in args if isinstance(a, Tensor))):
            return function(*args)

    return call


# --------------------------------------------------------------------------------------------------
# Softmax statistics


class _Online:
    """log sum exp, sum of the positives, counts and mean of rows or columns, tile by tile."""

    def __init__(self, count: int, with_mean: bool, z_like: Tensor, dtype: torch.dtype) -> None:
        def zeros():
            return z_like.new_zeros(count, dtype=dtype)

        self.most = zeros().fill_(-torch.inf)
        self.sum, self.positive, self.count, self.positives = (zeros() for _ in range(4))
        self.weighted = zeros() if with_mean else None

    def add(self, at: slice, tile: _Tile, counted: Tensor | None, dim: int) -> None:
        z = tile.z if counted is None else tile.z.masked_fill(~counted, -torch.inf)
        most = torch.maximum(self.most[at], z.amax(dim))
        shift = most.masked_fill(most.isinf(), 0)
        e = torch.exp(z - shift.unsqueeze(dim))
        old = torch.exp(self.most[at] - shift)
        self.sum[at] = self.sum[at] * old + e.sum(dim)
        self.most[at] = most
        self.count[at] += z.shape[dim] if counted is None else counted.sum(dim)
        if self.weighted is not None:
            terms = torch.where(e == 0, 0.0, e * z)
            self.weighted[at] = self.weighted[at] * old + terms.sum(dim)
        if tile.positive is not None:
            self.positive[at] += torch.where(tile.positive, tile.z, 0.0).sum(dim)
            self.positives[at] += tile.positive.sum(dim)

    def results(self) -> list[Tensor]:
        lse = self.most.masked_fill(self.most.isinf(), 0) + torch.log(self.sum)
        found = [lse, self.positive, self.count, self.positives]
        if self.weighted is not None:
            found.append(torch.where(self.sum == 0, 0.0, self.weighted / self.sum))
        return found


@_without_autocast
def forward(*args) -> list[Tensor]:
    p = Pairs(*args)
    keys = p.queries if p.keys is None else p.keys
    acc = accumulator_dtype(p.queries.dtype)
    rows = _Online(p.queries.shape[0], bool(p.flags & MEAN), p.queries, acc)
    columns = _Online(keys.shape[0], False, p.queries, acc) if p.flags & COLUMNS else None
    for tile in _tiles(p):
        counted = tile.counted(p.flags)
        rows.add(tile.rows, tile, counted, 1)
        if columns is not None:
            columns.add(tile.columns, tile, counted, 0)
    found = rows.results() + ([] if columns is None else columns.results())
    return [to.copy_(t) for to, t in zip(softmax_outputs(p.queries, p.keys, p.flags), found)]


def _times(tile: _Tile, counted: Tensor | None, lse, grad, dim: int) -> Tensor:
    """p_ij times a cotangent of lse, over the denominator; 0 where that is empty."""
    e = torch.exp(tile.z - lse.unsqueeze(dim)) * grad.unsqueeze(dim)
    nothing = (lse == -torch.inf).unsqueeze(dim)
    return e.masked_fill(nothing if counted is None else nothing | ~counted, 0)


@_without_autocast
def backward(*args) -> list[Tensor]:
    p = Pairs(*args[:9])
    want, lse, column_lse, g, g_positive, column_g, column_g_positive = args[9:]

    def pair_gradient(tile: _Tile) -> Tensor:
        counted = tile.counted(p.flags)
        total = torch.zeros_like(tile.z)
        sides = (
            (tile.rows, 1, lse, g, g_positive),
            (tile.columns, 0, column_lse, column_g, column_g_positive),
        )
        for at, dim, values, of_lse, of_positive in sides:
            if of_lse is not None:
                total += _times(tile, counted, values[at], of_lse[at], dim)
            if of_positive is not None and tile.positive is not None:
                total += torch.where(tile.positive, of_positive[at].unsqueeze(dim), 0.0)
        return total

    return _accumulated(p, want, pair_gradient)


def _accumulated(p: Pairs, want: int, pair_gradient, bias: Tensor | None = None) -> list[Tensor]:
    """Gradients of queries, keys, scales and bias, of the gradients of the logits by tiles."""
    keys = p.queries if p.keys is None else p.keys
    acc = accumulator_dtype(p.queries.dtype)
    results = gradients(p, want, bias)
    of_queries = torch.zeros_like(p.queries, dtype=acc)  # before their scale
    both = p.keys is None
    of_keys = torch.zeros_like(keys, dtype=acc) if results[1] is not None or both else None
    of_bias = p.queries.new_zeros((), dtype=acc)
    for tile in _tiles(p):
        grad = pair_gradient(tile)
        of_queries[tile.rows].addmm_(grad, tile.keys)
        if of_keys is not None:
            of_keys[tile.columns].addmm_(grad.t(), tile.queries)
        if results[3] is not None:
            of_bias += grad.sum()
    if results[2] is not None:
        of_scale = (p.queries.to(acc) * of_queries).sum(1)
        results[2].copy_(of_scale if p.scales.dim() else of_scale.sum())
    if results[0] is not None:
        found = of_queries * _scale(p, slice(None))
        results[0].copy_(found + of_keys if both else found)
    if results[1] is not None:
        results[1].copy_(of_keys)
    if results[3] is not None:
        results[3].copy_(of_bias)
    return [t for t in results if t is not None]


# --------------------------------------------------------------------------------------------------
# Sums over pairs


def _u(tile: _Tile, bias: Tensor | None, numbers) -> tuple[Tensor, Tensor]:
    """(y, -y (z + bias)) of the sigmoid loss."""
    y = torch.full_like(tile.z, -1.0)
    if tile.positive is not None:
        y = y.masked_fill(tile.positive, 1.0)
    return y, -y * (tile.z + (numbers[0] if bias is None else bias))


def _beyond(tile: _Tile, numbers) -> tuple[Tensor, Tensor | None]:
    """Negatives that are high, positives that are low; NaN is either."""
    above, below = numbers
    high = ~(tile.z < above)
    for other in (tile.left_out, tile.positive):
        if other is not None:
            high &= ~other
    return high, None if tile.positive is None else tile.positive & ~(tile.z > below)


@_without_autocast
def sums_forward(*args) -> list[Tensor]:
    p, (bias, numbers, kind) = Pairs(*args[:9]), args[9:]
    found = [t.zero_() for t in sums_outputs(p.queries, kind)]
    for tile in _tiles(p):
        if kind == SIGMOID:
            terms = torch.nn.functional.softplus(_u(tile, bias, numbers)[1], threshold=60.0)
            if tile.left_out is not None:
                terms = terms.masked_fill(tile.left_out, 0)
            found[0][tile.rows] += terms.sum(1)
            continue
        high, low = _beyond(tile, numbers)
        found[0][tile.rows] += torch.where(high, tile.z - numbers[0], 0.0).sum(1)
        found[1][tile.rows] += high.sum(1)
        if low is not None:
            found[2][tile.rows] += torch.where(low, numbers[1] - tile.z, 0.0).sum(1)
            found[3][tile.rows] += low.sum(1)
    return found


@_without_autocast
def sums_backward(*args) -> list[Tensor]:
    p, (bias, numbers, kind, want, g, g_below) = Pairs(*args[:9]), args[9:]

    def pair_gradient(tile: _Tile) -> Tensor:
        if kind == SIGMOID:
            y, u = _u(tile, bias, numbers)
            grad = -y * torch.sigmoid(u) * g[tile.rows].unsqueeze(1)
            return grad if tile.left_out is None else grad.masked_fill(tile.left_out, 0)
        high, low = _beyond(tile, numbers)
        grad = torch.zeros_like(tile.z)
        for where, given, sign in ((high, g, 1), (low, g_below, -1)):
            if where is not None and given is not None:
                grad += torch.where(where, sign * given[tile.rows].unsqueeze(1), 0.0)
        return grad

    return _accumulated(p, want, pair_gradient, bias)
