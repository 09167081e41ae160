"""Forward: statistics of rows and columns of the pairs, tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import FULL_GRID, cdiv, device_guard
from ..linear_cross_entropy.launch import OPTIONS, Config
from ..linear_cross_entropy.tiles import NEG_INF, POS_INF, patch
from . import launch
from .launch import check_pairs, tile_of
from .pairs import (
    Kind,
    Pairs,
    is_special,
    kinds,
    load_whole,
    logits,
    products,
    rows_of,
    scale_of,
    target_range,
)

LN2 = tl.constexpr(0.6931471805599453)
# Bytes of the statistics of columns by tiles of rows; with more, rows come in several launches.
COLUMN_BYTES = 256 << 20


@triton.jit
def _softplus(x):
    """log2(1 + 2^x), with small values to their last digits: relative error 2e-7."""
    t = tl.exp2(-tl.abs(x))
    # log2(1 + t) / t on [0, 1], at Chebyshev's nodes.
    p = -0.04194500894 + t * 0.00739540214
    p = -0.1962389519 + t * (0.1118320739 + t * p)
    p = -0.3582990696 + t * (0.2752212123 + t * p)
    p = -0.7213395131 + t * (0.4806788896 + t * p)
    p = 1.442694992 + t * p
    return tl.maximum(x, 0.0) + t * p


@triton.jit
def finite_floor(m):
    """From where exponents are measured: from 0 where the largest logit is infinite, as that less
    itself would be NaN."""
    return tl.where(tl.abs(m) == POS_INF, 0.0, m)


@triton.jit
def pair_statistics_kernel(
    q_ptr,  # [n_queries, n_inner]
    k_ptr,  # [n_keys, n_inner]
    p,  # Pairs
    part_ptr,  # float32 [1 to 4][n_splits][n_queries]: m, sum, then positive, then mean
    column_ptr,  # float32 [2 or 3][1 + n_row_tiles][n_keys]: m, sum, then positive; or None
    n_inner,
    stride_q,
    stride_k,
    first_tile,  # of rows
    n_row_tiles,  # of this launch
    n_splits,
    tiles_per_split,
    K: tl.constexpr,  # Kind
    C: tl.constexpr,  # Tile
    POSITIVE: tl.constexpr,
    MEAN: tl.constexpr,
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_K: tl.constexpr = C.BLOCK_K
    EVEN: tl.constexpr = C.EVEN
    GROUP: tl.constexpr = C.GROUP
    local_tile, split = patch(tl.program_id(0), n_row_tiles, n_splits, GROUP)
    row0 = (first_tile + local_tile) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    # A tile that reaches over the end reads the last row again instead of a mask in the loop.
    near = tl.minimum(rows, p.n_queries - 1)
    q_rows = rows_of(q_ptr, near, stride_q)
    left = q_rows
    if C.WHOLE:
        left = load_whole(q_rows, n_inner, EVEN, BLOCK_K)
    scale = scale_of(near, p)[:, None]
    offsets = tl.arange(0, BLOCK_N)
    low, high = 0, -1
    if p.target is not None:
        low, high = target_range(rows, p)

    m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    positives = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)

    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(p.n_keys, BLOCK_N))
    for tile in range(split * tiles_per_split, last_tile):
        col0 = tile * BLOCK_N
        cols = col0 + offsets
        k_rows = rows_of(k_ptr, tl.minimum(cols, p.n_keys - 1), stride_k)
        z = logits(products(left, q_rows, k_rows, n_inner, C), scale, p)

        special = is_special(row0, col0, low, high, p, K, BLOCK_M, BLOCK_N)
        column_positive = tl.zeros((BLOCK_N,), tl.float32)
        if special:
            left_out, positive = kinds(rows[:, None], cols[None, :], p, K)
            if K.sigmoid:
                z = tl.where(positive, -z, z)
            elif POSITIVE:
                of_positives = tl.where(positive, z, 0.0)
                positives += tl.sum(of_positives, axis=1)
                if column_ptr is not None:
                    column_positive = tl.sum(of_positives, axis=0)
                if K.negatives:
                    left_out = left_out | positive
            z = tl.where(left_out, NEG_INF, z)

        if K.sigmoid:
            total += tl.sum(_softplus(z), axis=1)
        else:
            new_m = tl.maximum(m, tl.max(z, axis=1))
            floor = finite_floor(new_m)
            u = z - floor[:, None]
            e = tl.exp2(u)
            shrink = tl.exp2(m - floor)
            if MEAN:
                moved = shrink * (weighted + (finite_floor(m) - floor) * total)
                moved = tl.where(total == 0.0, 0.0, moved)
                weighted = moved + tl.sum(tl.where(e == 0.0, 0.0, e * u), axis=1)
            total = total * shrink + tl.sum(e, axis=1)
            m = new_m
        if column_ptr is not None:
            column_m = tl.max(z, axis=0)
            column_e = tl.exp2(z - finite_floor(column_m)[None, :])
            field = tl.cast(n_row_tiles + 1, tl.int64) * p.n_keys
            out = column_ptr + tl.cast(local_tile + 1, tl.int64) * p.n_keys + cols
            inside = cols < p.n_keys
            tl.store(out, column_m, mask=inside)
            tl.store(out + field, tl.sum(column_e, axis=0), mask=inside)
            if POSITIVE:
                tl.store(out + 2 * field, column_positive, mask=inside)

    stored = rows < p.n_queries
    field = tl.cast(n_splits, tl.int64) * p.n_queries
    out = part_ptr + tl.cast(split, tl.int64) * p.n_queries + rows
    if K.sigmoid:
        tl.store(out, total * LN2, mask=stored)
    else:
        tl.store(out, m, mask=stored)
        tl.store(out + field, total, mask=stored)
        out += 2 * field
        if POSITIVE:
            tl.store(out, positives, mask=stored)
            out += field
        if MEAN:
            tl.store(out, weighted, mask=stored)


@triton.jit
def merge_pair_statistics_kernel(
    part_ptr,  # float32 [2 to 4][n_parts][n]: m, sum, then positive, then mean
    lse_ptr,  # float32 [n], or None: what was merged becomes part 0
    positive_ptr,  # float32 [n], with POSITIVE
    mean_ptr,  # float32 [n] or None
    n,
    n_parts,
    first_part,
    POSITIVE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    field = tl.cast(n_parts, tl.int64) * n
    m = tl.full((BLOCK,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    positives = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(first_part, n_parts, PARTS):
        parts = start + tl.arange(0, PARTS)
        loaded = (parts[:, None] < n_parts) & inside[None, :]
        ptrs = part_ptr + parts.to(tl.int64)[:, None] * n + at[None, :]
        part_m = tl.load(ptrs, mask=loaded, other=NEG_INF)
        part_total = tl.load(ptrs + field, mask=loaded, other=0.0)
        new_m = tl.maximum(m, tl.max(part_m, axis=0))
        floor = finite_floor(new_m)
        shrink = tl.exp2(m - floor)
        part_shrink = tl.exp2(part_m - floor[None, :])
        ptrs += 2 * field
        if POSITIVE:
            positives += tl.sum(tl.load(ptrs, mask=loaded, other=0.0), axis=0)
            ptrs += field
        if mean_ptr is not None:
            part_weighted = tl.load(ptrs, mask=loaded, other=0.0)
            part_shift = finite_floor(part_m) - floor[None, :]
            moved = part_shrink * (part_weighted + part_shift * part_total)
            own = shrink * (weighted + (finite_floor(m) - floor) * total)
            weighted = tl.where(total == 0.0, 0.0, own)
            weighted += tl.sum(tl.where(part_total == 0.0, 0.0, moved), axis=0)
        total = total * shrink + tl.sum(part_total * part_shrink, axis=0)
        m = new_m

    if lse_ptr is None:
        tl.store(part_ptr + at, m, mask=inside)
        tl.store(part_ptr + field + at, total, mask=inside)
        if POSITIVE:
            tl.store(part_ptr + 2 * field + at, positives, mask=inside)
    else:
        tl.store(lse_ptr + at, (finite_floor(m) + tl.log2(total)) * LN2, mask=inside)
        if POSITIVE:
            tl.store(positive_ptr + at, positives * LN2, mask=inside)
        if mean_ptr is not None:
            mean = (weighted / total + finite_floor(m)) * LN2
            tl.store(mean_ptr + at, tl.where(total == 0.0, 0.0, mean), mask=inside)


class PairStats(NamedTuple):
    """float32; of rows (N,), of columns (M,); None where not asked for, or always 0."""

    lse: torch.Tensor
    positive: torch.Tensor | None
    mean: torch.Tensor | None
    column_lse: torch.Tensor | None
    column_positive: torch.Tensor | None


def _merge(part: torch.Tensor, first_part: int, stats: tuple, positive: bool) -> None:
    """stats: (lse, positive, mean), or nothing for a result in part 0."""
    n = part.shape[2]
    lse, sums, mean = stats or (None, None, None)
    merge_pair_statistics_kernel[(cdiv(n, 64),)](
        part,
        lse,
        sums,
        mean,
        n,
        part.shape[1],
        first_part,
        POSITIVE=positive,
        PARTS=16,
        BLOCK=64,
        num_warps=4,
        **OPTIONS,
    )


def _launch_statistics(queries, keys, p, kind, c, splits, positive, mean, columns, after):
    """The row's parts; after(column parts, first, more) with each launch's where `columns`."""
    (n, d), m = queries.shape, keys.shape[0]
    tile = tile_of(c, queries)
    row_tiles, col_tiles = cdiv(n, c.block_m), cdiv(m, c.block_n)
    splits = splits or max(16, cdiv(FULL_GRID, row_tiles))
    per_split = cdiv(col_tiles, splits)
    splits = cdiv(col_tiles, per_split)
    fields = 1 if kind.sigmoid else 2 + positive + mean
    part = queries.new_empty((fields, splits, n), dtype=torch.float32)
    step, column_part = row_tiles, None
    if columns:
        step = min(row_tiles, max(1, COLUMN_BYTES // (4 * (2 + positive) * m) - 1))
    for first_tile in range(0, row_tiles, step):
        count = min(step, row_tiles - first_tile)
        if columns and (column_part is None or column_part.shape[1] != count + 1):
            before, column_part = (
                column_part,
                queries.new_empty((2 + positive, count + 1, m), dtype=torch.float32),
            )
            if before is not None:
                column_part[:, 0] = before[:, 0]
        pair_statistics_kernel[(count * splits,)](
            queries,
            keys,
            p,
            part,
            column_part,
            d,
            queries.stride(0),
            keys.stride(0),
            first_tile,
            count,
            splits,
            per_split,
            K=kind,
            C=tile,
            POSITIVE=positive,
            MEAN=mean,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
            **OPTIONS,
        )
        if columns:
            after(column_part, first_tile == 0, first_tile + count < row_tiles)
    return part


def pair_statistics(
    queries: torch.Tensor,
    keys: torch.Tensor,
    p: Pairs,
    kind: Kind,
    *,
    columns: bool = False,
    mean: bool = False,
    config: Config | None = None,
    splits: int | None = None,
) -> PairStats:
    """Softmax statistics of z_ij = scale_i q_i . k_j.

    Args:
        queries (N, D), keys (M, D): same dtype, last stride 1, at least one row of each.
        p, kind: which pairs count.
        columns, mean: whether those are wanted.
        config, splits: tiles, and number of parts of the keys (None: by shape).
    """
    check_pairs(queries, keys, p, kind)
    (n, d), m = queries.shape, keys.shape[0]
    positive = p.target is not None or kind.same == 1
    more = columns or mean or kind.same != 0 or d % 64 != 0
    c = config or launch.choose_config(
        "stats with more" if more else "stats", queries.dtype, d, n, queries.device
    )

    def results(count: int, mean: bool) -> tuple:
        return tuple(
            queries.new_empty(count, dtype=torch.float32) if wanted else None
            for wanted in (True, positive, mean)
        )

    rows = results(n, mean)
    of_columns = results(m, False) if columns else (None, None, None)

    def merge_columns(part: torch.Tensor, first: bool, more: bool) -> None:
        _merge(part, int(first), () if more else of_columns, positive)

    with device_guard(queries):
        part = _launch_statistics(
            queries, keys, p, kind, c, splits, positive, mean, columns, merge_columns
        )
        _merge(part, 0, rows, positive)
    return PairStats(*rows, *of_columns[:2])


def pair_softplus_sums(
    queries: torch.Tensor,
    keys: torch.Tensor,
    p: Pairs,
    kind: Kind,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """sum_j softplus(-+ (z_ij + bias)), (N,) in float32: minus for positive pairs.

    Args: as of pair_statistics; kind.sigmoid is set.
    """
    check_pairs(queries, keys, p, kind)
    n, d = queries.shape
    c = config or launch.choose_config("stats with more", queries.dtype, d, n, queries.device)
    with device_guard(queries):
        part = _launch_statistics(queries, keys, p, kind, c, splits, False, False, False, None)
    return part[0].sum(0)
