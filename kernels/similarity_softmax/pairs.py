"""What one tile of pairs is: its logits, which pairs count, its share of a gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..linear_cross_entropy.tiles import LOG2E, dot, tile_product

MOST_INDEX = tl.constexpr(2**31 - 1)


class Pairs(NamedTuple):
    """What tells pairs apart. Queries (N, D) and keys (M, D), fewer than 2^31 - 2^16 of each."""

    scale: torch.Tensor  # float32, of one number or N
    scale_stride: int  # 0 or 1
    bias: torch.Tensor | None  # float32, of one number; of the sigmoid
    target: torch.Tensor | None  # (N,), int64; what is no key's index is no target
    query_ids: torch.Tensor | None  # (N,), integers
    key_ids: torch.Tensor | None  # (M,), of the same type
    first: int  # key first + i is query i's own, with Kind.own
    n_queries: int
    n_keys: int


class Kind(NamedTuple):
    """How pairs are read, for the compiler."""

    own: bool  # queries have keys of their own, which are left out
    same: int  # pairs of equal ids: 0 nothing special, 1 positive, 2 left out
    negatives: bool  # of these alone is the softmax
    sigmoid: bool  # sums of softplus in the place of a softmax


class Coeffs(NamedTuple):
    """Of the gradient, float32, None: 0. `lse` in powers of 2, +inf for an empty row or column.

    dz_ij = exp(z_ij - lse_i) a_i + exp(z_ij - column_lse_j) column_a_j  of pairs that count
            + positive_i + column_positive_j                            of positive ones
    and of the sigmoid a_i sigmoid(z_ij + bias), or -a_i sigmoid(-z_ij - bias) of positive ones.
    """

    lse: torch.Tensor | None
    a: torch.Tensor
    positive: torch.Tensor | None = None
    column_lse: torch.Tensor | None = None
    column_a: torch.Tensor | None = None
    column_positive: torch.Tensor | None = None


# --------------------------------------------------------------------------------------------------
# Logits


@triton.jit
def rows_of(ptr, index, stride):
    """Pointers to rows, [rows, 1]."""
    return ptr + index.to(tl.int64)[:, None] * stride


@triton.jit
def load_whole(rows, n_inner, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of at most BLOCK numbers."""
    inner = tl.arange(0, BLOCK)[None, :]
    if EVEN:
        return tl.load(rows + inner)
    else:
        return tl.load(rows + inner, mask=inner < n_inner, other=0.0)


@triton.jit
def products(left, left_rows, right_rows, n_inner, C: tl.constexpr):
    """left right^T in float32, where C.WHOLE with `left` loaded before the loop."""
    # Triton 3.6 hands a field of C on only by a name of its own.
    EVEN: tl.constexpr = C.EVEN
    WIDE: tl.constexpr = C.WIDE
    PRECISION: tl.constexpr = "tf32" if C.TF32 else "ieee"
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_K: tl.constexpr = C.BLOCK_K
    if C.WHOLE:
        right = load_whole(right_rows, n_inner, EVEN, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        return dot(left, tl.trans(right), acc, WIDE, PRECISION)
    else:
        return tile_product(
            left_rows, right_rows, n_inner, EVEN, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )


@triton.jit
def scale_of(queries, p):
    """With the factor that makes exp of the logits a power of 2. `queries` are indices inside."""
    return tl.load(p.scale + queries * p.scale_stride) * LOG2E


@triton.jit
def logits(s, scale, p):
    if p.bias is None:
        return s * scale
    else:
        return s * scale + tl.load(p.bias) * LOG2E


# --------------------------------------------------------------------------------------------------
# Kinds of pairs


@triton.jit
def target_of(queries, p):
    """Its index, -1 where a query has no target."""
    target = tl.load(p.target + tl.minimum(queries, p.n_queries - 1))
    return tl.where((target >= 0) & (target < p.n_keys), target, -1).to(tl.int32)


@triton.jit
def target_range(queries, p):
    """(lowest, highest) target of some queries."""
    target = target_of(queries, p)
    return tl.min(tl.where(target < 0, MOST_INDEX, target), axis=0), tl.max(target, axis=0)


@triton.jit
def is_special(
    query0, key0, low, high, p, K: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """Whether a tile needs masks; low, high: target_range of its queries, where there are targets.

    Few do: those at an end, and those that hold an own key, a target, or any ids.
    """
    special = (query0 + QUERIES > p.n_queries) | (key0 + KEYS > p.n_keys)
    if K.own:
        own = p.first + query0
        special = special | ((own < key0 + KEYS) & (key0 < own + QUERIES))
    if p.target is not None:
        special = special | ((low < key0 + KEYS) & (high >= key0))
    if K.same != 0:
        special = special | (K.same != 0)
    return special


@triton.jit
def kinds(i, j, p, K: tl.constexpr):
    """(left out, positive) of pairs; i, j: indices of queries and keys, broadcast to the tile."""
    left_out = (i >= p.n_queries) | (j >= p.n_keys)
    if K.own:
        left_out = left_out | (j == i + p.first)
    positive = (i < 0) & (j < 0)
    if p.target is not None:
        positive = j == target_of(i, p)
    if K.same != 0:
        query_id = tl.load(p.query_ids + tl.minimum(i, p.n_queries - 1))
        equal = query_id == tl.load(p.key_ids + tl.minimum(j, p.n_keys - 1))
        if K.same == 2:
            left_out = left_out | (equal & (positive == 0))
        else:
            positive = positive | equal
    return left_out, positive & (left_out == 0)


# --------------------------------------------------------------------------------------------------
# Gradients


@triton.jit
def query_coeffs(index, c):
    """(lse, a) of queries."""
    a = tl.load(c.a + index)
    if c.lse is None:
        return a, a
    else:
        return tl.load(c.lse + index), a


@triton.jit
def key_coeffs(index, c):
    """(lse, a) of keys, or numbers that nothing reads."""
    if c.column_lse is None:
        return 0.0, 0.0
    else:
        return tl.load(c.column_lse + index), tl.load(c.column_a + index)


@triton.jit
def share(z, lse):
    """exp of z - lse: a part of 1, also where z was rounded in another order than for its lse."""
    return tl.exp2(tl.minimum(z - lse, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def pair_gradient(z, i, j, lse, a, column_lse, column_a, special, c, p, K: tl.constexpr):
    """dz of a tile. lse and the next three are of shapes that broadcast, as i and j."""
    if K.sigmoid:
        g = a / (1.0 + tl.exp2(-z))
    else:
        g = share(z, lse) * a
        if c.column_lse is not None:
            g += share(z, column_lse) * column_a
    if special:
        left_out, positive = kinds(i, j, p, K)
        if K.sigmoid:
            g = tl.where(positive, -a / (1.0 + tl.exp2(z)), g)
        else:
            if K.negatives:
                g = tl.where(positive, 0.0, g)
            if c.positive is not None:
                more = tl.load(c.positive + tl.minimum(i, p.n_queries - 1))
                g = tl.where(positive, g + more, g)
            if c.column_positive is not None:
                more = tl.load(c.column_positive + tl.minimum(j, p.n_keys - 1))
                g = tl.where(positive, g + more, g)
        g = tl.where(left_out, 0.0, g)
    return g
