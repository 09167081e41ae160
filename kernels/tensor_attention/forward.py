"""The forward: by rows (T1, T2) or pairs (T3), and the merge of splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    NEG_INF,
    POS_INF,
    dot,
    finite_floor,
    key_walk,
    keys_of,
    load_row,
    load_rows,
    pair_keys,
    pair_queries,
    row_penalty,
    row_queries,
    scores,
    split_range,
    store_rows,
)

ROOM = tl.constexpr(2.0**60)  # what sums over one chunk may reach


@triton.jit
def _largest(a, x, queries, keys, over, exact, C: tl.constexpr):
    """Largest score of each row over all keys, or with exact = 0 over those next to the queries."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    near_lo = tl.maximum(tl.minimum(queries.p1 + 1, x.n_2) - BLOCK_N, over.lo)
    k_lo = tl.where(exact > 0, over.lo, near_lo)
    m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    for t in range(tl.where(exact > 0, over.end, tl.minimum(over.end, 1))):
        s, _, _ = scores(a, x, queries, keys, k_lo + t * BLOCK_N, True, C)
        m = tl.maximum(m, tl.max(s, axis=1))
    return m


@triton.jit
def _attend(a, shift, x, queries, keys, over, C: tl.constexpr):
    """Sums over K2 of exp2(scores - shift), and of these times V2."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    DV: tl.constexpr = C.DV
    total = tl.zeros((BLOCK_M,), tl.float32)
    o = tl.zeros((BLOCK_M, DV), tl.float32)
    for t in range(over.end):
        edge = (t < over.first) | (t >= over.last)
        s, _, near = scores(a, x, queries, keys, over.lo + t * C.BLOCK_N, edge, C)
        e = tl.exp2(s - shift[:, None])
        total += tl.sum(e, axis=1)
        v2 = load_rows(keys.v2 + near * x.dv, x.dv, DV, C.EVEN_DV)
        o = dot(e.to(v2.dtype), v2, o, C)
    return total, o


@triton.jit
def _failures(total, o, hidden, C: tl.constexpr):
    """How many rows or numbers show that the shift did not fit, but for rows that are hidden.

    A sum that is no less than one of its summands should be 2^0 is about that large; float16 needs
    probabilities not far below 1, the other types have their range.
    """
    least = 0.5 if C.LIFT > 0 else 1 / ROOM
    good = (total >= least) & (total < ROOM)
    # Not one axis after the other: on sm_100 Triton 3.6 cannot do that.
    failures = tl.sum(tl.where(good | hidden, 0, 1))
    return failures + tl.sum(tl.where(tl.abs(o) < POS_INF, 0, 1))


@triton.jit
def _finish(m, total):
    """1 / total (0 for rows without a valid triple) and lse."""
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    return inverse, tl.where(total == 0.0, NEG_INF, (m + tl.log2(total)) * LN2)


@triton.jit
def _sees(x, p, j_lo, j_hi):
    """Whether positions p have a key of axis 2 in their window, and one of axis 1 among these."""
    sees1 = (p - x.left1 < j_hi) & (p + x.right1 >= j_lo)
    return sees1 & (p - x.left2 < x.n_2) & (p + x.right2 >= 0)


@triton.jit
def _times(x, q, keys, j, C: tl.constexpr):
    """A of key j of axis 1, with the scale."""
    k1 = load_row(keys.k1 + j * x.d, x.d, C.D, C.EVEN_D) * x.logit_scale
    return (q.to(tl.float32) * k1[None, :]).to(q.dtype)


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

    hidden = ~_sees(x, queries.p, j_lo, j_hi)

    exact = 0  # whether true maxima are taken
    todo = 1
    while todo > 0:
        a = _times(x, q, keys, tl.minimum(j_lo, x.n_1 - 1), C)
        m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
        if exact == 0:
            m = finite_floor(_largest(a, x, queries, keys, over, 0, C))
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DV), tl.float32)
        for j in range(j_lo, j_hi):
            penalty = row_penalty(x, queries, j, C)
            if exact > 0:
                new_m = tl.maximum(m, _largest(a, x, queries, keys, over, 1, C) + penalty)
                shrink = tl.exp2(m - finite_floor(new_m))
                total *= shrink
                acc *= shrink[:, None]
                m = new_m
            total_j, o = _attend(a, finite_floor(m) - penalty, x, queries, keys, over, C)
            v1 = load_row(keys.v1 + j * x.dv, x.dv, DV, C.EVEN_DV)
            # From where summands of this j are above 1 on average, the next start at 1.
            grown = tl.maximum(tl.log2(total_j / (over.end * C.BLOCK_N)), 0.0)
            shrink = tl.exp2(-grown)
            total = (total + total_j) * shrink
            acc = (acc + o * v1[None, :]) * shrink[:, None]
            m += grown
            # What a loop carries is read from shared memory by the products, not from registers.
            a = _times(x, q, keys, tl.minimum(j + 1, x.n_1 - 1), C)
        todo = tl.where((exact > 0) | (_failures(total, acc, hidden, C) == 0), 0, 1)
        exact = 1
        if todo == 0:
            inverse, lse = _finish(m, total)
            flat = queries.flat + split.to(tl.int64) * total_rows
            store_rows(out_ptr + flat * x.dv, acc * inverse[:, None], inside, x.dv, DV)
            tl.store(lse_ptr + flat, lse, mask=inside)


@triton.jit
def _pairs(x, keys, i0, p, slab, chunk, C: tl.constexpr, BLOCK_J: tl.constexpr):
    """A: a row is q_i k1_j of a query and a key of the chunk, with the scale."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_I: tl.constexpr = BLOCK_M // BLOCK_J
    D: tl.constexpr = C.D
    i = tl.minimum(i0 + tl.arange(0, BLOCK_I), x.n_q - 1)
    q = load_rows(x.q + (slab.to(tl.int64) * x.n_q + i) * x.d, x.d, D, C.EVEN_D)
    j, _ = pair_keys(x, p, chunk, BLOCK_J, BLOCK_M)
    k1 = load_rows(keys.k1 + j * x.d, x.d, D, C.EVEN_D)
    a = tl.reshape(k1, (BLOCK_I, BLOCK_J, D)).to(tl.float32) * x.logit_scale
    return tl.reshape((a * q.to(tl.float32)[:, None, :]).to(q.dtype), (BLOCK_M, D))


@triton.jit
def _chunks(x, p, split, BLOCK_J: tl.constexpr):
    """This program's part of the chunks of BLOCK_J keys that positions p see."""
    spans = tl.minimum(p + x.right1 + 1, x.n_1) - tl.maximum(p - x.left1, 0)
    chunks = tl.cdiv(tl.maximum(tl.max(spans, axis=0), 0), BLOCK_J)
    return split_range(0, chunks, split)


@triton.jit
def _store_queries(
    x, out_ptr, lse_ptr, total_rows, tile, slab, split, m, total, acc, C: tl.constexpr
):
    BLOCK_I: tl.constexpr = acc.shape[0]
    inverse, lse = _finish(m, total)
    own = tile * BLOCK_I + tl.arange(0, BLOCK_I)
    flat = slab.to(tl.int64) * x.n_q + split.to(tl.int64) * total_rows + own
    inside = own < x.n_q
    store_rows(out_ptr + flat * x.dv, acc * inverse[:, None], inside, x.dv, C.DV)
    tl.store(lse_ptr + flat, lse, mask=inside)


@triton.jit
def tensor_attention_fwd_pairs_kernel(
    x,  # as above
    out_ptr,
    lse_ptr,
    total_rows,
    C: tl.constexpr,
    BLOCK_J: tl.constexpr,  # divides BLOCK_M; row = query BLOCK_J + key
    CHUNKS: tl.constexpr,  # whether a window may have more than BLOCK_J keys, or is in splits
):
    """What shifts the exponent is the maximum over few keys, and stays: no block rescales.

    Sums and probabilities have room for 2^60 times that. A chunk where it is not enough, or where a
    row sees none of those keys, is done again with the true maximum.
    """
    DV: tl.constexpr = C.DV
    D: tl.constexpr = C.D
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
    over = key_walk(x, queries.p0, queries.p1, C.BLOCK_N)

    m_i = tl.full((BLOCK_I,), NEG_INF, tl.float32)
    if CHUNKS:
        chunk, chunk_hi = _chunks(x, p, split, BLOCK_J)
        total_i = tl.zeros((BLOCK_I,), tl.float32)
        acc = tl.zeros((BLOCK_I, DV), tl.float32)
    else:
        chunk, chunk_hi = 0, 1
    exact = 0  # whether the true maximum is taken
    # What a loop carries is read from shared memory by the products, not from registers.
    a = _pairs(x, keys, tile * BLOCK_I, p, slab, chunk, C, BLOCK_J)
    while chunk < chunk_hi:
        shift = finite_floor(_largest(a, x, queries, keys, over, exact, C))
        total, o = _attend(a, shift, x, queries, keys, over, C)

        # The sum over the keys j of a query: rows of one softmax, weighted by v1_j.
        j, valid = pair_keys(x, p, chunk, BLOCK_J, BLOCK_M)
        m = tl.where(total == 0.0, NEG_INF, shift)
        if x.mask1 is not None:
            rows = x.mask1 + queries.mask1_at + i.to(tl.int64) * x.stride_mask1_row
            m += tl.load(rows + j) * LOG2E
        m = tl.where(valid, m, NEG_INF)
        m_rows = tl.reshape(m, (BLOCK_I, BLOCK_J))
        new_m = tl.maximum(m_i, tl.max(m_rows, axis=1))
        floor = finite_floor(new_m)
        weight = tl.exp2(m_rows - floor[:, None])
        part_total = tl.sum(weight * tl.reshape(total, (BLOCK_I, BLOCK_J)), axis=1)
        v1 = load_rows(keys.v1 + j * x.dv, x.dv, DV, C.EVEN_DV).to(tl.float32)
        o = o * v1 * tl.reshape(weight, (BLOCK_M,))[:, None]
        part = tl.sum(tl.reshape(o, (BLOCK_I, BLOCK_J, DV)), axis=1)
        bad = _failures(total, part, ~valid, C)
        if (bad == 0) | (exact > 0):
            if CHUNKS:
                shrink = tl.exp2(m_i - floor)
                total_i = total_i * shrink + part_total
                acc = acc * shrink[:, None] + part
                m_i = new_m
            else:
                _store_queries(
                    x, out_ptr, lse_ptr, total_rows, tile, slab, split, new_m, part_total, part, C
                )
            exact = 0
            chunk += 1
        else:
            exact = 1
        a = tl.zeros((BLOCK_M, D), x.q.dtype.element_ty)
        if chunk < chunk_hi:
            a = _pairs(x, keys, tile * BLOCK_I, p, slab, chunk, C, BLOCK_J)

    if CHUNKS:
        _store_queries(x, out_ptr, lse_ptr, total_rows, tile, slab, split, m_i, total_i, acc, C)


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
