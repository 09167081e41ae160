"""The forward: by rows (T1, T2) or pairs (T3), and the merge of splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    NEG_INF,
    dot,
    finite_floor,
    key_block,
    key_walk,
    keys_of,
    load_row,
    load_rows,
    pair_keys,
    pair_queries,
    phase_bounds,
    row_penalty,
    row_queries,
    scores,
    split_range,
    store_rows,
)


@triton.jit
def _block(
    a,  # [BLOCK_M, D]
    m,  # this and the next two: running maximum, sum, weighted sum of V2
    total,
    o,
    penalty,  # [BLOCK_M] or None (0)
    x,
    queries,
    keys,
    k0,
    EDGE: tl.constexpr,
    C: tl.constexpr,
):
    k, near = key_block(x, k0, C.BLOCK_N, EDGE)
    k2 = load_rows(keys.k2 + near * x.d, x.d, C.D, C.EVEN_D)
    s = scores(a, k2, x, queries, k, near, EDGE, C)
    if penalty is None:
        new_m = tl.maximum(m, tl.max(s, axis=1))
        shift = finite_floor(new_m)
        e = tl.exp2(s - shift[:, None])
    else:
        new_m = tl.maximum(m, tl.max(s, axis=1) + penalty)
        shift = finite_floor(new_m)
        e = tl.exp2(s - (shift - penalty)[:, None])
    shrink = tl.exp2(m - shift)
    total = total * shrink + tl.sum(e, axis=1)
    v2 = load_rows(keys.v2 + near * x.dv, x.dv, C.DV, C.EVEN_DV)
    o = dot(e.to(v2.dtype), v2, o * shrink[:, None], C)
    return new_m, total, o


@triton.jit
def _attend(a, m, penalty, x, queries, keys, over, C: tl.constexpr):
    """Softmax attention of the rows `a` over K2, V2, from the running maximum m on."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    DV: tl.constexpr = C.DV
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, DV), tl.float32)
    for phase in tl.static_range(3):
        if phase == 1 or (C.LIMITED or (phase == 2 and not C.EVEN_N)):
            start, stop = phase_bounds(over, phase)
            for t in range(start, stop):
                k0 = over.lo + t * C.BLOCK_N
                m, total, o = _block(a, m, total, o, penalty, x, queries, keys, k0, phase != 1, C)
    return m, total, o


@triton.jit
def _finish(m, total):
    """1 / total (0 for rows without a valid triple) and lse."""
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    return inverse, tl.where(total == 0.0, NEG_INF, (m + tl.log2(total)) * LN2)


@triton.jit
def tensor_attention_fwd_rows_kernel(
    x,  # Inputs
    out_ptr,  # [splits, B, H, n_q, dv]
    lse_ptr,  # float32 [splits, B, H, n_q]
    total_rows,  # B H n_q
    C: tl.constexpr,  # Constants
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    DV: tl.constexpr = C.DV
    n_tiles = tl.cdiv(x.n_q * C.PACK, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tile = n_tiles - 1 - pid % n_tiles  # causal: the longest first
    queries, inside = row_queries(x, tile, pid // n_tiles, C)
    keys = keys_of(x, queries.key_head)
    q = load_rows(x.q + queries.flat * x.d, x.d, C.D, C.EVEN_D)
    j_lo = tl.maximum(queries.p0 - x.left1, 0)
    j_hi = tl.minimum(queries.p1 + x.right1 + 1, x.n_1)
    j_lo, j_hi = split_range(j_lo, j_hi, split)
    over = key_walk(x, queries.p0, queries.p1, C.BLOCK_N)

    m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    for j in range(j_lo, j_hi):
        k1 = load_row(keys.k1 + j * x.d, x.d, C.D, C.EVEN_D) * x.logit_scale
        a = (q.to(tl.float32) * k1[None, :]).to(q.dtype)
        penalty = row_penalty(x, queries, j, C)
        # One key's own sum starts at the running maximum: no block rescales `acc`.
        m_j, total_j, o = _attend(a, m, penalty, x, queries, keys, over, C)
        shrink = tl.exp2(m - finite_floor(m_j))
        total = total * shrink + total_j
        v1 = load_row(keys.v1 + j * x.dv, x.dv, DV, C.EVEN_DV)
        acc = acc * shrink[:, None] + o * v1[None, :]
        m = m_j

    inverse, lse = _finish(m, total)
    flat = queries.flat + split.to(tl.int64) * total_rows
    store_rows(out_ptr + flat * x.dv, acc * inverse[:, None], inside, x.dv, DV)
    tl.store(lse_ptr + flat, lse, mask=inside)


@triton.jit
def tensor_attention_fwd_pairs_kernel(
    x,  # as above
    out_ptr,
    lse_ptr,
    total_rows,
    C: tl.constexpr,
    BLOCK_J: tl.constexpr,  # divides BLOCK_M; row = query BLOCK_J + key
):
    DV: tl.constexpr = C.DV
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_I: tl.constexpr = BLOCK_M // BLOCK_J
    n_tiles = tl.cdiv(x.n_q, BLOCK_I)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tile = n_tiles - 1 - pid % n_tiles
    slab = pid // n_tiles
    queries = pair_queries(x, tile, slab, C, BLOCK_J)
    keys = keys_of(x, queries.key_head)
    i, p = queries.i, queries.p
    q = load_rows(x.q + queries.flat * x.d, x.d, C.D, C.EVEN_D)
    spans = tl.minimum(p + x.right1 + 1, x.n_1) - tl.maximum(p - x.left1, 0)
    chunks = tl.cdiv(tl.maximum(tl.max(spans, axis=0), 0), BLOCK_J)
    chunk_lo, chunk_hi = split_range(0, chunks, split)
    over = key_walk(x, queries.p0, queries.p1, C.BLOCK_N)

    m_i = tl.full((BLOCK_I,), NEG_INF, tl.float32)
    total_i = tl.zeros((BLOCK_I,), tl.float32)
    acc = tl.zeros((BLOCK_I, DV), tl.float32)
    for chunk in range(chunk_lo, chunk_hi):
        j, valid = pair_keys(x, p, chunk, BLOCK_J, BLOCK_M)
        k1 = load_rows(keys.k1 + j * x.d, x.d, C.D, C.EVEN_D)
        a = (q.to(tl.float32) * k1.to(tl.float32) * x.logit_scale).to(q.dtype)
        m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
        m, total, o = _attend(a, m, None, x, queries, keys, over, C)
        # The sum over the keys j of a query: rows of one softmax, weighted by v1_j.
        if x.mask1 is not None:
            rows = x.mask1 + queries.mask1_at + i.to(tl.int64) * x.stride_mask1_row
            m += tl.load(rows + j) * LOG2E
        m = tl.where(valid, m, NEG_INF)
        m_rows = tl.reshape(m, (BLOCK_I, BLOCK_J))
        new_m = tl.maximum(m_i, tl.max(m_rows, axis=1))
        shift = finite_floor(new_m)
        weight = tl.exp2(m_rows - shift[:, None])
        shrink = tl.exp2(m_i - shift)
        part = tl.sum(weight * tl.reshape(total, (BLOCK_I, BLOCK_J)), axis=1)
        total_i = total_i * shrink + part
        v1 = load_rows(keys.v1 + j * x.dv, x.dv, DV, C.EVEN_DV).to(tl.float32)
        o = o * v1 * tl.reshape(weight, (BLOCK_M,))[:, None]
        acc = acc * shrink[:, None] + tl.sum(tl.reshape(o, (BLOCK_I, BLOCK_J, DV)), axis=1)
        m_i = new_m

    inverse, lse = _finish(m_i, total_i)
    own = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    flat = slab.to(tl.int64) * x.n_q + split.to(tl.int64) * total_rows + own
    inside = own < x.n_q
    store_rows(out_ptr + flat * x.dv, acc * inverse[:, None], inside, x.dv, DV)
    tl.store(lse_ptr + flat, lse, mask=inside)


@triton.jit
def tensor_attention_merge_kernel(
    part_ptr,  # float32 [splits, rows, dv]
    part_lse_ptr,  # float32 [splits, rows]
    out_ptr,  # [rows, dv]
    lse_ptr,  # float32 [rows]
    total_rows,
    dv,
    n_splits,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < total_rows
    cols = tl.arange(0, DV)[None, :]
    m = tl.full((BLOCK_R,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, DV), tl.float32)
    for split in range(n_splits):
        at = tl.cast(split, tl.int64) * total_rows + rows
        part_m = tl.load(part_lse_ptr + at, mask=inside, other=NEG_INF) * LOG2E
        part = tl.load(
            part_ptr + (at * dv)[:, None] + cols, mask=inside[:, None] & (cols < dv), other=0.0
        )
        new_m = tl.maximum(m, part_m)
        shift = finite_floor(new_m)
        shrink, weight = tl.exp2(m - shift), tl.exp2(part_m - shift)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        m = new_m
    inverse, lse = _finish(m, total)
    store_rows(out_ptr + rows * dv, acc * inverse[:, None], inside, dv, DV)
    tl.store(lse_ptr + rows, lse, mask=inside)
