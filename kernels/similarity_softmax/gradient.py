"""Backward: the logits' gradient, tile by tile, and its products with queries and keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import cdiv, device_guard
from ..linear_cross_entropy.launch import OPTIONS, Config
from ..linear_cross_entropy.tiles import dot, patch
from . import launch
from .launch import check_pairs, tile_of
from .pairs import (
    Coeffs,
    Kind,
    Pairs,
    is_special,
    key_coeffs,
    load_whole,
    logits,
    pair_gradient,
    products,
    query_coeffs,
    rows_of,
    scale_of,
    target_range,
)

# A sweep is split where its row tiles alone would leave multiprocessors of an H200 idle: it is to
# have at most two programs for each, which run at once.
SWEEP_GRID = 264

QUERIES, KEYS, BOTH = 0, 1, 2
_KEYS, _BOTH = tl.constexpr(KEYS), tl.constexpr(BOTH)


@triton.jit
def target_ranges_kernel(
    p,  # Pairs
    low_ptr,  # int32 [tiles of BLOCK queries]: the lowest target of each, and the highest
    high_ptr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    low, high = target_range(tile * BLOCK + tl.arange(0, BLOCK), p)
    tl.store(low_ptr + tile, low)
    tl.store(high_ptr + tile, high)


@triton.jit
def _range_of(low_ptr, high_ptr, tile, p):
    if p.target is None:
        return 0, -1
    else:
        return tl.load(low_ptr + tile), tl.load(high_ptr + tile)


@triton.jit
def pair_sweep_kernel(
    own_ptr,  # [n_own, n_inner]: the queries, or the keys for gradients of these
    other_ptr,  # [n_other, n_inner]
    p,  # Pairs
    c,  # Coeffs
    low_ptr,  # int32 [tiles of BLOCK_N queries], with targets and other than OF = 0
    high_ptr,
    out_ptr,  # [n_splits][n_own][n_inner]
    scale_sum_ptr,  # float32 [n_splits][n_own] or None: sum_j dz_ij q_i . k_j
    bias_sum_ptr,  # float32 [n_splits][n_own] or None: sum_j dz_ij
    n_inner,
    stride_own,
    stride_other,
    n_splits,
    tiles_per_split,
    K: tl.constexpr,  # Kind
    C: tl.constexpr,  # Tile
    OF: tl.constexpr,  # gradients of the queries, of the keys, or of both, which are one tensor
    BLOCK_D: tl.constexpr,  # holds n_inner; BLOCK_K if C.WHOLE
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_K: tl.constexpr = C.BLOCK_K
    EVEN: tl.constexpr = C.EVEN
    WIDE: tl.constexpr = C.WIDE
    PRECISION: tl.constexpr = "tf32" if C.TF32 else "ieee"
    row_tile, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    n_own = p.n_keys if OF == _KEYS else p.n_queries
    n_other = p.n_queries if OF == _KEYS else p.n_keys
    row0 = row_tile * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    near = tl.minimum(rows, n_own - 1)
    own_rows = rows_of(own_ptr, near, stride_own)
    own = own_rows
    if C.WHOLE:
        own = load_whole(own_rows, n_inner, EVEN, BLOCK_K)
    inner = tl.arange(0, BLOCK_D)
    offsets = tl.arange(0, BLOCK_N)

    low, high = 0, -1
    if OF == _KEYS:
        column_lse, column_a = key_coeffs(near[:, None], c)
    else:
        lse, a = query_coeffs(near[:, None], c)
        scale = scale_of(near, p)[:, None]
        if p.target is not None:
            low, high = target_range(rows, p)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale_sum = tl.zeros((BLOCK_M,), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(n_other, BLOCK_N))
    for tile in range(split * tiles_per_split, last_tile):
        col0 = tile * BLOCK_N
        cols = col0 + offsets
        near_cols = tl.minimum(cols, n_other - 1)
        other_rows = rows_of(other_ptr, near_cols, stride_other)
        if C.WHOLE:
            other = load_whole(other_rows, n_inner, EVEN, BLOCK_D)
            zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            s = dot(own, tl.trans(other), zero, WIDE, PRECISION)
        else:
            s = products(own, own_rows, other_rows, n_inner, C)
        if OF == _KEYS:
            lse, a = query_coeffs(near_cols[None, :], c)
            scale = scale_of(near_cols, p)[None, :]
            low, high = _range_of(low_ptr, high_ptr, tile, p)
            i, j = cols[None, :], rows[:, None]
            special = is_special(col0, row0, low, high, p, K, BLOCK_N, BLOCK_M)
        else:
            column_lse, column_a = key_coeffs(near_cols[None, :], c)
            i, j = rows[:, None], cols[None, :]
            special = is_special(row0, col0, low, high, p, K, BLOCK_M, BLOCK_N)
        z = logits(s, scale, p)
        g = pair_gradient(z, i, j, lse, a, column_lse, column_a, special, c, p, K)
        if OF == _BOTH:
            other_lse, other_a = query_coeffs(near_cols[None, :], c)
            other_low, other_high = _range_of(low_ptr, high_ptr, tile, p)
            special = is_special(col0, row0, other_low, other_high, p, K, BLOCK_N, BLOCK_M)
            g += pair_gradient(z, j, i, other_lse, other_a, 0.0, 0.0, special, c, p, K)
        if scale_sum_ptr is not None:
            scale_sum += tl.sum(g * s, axis=1)
        if bias_sum_ptr is not None:
            bias_sum += tl.sum(g, axis=1)
        if OF == _KEYS:
            g *= tl.load(p.scale + near_cols * p.scale_stride)[None, :]
        if not C.WHOLE:
            other = load_whole(other_rows, n_inner, False, BLOCK_D)
        acc = dot(g.to(other.dtype), other, acc, WIDE, PRECISION)

    if OF != _KEYS:
        acc *= tl.load(p.scale + near * p.scale_stride)[:, None]
    at = tl.cast(split, tl.int64) * n_own + rows
    stored = rows < n_own
    out = out_ptr + at[:, None] * n_inner + inner[None, :]
    inside = stored[:, None] & (inner[None, :] < n_inner)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)
    if scale_sum_ptr is not None:
        tl.store(scale_sum_ptr + at, scale_sum, mask=stored)
    if bias_sum_ptr is not None:
        tl.store(bias_sum_ptr + at, bias_sum, mask=stored)


@triton.jit
def pair_gradient_kernel(
    q_ptr,  # [n_queries, n_inner]
    k_ptr,  # [n_keys, n_inner]
    p,  # Pairs
    c,  # Coeffs
    dz_ptr,  # [rows, n_keys]: scale_i dz_ij of the queries from first_tile on
    scale_sum_ptr,  # float32 [column tiles][rows] or None: sum_j dz_ij q_i . k_j
    bias_sum_ptr,  # float32 [column tiles][rows] or None: sum_j dz_ij
    n_inner,
    stride_q,
    stride_k,
    stride_dz,
    first_tile,
    n_rows,
    K: tl.constexpr,
    C: tl.constexpr,
    OF: tl.constexpr,  # 2: of the pairs (i, j) and (j, i), of one tensor
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_K: tl.constexpr = C.BLOCK_K
    EVEN: tl.constexpr = C.EVEN
    GROUP: tl.constexpr = C.GROUP
    n_col_tiles = tl.cdiv(p.n_keys, BLOCK_N)
    row_tile, col_tile = patch(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), n_col_tiles, GROUP)
    row0, col0 = (first_tile + row_tile) * BLOCK_M, col_tile * BLOCK_N
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    near, near_cols = tl.minimum(rows, p.n_queries - 1), tl.minimum(cols, p.n_keys - 1)
    q_rows, k_rows = rows_of(q_ptr, near, stride_q), rows_of(k_ptr, near_cols, stride_k)
    left = q_rows
    if C.WHOLE:
        left = load_whole(q_rows, n_inner, EVEN, BLOCK_K)
    s = products(left, q_rows, k_rows, n_inner, C)

    low, high = 0, -1
    if p.target is not None:
        low, high = target_range(rows, p)
    special = is_special(row0, col0, low, high, p, K, BLOCK_M, BLOCK_N)
    z = logits(s, scale_of(near, p)[:, None], p)
    lse, a = query_coeffs(near[:, None], c)
    column_lse, column_a = key_coeffs(near_cols[None, :], c)
    i, j = rows[:, None], cols[None, :]
    g = pair_gradient(z, i, j, lse, a, column_lse, column_a, special, c, p, K)
    if OF == _BOTH:
        if p.target is not None:
            low, high = target_range(cols, p)
        special = is_special(col0, row0, low, high, p, K, BLOCK_N, BLOCK_M)
        lse, a = query_coeffs(near_cols[None, :], c)
        g += pair_gradient(z, j, i, lse, a, 0.0, 0.0, special, c, p, K)

    local = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = local < n_rows
    at = col_tile.to(tl.int64) * n_rows + local
    if scale_sum_ptr is not None:
        tl.store(scale_sum_ptr + at, tl.sum(g * s, axis=1), mask=stored)
    if bias_sum_ptr is not None:
        tl.store(bias_sum_ptr + at, tl.sum(g, axis=1), mask=stored)
    g *= tl.load(p.scale + near * p.scale_stride)[:, None]
    ptrs = dz_ptr + local.to(tl.int64)[:, None] * stride_dz + cols[None, :]
    inside = stored[:, None] & (cols[None, :] < p.n_keys)
    tl.store(ptrs, g.to(dz_ptr.dtype.element_ty), mask=inside)


class Swept(NamedTuple):
    """A gradient (rows, D), and what scale and bias get of each row, float32; None: not asked."""

    out: torch.Tensor
    scale_sums: torch.Tensor | None
    bias_sums: torch.Tensor | None


def _sums(like: torch.Tensor, parts: int, rows: int, wanted: bool) -> torch.Tensor | None:
    return like.new_empty((parts, rows), dtype=torch.float32) if wanted else None


def _summed(part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part[0] if part.shape[0] == 1 else part.sum(0)


def pair_sweep(
    queries: torch.Tensor,
    keys: torch.Tensor,
    p: Pairs,
    kind: Kind,
    coeffs: Coeffs,
    of: int,
    *,
    want_scale: bool = False,
    want_bias: bool = False,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> Swept:
    """Gradient of queries, of keys or, where these are one tensor, of both, for D up to MOST_WHOLE.

    Args:
        queries, keys, p, kind: as of pair_statistics.
        coeffs: of the logits' gradient.
        of: QUERIES, KEYS or BOTH; BOTH has no coefficients of columns, and one scale.
        want_scale, want_bias: whether those sums are wanted; not of KEYS.
        dtype: of the result, that of the inputs if None.
        config, splits: tiles, and parts of the sum (None: by shape).
    """
    check_pairs(queries, keys, p, kind)
    own, other = (keys, queries) if of == KEYS else (queries, keys)
    (n_own, d), n_other = own.shape, other.shape[0]
    c = config or launch.choose_config("sweep", own.dtype, d, n_own, own.device)
    row_tiles, col_tiles = cdiv(n_own, c.block_m), cdiv(n_other, c.block_n)
    per_split = cdiv(col_tiles, splits or max(1, SWEEP_GRID // row_tiles))
    splits = cdiv(col_tiles, per_split)
    dtype = dtype or own.dtype
    part = own.new_empty((splits, n_own, d), dtype=dtype if splits == 1 else torch.float32)
    scale_sums = _sums(own, splits, n_own, want_scale)
    bias_sums = _sums(own, splits, n_own, want_bias)
    ranges = (None, None)
    with device_guard(own):
        if p.target is not None and of != QUERIES:
            tiles = cdiv(p.n_queries, c.block_n)
            ranges = own.new_empty((2, tiles), dtype=torch.int32).unbind()
            target_ranges_kernel[(tiles,)](p, *ranges, BLOCK=c.block_n, num_warps=1, **OPTIONS)
        pair_sweep_kernel[(row_tiles * splits,)](
            own,
            other,
            p,
            coeffs,
            *ranges,
            part,
            scale_sums,
            bias_sums,
            d,
            own.stride(0),
            other.stride(0),
            splits,
            per_split,
            K=kind,
            C=tile_of(c, own),
            OF=of,
            BLOCK_D=max(16, triton.next_power_of_2(d)),
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            **OPTIONS,
        )
    return Swept(_summed(part).to(dtype), _summed(scale_sums), _summed(bias_sums))


def pair_gradient_block(
    queries: torch.Tensor,
    keys: torch.Tensor,
    p: Pairs,
    kind: Kind,
    coeffs: Coeffs,
    of: int,
    out: torch.Tensor,
    first_row: int,
    *,
    want_scale: bool = False,
    want_bias: bool = False,
    config: Config | None = None,
) -> Swept:
    """scale_i dz_ij of some rows, to be multiplied with keys and queries.

    Args:
        of: QUERIES, or BOTH: dz_ij + dz_ji.
        out: buffer of at least those rows, and M columns, last stride 1.
        first_row: the first of them, a multiple of the tile's height; they end with the buffer or
            with the queries.
        others: as of pair_sweep.
    """
    check_pairs(queries, keys, p, kind)
    (n, d), m = queries.shape, keys.shape[0]
    columns = coeffs.column_a is not None or coeffs.column_positive is not None
    more = kind.sigmoid or kind.same != 0 or columns or of == BOTH or d % 64 != 0
    c = config or launch.choose_config(
        "block with more" if more else "block", queries.dtype, d, n, queries.device
    )
    if first_row % c.block_m:
        raise ValueError(f"first_row must be a multiple of {c.block_m}, got {first_row}")
    dz = out[: n - first_row, :m]
    rows, col_tiles = dz.shape[0], cdiv(m, c.block_n)
    scale_sums = _sums(queries, col_tiles, rows, want_scale)
    bias_sums = _sums(queries, col_tiles, rows, want_bias)
    with device_guard(queries):
        pair_gradient_kernel[(cdiv(rows, c.block_m) * col_tiles,)](
            queries,
            keys,
            p,
            coeffs,
            dz,
            scale_sums,
            bias_sums,
            d,
            queries.stride(0),
            keys.stride(0),
            dz.stride(0),
            first_row // c.block_m,
            rows,
            K=kind,
            C=tile_of(c, queries),
            OF=of,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            **OPTIONS,
        )
    return Swept(dz, _summed(scale_sums), _summed(bias_sums))
