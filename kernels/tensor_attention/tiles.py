"""What the passes share: loads, where a program's tile lies, and one block of scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))

# ---------------------------------------------------------------------------------- small things


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    if C.WIDE:  # Triton's interpreter multiplies the bit patterns of bfloat16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=C.PRECISION)


@triton.jit
def times(a, b, C: tl.constexpr):
    """Of one type, rounded once: 16-bit numbers in one instruction for two."""
    if C.WIDE:
        return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)
    else:
        return a * b


@triton.jit
def width_of(width, W: tl.constexpr, EVEN: tl.constexpr):
    """`width`, as a constant where it is the padded one."""
    if EVEN:
        return W
    else:
        return width


@triton.jit
def load_rows(row_ptrs, width, W: tl.constexpr, EVEN: tl.constexpr):
    """Rows of `width` numbers, padded with zeros to W."""
    cols = tl.arange(0, W)[None, :]
    ptrs = row_ptrs[:, None] + cols
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=cols < width, other=0.0)


@triton.jit
def load_row(ptr, width, W: tl.constexpr, EVEN: tl.constexpr):
    cols = tl.arange(0, W)
    if EVEN:
        return tl.load(ptr + cols).to(tl.float32)
    else:
        return tl.load(ptr + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def store_rows(row_ptrs, values, inside, width, W: tl.constexpr):
    """Of the tensor's type; rows that are `inside`, without the padding of load_rows."""
    cols = tl.arange(0, W)[None, :]
    ptrs = row_ptrs[:, None] + cols
    mask = inside[:, None] & (cols < width)
    tl.store(ptrs, values.to(row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def finite_floor(m):
    # -inf - -inf is NaN: rows that are all -inf are measured from 0.
    return tl.where(m == NEG_INF, 0.0, m)


# ------------------------------------------------------------------------------------------ loops


class Walk(NamedTuple):
    """Blocks lo + t BLOCK of a loop: those with first <= t < last need no mask."""

    lo: Any
    first: Any
    last: Any
    end: Any  # number of blocks


@triton.jit
def walk(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Over [lo, hi); what lies in [full_lo, full_hi) is valid for all of the other side."""
    end = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    first = tl.minimum(tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK), end)
    last = tl.minimum(tl.maximum(tl.maximum(full_hi - lo, 0) // BLOCK, first), end)
    return Walk(lo, first, last, end)


@triton.jit
def phase_bounds(w, PHASE: tl.constexpr):
    """Which blocks: before (0), within (1) and after (2) those that need no mask."""
    if PHASE == 0:
        return 0, w.first
    elif PHASE == 1:
        return w.first, w.last
    else:
        return w.last, w.end


@triton.jit
def key_walk(x, p0, p1, BLOCK: tl.constexpr):
    """Over the keys of axis 2 in the union of the windows of positions p0 .. p1."""
    lo = tl.maximum(p0 - x.left2, 0)
    hi = tl.minimum(p1 + x.right2 + 1, x.n_2)
    full_lo = tl.maximum(p1 - x.left2, 0)
    full_hi = tl.minimum(p0 + x.right2 + 1, x.n_2)
    return walk(lo, hi, full_lo, full_hi, BLOCK)


@triton.jit
def split_range(lo, hi, split):
    """This program's part of [lo, hi), which programs of a split share."""
    per_split = tl.cdiv(tl.maximum(hi - lo, 0), tl.num_programs(1))
    lo += split * per_split
    return lo, tl.minimum(hi, lo + per_split)


@triton.jit
def first_axis_span(
    block, STEP: tl.constexpr, n_axis, back, ahead, n_q, n_1, q_offset, left1, right1
):
    """Positions [p_lo, p_hi] and keys [j_lo, j_hi) of axis 1 that meet a block of STEP indices.

    The block's indices are x = block STEP .. below n_axis; x meets positions x - back .. x + ahead.
    """
    p_lo = tl.maximum(block * STEP - back, q_offset)
    p_hi = tl.minimum(tl.minimum(block * STEP + STEP, n_axis) - 1 + ahead, q_offset + n_q - 1)
    j_lo = tl.maximum(p_lo - left1, 0)
    j_hi = tl.minimum(p_hi + right1 + 1, n_1)
    j_hi = tl.where(p_lo > p_hi, j_lo, tl.maximum(j_hi, j_lo))
    return p_lo, p_hi, j_lo, j_hi


# ------------------------------------------------------------------------------- tiles of queries


class Keys(NamedTuple):
    """Pointers to the rows of one key head."""

    k1: Any
    k2: Any
    v1: Any
    v2: Any


@triton.jit
def keys_of(x, key_head):
    return Keys(
        x.k1 + key_head * x.n_1 * x.d,
        x.k2 + key_head * x.n_2 * x.d,
        x.v1 + key_head * x.n_1 * x.dv,
        x.v2 + key_head * x.n_2 * x.dv,
    )


class Queries(NamedTuple):
    """BLOCK_M rows: a query each, or a query and a key of axis 1. Rows beyond the end repeat."""

    i: Any  # [BLOCK_M] query
    p: Any  # [BLOCK_M] position
    flat: Any  # [BLOCK_M] index of (batch, head, query)
    mask1_at: Any  # offset of the mask's row 0, per row or for all
    mask2_at: Any  # offset of the mask's row, per row (MASK2_ROWS) or for all
    key_head: Any
    p0: Any  # first and last position
    p1: Any


@triton.jit
def row_queries(x, tile, slab, C: tl.constexpr):
    """(Queries, rows before clamping, which are inside) of a row per query and packed head."""
    n_rows = x.n_q * C.PACK
    packs = x.n_heads // C.PACK
    batch = (slab // packs).to(tl.int64)
    head0 = slab % packs * C.PACK
    key_head = batch * (x.n_heads // C.GROUP) + head0 // C.GROUP

    row0 = tile * C.BLOCK_M
    rows = row0 + tl.arange(0, C.BLOCK_M)
    near_rows = tl.minimum(rows, n_rows - 1)
    i = near_rows // C.PACK
    head = head0 + near_rows % C.PACK
    head_64 = head.to(tl.int64)
    mask1_at = batch * x.stride_mask1_b + head_64 * x.stride_mask1_h
    if C.MASK2_ROWS:
        mask2_at = batch * x.stride_mask2_b + head_64 * x.stride_mask2_h
        mask2_at += i.to(tl.int64) * x.stride_mask2_row
    else:
        mask2_at = batch * x.stride_mask2_b + head0.to(tl.int64) * x.stride_mask2_h
    p0 = row0 // C.PACK + x.q_offset
    p1 = tl.minimum(row0 + C.BLOCK_M - 1, n_rows - 1) // C.PACK + x.q_offset
    flat = (batch * x.n_heads + head) * x.n_q + i
    queries = Queries(i, i + x.q_offset, flat, mask1_at, mask2_at, key_head, p0, p1)
    return queries, rows < n_rows


@triton.jit
def head_queries(x, batch, head, i, p0, p1, C: tl.constexpr):
    """Queries i, all of one batch and head, at positions p0 .. p1."""
    batch = batch.to(tl.int64)
    head_64 = head.to(tl.int64)
    key_head = batch * (x.n_heads // C.GROUP) + head // C.GROUP
    mask1_at = batch * x.stride_mask1_b + head_64 * x.stride_mask1_h
    mask2_at = batch * x.stride_mask2_b + head_64 * x.stride_mask2_h
    if C.MASK2_ROWS:
        mask2_at += i.to(tl.int64) * x.stride_mask2_row
    flat = (batch * x.n_heads + head) * x.n_q + i
    return Queries(i, i + x.q_offset, flat, mask1_at, mask2_at, key_head, p0, p1)


@triton.jit
def pair_queries(x, tile, slab, C: tl.constexpr, BLOCK_J: tl.constexpr):
    """Queries of rows (query BLOCK_J + key) of one (batch, head) `slab`."""
    BLOCK_I: tl.constexpr = C.BLOCK_M // BLOCK_J
    i0 = tile * BLOCK_I
    i = tl.minimum(i0 + tl.arange(0, C.BLOCK_M) // BLOCK_J, x.n_q - 1)
    p1 = tl.minimum(i0 + BLOCK_I, x.n_q) - 1 + x.q_offset
    return head_queries(x, slab // x.n_heads, slab % x.n_heads, i, i0 + x.q_offset, p1, C)


@triton.jit
def pair_keys(x, p, chunk, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr):
    """Key j of each row of (query, key) pairs, clamped, and whether the pair is valid."""
    j = tl.maximum(p - x.left1, 0) + chunk * BLOCK_J + tl.arange(0, BLOCK_M) % BLOCK_J
    valid = j <= tl.minimum(p + x.right1, x.n_1 - 1)
    return tl.maximum(tl.minimum(j, x.n_1 - 1), 0), valid


@triton.jit
def row_penalty(x, queries, j, C: tl.constexpr):
    """What a row adds to its logits at key j of axis 1: mask1 in units of log 2, -inf: invalid."""
    p = queries.p
    penalty = tl.zeros_like(p).to(tl.float32)
    if x.mask1 is not None:
        rows = x.mask1 + queries.mask1_at + queries.i.to(tl.int64) * x.stride_mask1_row
        penalty = tl.load(rows + j) * LOG2E
    if C.LIMITED:
        penalty = tl.where((j >= p - x.left1) & (j <= p + x.right1), penalty, NEG_INF)
    return penalty


# ------------------------------------------------------------------------------------ tiles of keys


class KeyTile(NamedTuple):
    """BLOCK_M keys of axis 2, which a program keeps. Keys beyond the end repeat the last one."""

    k0: Any
    last: Any
    k: Any  # [BLOCK_M], not clamped
    near: Any  # [BLOCK_M]
    k2: Any  # [BLOCK_M, D]
    v2: Any  # [BLOCK_M, DV]


@triton.jit
def key_tile(x, keys, block, C: tl.constexpr):
    k0 = block * C.BLOCK_M
    k = k0 + tl.arange(0, C.BLOCK_M)
    last = tl.minimum(k0 + C.BLOCK_M, x.n_2) - 1
    near = tl.minimum(k, last)
    k2 = load_rows(keys.k2 + near * width_of(x.d, C.D, C.EVEN_D), x.d, C.D, C.EVEN_D)
    v2 = load_rows(keys.v2 + near * x.dv, x.dv, C.DV, C.EVEN_DV)
    return KeyTile(k0, last, k, near, k2, v2)


FAR = tl.constexpr(2**30)


@triton.jit
def scores(a, x, queries, keys, k0, edge, C: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of a [BLOCK_M, D] and the keys of axis 2 from k0 on, windows at an `edge`;
    the keys' tile of K2, and which they are (clamped)."""
    EVEN: tl.constexpr = C.EVEN_N and not C.LIMITED
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    k = k0 + tl.arange(0, BLOCK_N)
    if EVEN:
        near = k
    else:
        near = tl.minimum(k, x.n_2 - 1)
    k2 = load_rows(keys.k2 + near * width_of(x.d, C.D, C.EVEN_D), x.d, C.D, C.EVEN_D)
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    s = dot(a, tl.trans(k2), s, C)
    if x.mask2 is not None:
        mask2 = x.mask2 + queries.mask2_at
        if C.MASK2_ROWS:
            s += tl.load(mask2[:, None] + near[None, :]) * LOG2E
        else:
            s += (tl.load(mask2 + near) * LOG2E)[None, :]
    if not EVEN:
        if edge:
            # One comparison of an unsigned difference: fewer registers than two bounds of each row.
            ahead = tl.where(k < x.n_2, k, FAR)[None, :] - (queries.p - x.left2)[:, None]
            s = tl.where(ahead.to(tl.uint32) <= x.left2 + x.right2, s, NEG_INF)
    return s, k2, near
