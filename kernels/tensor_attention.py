"""Tensor attention by tiles: pairs of keys against queries, exact, O(n d) memory.

With s the scale, p = i + q_offset the position of query i, and valid pairs (per axis x = 1, 2)
p - left_x <= j_x <= p + right_x:

  S_ijk = s sum_l q_il k1_jl k2_kl + mask1_ij + mask2_ik     lse_i = log sum_jk exp S_ijk
  P_ijk = exp(S_ijk - lse_i)                                 out_i = sum_jk P_ijk v1_j * v2_k
  dP_ijk = sum_c dout_ic v1_jc v2_kc   dS = P (dP - delta_i)   delta_i = <dout_i, out_i> - dlse_i
  dq_i = s sum_jk dS k1_j * k2_k    dk1_j = s sum_ik dS q_i * k2_k    dv1_j = sum_ik P dout_i * v2_k
  (k2 and v2 the same with 1 and 2 exchanged)      dmask1_ij = sum_k dS      dmask2_ik = sum_j dS

The op is symmetric in its two key axes. The launchers exchange them so that axis 1, the one that
kernels take one key at a time or unroll into rows, is that with the smaller window; below, 1 and 2
are the axes after that. Axis 2 is walked in blocks: S = A K2^T with A = q_i * k1_j is an ordinary
product, and multiplications by k1_j, v1_j, ... wait until after the products where they can.

Who owns what. Forward:
  rows (T1; T2 with the query heads of a key head side by side in the rows): one program per tile of
    queries. It walks j one by one; for each it builds A = q * k1_j, runs softmax attention over K2,
    V2 and adds the result times v1_j to its own.
  pairs (T3): one program per few queries and all (or up to BLOCK_M) of their keys j; a row is a
    pair (i, j). Softmax attention without any extra work in its loop; v1_j and the sum over j come
    once, after it.
  choose_tiling() picks by the share of computed triples that are valid.
  Either may cut its range of j in `splits` parts for want of programs; merge adds them up in order.
Backward, two passes, nothing atomic, all sums in a fixed order, so the same inputs give the same
bits:
  rows: "kv", one program per block of axis 2, which keeps K2, V2, dK2, dV2 and walks j one by one
    and all queries for each: W = P^T dout and G = dS^T q give v1_j W -> dV2, k1_j G -> dK2, and
    their column sums with V2, K2 are this block's part of dv1_j, dk1_j, written to scratch and
    added up by a small kernel. "q", one program per tile of queries: X = dS K2, k1_j X -> dq.
    7 products.
  pairs: "kv" with rows (i, j) built in the loop: dS^T A -> dK2, P^T (dout v1_j) -> dV2. "q" as the
    forward: X = dS K2 -> dq, dk1 and Y = P V2 -> dv1; the sums over i of the program's few queries
    are one product with a matrix of zeros and ones. 8 products, but none of the per-key work of
    the form above, which narrow windows would not hide: it comes once per 32 queries there.
  masks: a kernel of 2 products per mask that wants a gradient; it owns [query tile, range of j].

Blocks without a valid triple are skipped: loops run over the union of the tile's windows. Only
blocks at the rim of a window, or the last of a length that BLOCK_N does not divide, are masked.
Validity and mask of (i, j) are one number per row, folded into the row's shift of the exponent.

FLOP, T valid triples per head: forward 4 T d; backward 14 T d (rows), 16 T d (pairs).
Memory per head: inputs, outputs, lse, delta; a splitted forward splits n_q (dv + 1) float32;
backward scratch n_2 / BLOCK_N times (n_1, or the window's span) (d + dv) float32 (rows), or
n_q / BI (span + BI - 1) (d + dv) (pairs), for as many heads at a time as fit SCRATCH_BYTES.
Traffic: a tile of M rows reads K2 and V2 once per j (rows) or once (pairs), from L2: M FLOP per
byte for 16-bit numbers, so 128 rows at 790 TFLOP/s would want 6.2 TB/s; DRAM sees little.

Numerics: products in the input's type, sums and softmax in float32; A is built in float32 and
rounded once, with s log2(e) in it, so exp is exp2 of a difference. lse is a natural logarithm.

Prediction (H200 at 790 TFLOP/s dense bf16; no device was at hand, nothing here is measured):
  windows 512 x 32, d = 128, bf16: 4 w1 w2 d = 8.4 MFLOP per query. Valid share of T3 tiles with 4
    queries and blocks of 64: 512 / 576 = 89 %, so 700 TFLOP/s useful at most. exp2 (16 per clock
    and multiprocessor) alone takes 0.5 of the products' time, other float32 work 0.4; with no more
    overlap than two programs per multiprocessor give, 330 to 430 useful. Backward 16/4 of the
    FLOP at about the same rate: 3.6 to 4.2 times the forward (the bound of 3.5 may be missed).
  full, n = 1024, d = 64: 275 GFLOP forward and 962 backward per head: 0.35 + 1.22 ms of products;
    3.2e9 exp2 take 0.87 ms, other float32 work 0.65 ms. 1.6 ms with full overlap, 3.1 ms with
    none; 2.3 ms needs about half of it.

Papers: arXiv 2310.04064 and 2405.16411 (tensor attention), 1909.00668 (2-simplicial attention);
head packing after 2507.02754. The tilings and the product counts are derived in the docs page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import FULL_GRID, cdiv, device_guard, dot_precision
from ._tensor_attention_table import TABLE, Config

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))

UNLIMITED = 2**29  # left or right of a window without bound
SCRATCH_BYTES = 32 * 2**20  # of the backward, as far as one head's scratch and a full grid allow

# --------------------------------------------------------------------------------------- kernels


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    if WIDE:  # Triton's interpreter multiplies the bit patterns of bfloat16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load_rows(row_ptrs, width, W: tl.constexpr, EVEN: tl.constexpr):
    """Rows of `width` numbers, padded with zeros to W."""
    cols = tl.arange(0, W)[None, :]
    ptrs = row_ptrs[:, None] + cols
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=cols < width, other=0.0)


@triton.jit
def _load_row(ptr, width, W: tl.constexpr, EVEN: tl.constexpr):
    cols = tl.arange(0, W)
    if EVEN:
        return tl.load(ptr + cols).to(tl.float32)
    else:
        return tl.load(ptr + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def _finite_floor(m):
    # -inf - -inf is NaN: rows that are all -inf are measured from 0.
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def _phases(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Blocks lo + t BLOCK of [lo, hi): those with first <= t < last lie in [full_lo, full_hi).

    Returns first, last and the number of blocks.
    """
    end = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    first = tl.minimum(tl.cdiv(tl.maximum(full_lo - lo, 0), BLOCK), end)
    last = tl.minimum(tl.maximum(tl.maximum(full_hi - lo, 0) // BLOCK, first), end)
    return first, last, end


@triton.jit
def _key_phases(p0, p1, left, right, n, BLOCK: tl.constexpr):
    """First key and phases of the union of the windows of positions p0 .. p1."""
    lo = tl.maximum(p0 - left, 0)
    hi = tl.minimum(p1 + right + 1, n)
    full_lo = tl.maximum(p1 - left, 0)
    full_hi = tl.minimum(p0 + right + 1, n)
    first, last, end = _phases(lo, hi, full_lo, full_hi, BLOCK)
    return lo, first, last, end


@triton.jit
def _first_axis_span(
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


@triton.jit
def _row_penalty(p, rows, j, left1, right1, stride_row, mask1_head, LIMITED: tl.constexpr):
    """What row i adds to its logits at key j of axis 1: mask1 in units of log 2, -inf: invalid."""
    penalty = tl.zeros_like(p).to(tl.float32)
    if mask1_head is not None:
        penalty = tl.load(mask1_head + rows.to(tl.int64) * stride_row + j) * LOG2E
    if LIMITED:
        penalty = tl.where((j >= p - left1) & (j <= p + right1), penalty, NEG_INF)
    return penalty


@triton.jit
def _scores(
    a,  # [BLOCK_M, D]
    k2,  # [BLOCK_N, D]
    p,  # [BLOCK_M] positions
    mask2_rows,  # [BLOCK_M] pointers to rows, one pointer (not MASK2_ROWS), or None
    k,  # [BLOCK_N], not clamped
    near,  # [BLOCK_N], clamped
    n_2,
    left2,
    right2,
    EDGE: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s = tl.zeros((a.shape[0], k2.shape[0]), tl.float32)
    s = _dot(a, tl.trans(k2), s, WIDE, PRECISION)
    if mask2_rows is not None:
        if MASK2_ROWS:
            s += tl.load(mask2_rows[:, None] + near[None, :]) * LOG2E
        else:
            s += (tl.load(mask2_rows + near) * LOG2E)[None, :]
    if EDGE:
        low = tl.maximum(p - left2, 0)[:, None]
        high = tl.minimum(p + right2, n_2 - 1)[:, None]
        s = tl.where((k[None, :] >= low) & (k[None, :] <= high), s, NEG_INF)
    return s


@triton.jit
def _forward_block(
    a,  # [BLOCK_M, D]
    m,  # this and the next two: running maximum, sum, weighted sum of V2
    total,
    o,
    penalty,  # [BLOCK_M] or None (0)
    p,
    mask2_rows,
    k2_head,
    v2_head,
    k0,
    n_2,
    d,
    dv,
    left2,
    right2,
    EDGE: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    k = k0 + tl.arange(0, BLOCK_N)
    near = k
    if EDGE:
        near = tl.minimum(k, n_2 - 1)
    k2 = _load_rows(k2_head + near * d, d, D, EVEN_D)
    s = _scores(
        a, k2, p, mask2_rows, k, near, n_2, left2, right2, EDGE, MASK2_ROWS, WIDE, PRECISION
    )
    if penalty is None:
        new_m = tl.maximum(m, tl.max(s, axis=1))
        shift = _finite_floor(new_m)
        e = tl.exp2(s - shift[:, None])
    else:
        new_m = tl.maximum(m, tl.max(s, axis=1) + penalty)
        shift = _finite_floor(new_m)
        e = tl.exp2(s - (shift - penalty)[:, None])
    shrink = tl.exp2(m - shift)
    total = total * shrink + tl.sum(e, axis=1)
    v2 = _load_rows(v2_head + near * dv, dv, DV, EVEN_DV)
    o = _dot(e.to(v2.dtype), v2, o * shrink[:, None], WIDE, PRECISION)
    return new_m, total, o


@triton.jit
def _finish(m, total):
    """1 / total (0 for rows without a valid triple) and lse."""
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    return inverse, tl.where(total == 0.0, NEG_INF, (m + tl.log2(total)) * LN2)


@triton.jit
def tensor_attention_fwd_rows_kernel(
    q_ptr,  # [B, H, n_q, d]; all tensors but the masks are contiguous
    k1_ptr,  # [B, H / GROUP, n_1, d]
    k2_ptr,  # [B, H / GROUP, n_2, d]
    v1_ptr,  # [B, H / GROUP, n_1, dv]
    v2_ptr,  # [B, H / GROUP, n_2, dv]
    mask1_ptr,  # float32 [B, H, n_q, n_1] by strides, last stride 1, or None
    mask2_ptr,  # float32 [B, H, n_q, n_2]
    out_ptr,  # [splits, B, H, n_q, dv]
    lse_ptr,  # float32 [splits, B, H, n_q]
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    total_rows,  # B H n_q
    logit_scale,  # s log2(e)
    GROUP: tl.constexpr,
    PACK: tl.constexpr,  # query heads side by side: 1 (T1) or GROUP (T2)
    LIMITED: tl.constexpr,  # any of left, right may exclude a key
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_rows = n_q * PACK
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tile = n_tiles - 1 - pid % n_tiles  # causal: the longest first
    packs = n_heads // PACK
    batch = (pid // n_tiles // packs).to(tl.int64)
    head0 = pid // n_tiles % packs * PACK
    key_head = batch * (n_heads // GROUP) + head0 // GROUP

    row0 = tile * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    # Rows beyond the end repeat the last one.
    near_rows = tl.minimum(rows, n_rows - 1)
    i = near_rows // PACK
    head = head0 + near_rows % PACK
    flat = (batch * n_heads + head) * n_q + i
    p = i + q_offset
    p0 = row0 // PACK + q_offset
    p1 = tl.minimum(row0 + BLOCK_M - 1, n_rows - 1) // PACK + q_offset

    k1_head = k1_ptr + key_head * n_1 * d
    v1_head = v1_ptr + key_head * n_1 * dv
    k2_head = k2_ptr + key_head * n_2 * d
    v2_head = v2_ptr + key_head * n_2 * dv
    mask1_head = None
    if mask1_ptr is not None:
        mask1_head = mask1_ptr + batch * stride_mask1_b + head.to(tl.int64) * stride_mask1_h
    mask2_rows = None
    if mask2_ptr is not None:
        if MASK2_ROWS:
            mask2_rows = (
                mask2_ptr
                + batch * stride_mask2_b
                + head.to(tl.int64) * stride_mask2_h
                + i.to(tl.int64) * stride_mask2_row
            )
        else:
            mask2_rows = mask2_ptr + batch * stride_mask2_b + head0.to(tl.int64) * stride_mask2_h

    q = _load_rows(q_ptr + flat * d, d, D, EVEN_D)
    j_lo = tl.maximum(p0 - left1, 0)
    j_hi = tl.minimum(p1 + right1 + 1, n_1)
    per_split = tl.cdiv(tl.maximum(j_hi - j_lo, 0), tl.num_programs(1))
    j_lo += split * per_split
    j_hi = tl.minimum(j_hi, j_lo + per_split)
    k_lo, first, last, end = _key_phases(p0, p1, left2, right2, n_2, BLOCK_N)

    m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    for j in range(j_lo, j_hi):
        k1 = _load_row(k1_head + j * d, d, D, EVEN_D) * logit_scale
        a = (q.to(tl.float32) * k1[None, :]).to(q.dtype)
        penalty = _row_penalty(p, i, j, left1, right1, stride_mask1_row, mask1_head, LIMITED)
        # One key's own sum starts at the running maximum: no block rescales `acc`.
        m_j = m
        total_j = tl.zeros((BLOCK_M,), tl.float32)
        o = tl.zeros((BLOCK_M, DV), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                start, stop = 0, first
            elif phase == 1:
                start, stop = first, last
            else:
                start, stop = last, end
            if phase == 1 or (LIMITED or (phase == 2 and not EVEN_N)):
                for t in range(start, stop):
                    m_j, total_j, o = _forward_block(
                        a,
                        m_j,
                        total_j,
                        o,
                        penalty,
                        p,
                        mask2_rows,
                        k2_head,
                        v2_head,
                        k_lo + t * BLOCK_N,
                        n_2,
                        d,
                        dv,
                        left2,
                        right2,
                        phase != 1,
                        MASK2_ROWS,
                        EVEN_D,
                        EVEN_DV,
                        D,
                        DV,
                        BLOCK_N,
                        WIDE,
                        PRECISION,
                    )
        shrink = tl.exp2(m - _finite_floor(m_j))
        total = total * shrink + total_j
        v1 = _load_row(v1_head + j * dv, dv, DV, EVEN_DV)
        acc = acc * shrink[:, None] + o * v1[None, :]
        m = m_j

    inverse, lse = _finish(m, total)
    flat += split.to(tl.int64) * total_rows
    cols = tl.arange(0, DV)[None, :]
    inside = rows < n_rows
    out_ptrs = out_ptr + (flat * dv)[:, None] + cols
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=inside[:, None] & (cols < dv))
    tl.store(lse_ptr + flat, lse, mask=inside)


@triton.jit
def _pair_keys(p, chunk, left1, right1, n_1, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr):
    """Key j of each row of (query, key) pairs, clamped, and whether the pair is valid."""
    j = tl.maximum(p - left1, 0) + chunk * BLOCK_J + tl.arange(0, BLOCK_M) % BLOCK_J
    valid = j <= tl.minimum(p + right1, n_1 - 1)
    return tl.maximum(tl.minimum(j, n_1 - 1), 0), valid


@triton.jit
def tensor_attention_fwd_pairs_kernel(
    q_ptr,  # as above
    k1_ptr,
    k2_ptr,
    v1_ptr,
    v2_ptr,
    mask1_ptr,
    mask2_ptr,
    out_ptr,
    lse_ptr,
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    total_rows,
    logit_scale,
    GROUP: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,  # divides BLOCK_M; row = query BLOCK_J + key
):
    BLOCK_I: tl.constexpr = BLOCK_M // BLOCK_J
    n_tiles = tl.cdiv(n_q, BLOCK_I)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tile = n_tiles - 1 - pid % n_tiles
    batch = (pid // n_tiles // n_heads).to(tl.int64)
    head = pid // n_tiles % n_heads
    key_head = batch * (n_heads // GROUP) + head // GROUP

    i0 = tile * BLOCK_I
    i = tl.minimum(i0 + tl.arange(0, BLOCK_M) // BLOCK_J, n_q - 1)
    flat0 = (batch * n_heads + head) * n_q
    p = i + q_offset
    p0 = i0 + q_offset
    p1 = tl.minimum(i0 + BLOCK_I, n_q) - 1 + q_offset

    k1_head = k1_ptr + key_head * n_1 * d
    v1_head = v1_ptr + key_head * n_1 * dv
    k2_head = k2_ptr + key_head * n_2 * d
    v2_head = v2_ptr + key_head * n_2 * dv
    head_64 = head.to(tl.int64)
    mask2_rows = None
    if mask2_ptr is not None:
        mask2_rows = mask2_ptr + batch * stride_mask2_b + head_64 * stride_mask2_h
        if MASK2_ROWS:
            mask2_rows += i.to(tl.int64) * stride_mask2_row

    q = _load_rows(q_ptr + (flat0 + i) * d, d, D, EVEN_D)
    spans = tl.minimum(p + right1 + 1, n_1) - tl.maximum(p - left1, 0)
    chunks = tl.cdiv(tl.maximum(tl.max(spans, axis=0), 0), BLOCK_J)
    per_split = tl.cdiv(chunks, tl.num_programs(1))
    chunk_lo = split * per_split
    k_lo, first, last, end = _key_phases(p0, p1, left2, right2, n_2, BLOCK_N)

    m_i = tl.full((BLOCK_I,), NEG_INF, tl.float32)
    total_i = tl.zeros((BLOCK_I,), tl.float32)
    acc = tl.zeros((BLOCK_I, DV), tl.float32)
    for chunk in range(chunk_lo, tl.minimum(chunks, chunk_lo + per_split)):
        j, valid = _pair_keys(p, chunk, left1, right1, n_1, BLOCK_J, BLOCK_M)
        k1 = _load_rows(k1_head + j * d, d, D, EVEN_D)
        a = (q.to(tl.float32) * k1.to(tl.float32) * logit_scale).to(q.dtype)
        m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        o = tl.zeros((BLOCK_M, DV), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                start, stop = 0, first
            elif phase == 1:
                start, stop = first, last
            else:
                start, stop = last, end
            if phase == 1 or (LIMITED or (phase == 2 and not EVEN_N)):
                for t in range(start, stop):
                    m, total, o = _forward_block(
                        a,
                        m,
                        total,
                        o,
                        None,
                        p,
                        mask2_rows,
                        k2_head,
                        v2_head,
                        k_lo + t * BLOCK_N,
                        n_2,
                        d,
                        dv,
                        left2,
                        right2,
                        phase != 1,
                        MASK2_ROWS,
                        EVEN_D,
                        EVEN_DV,
                        D,
                        DV,
                        BLOCK_N,
                        WIDE,
                        PRECISION,
                    )
        # The sum over the keys j of a query: rows of one softmax, weighted by v1_j.
        if mask1_ptr is not None:
            at = batch * stride_mask1_b + head_64 * stride_mask1_h
            m += tl.load(mask1_ptr + at + i.to(tl.int64) * stride_mask1_row + j) * LOG2E
        m = tl.where(valid, m, NEG_INF)
        m_rows = tl.reshape(m, (BLOCK_I, BLOCK_J))
        new_m = tl.maximum(m_i, tl.max(m_rows, axis=1))
        shift = _finite_floor(new_m)
        weight = tl.exp2(m_rows - shift[:, None])
        shrink = tl.exp2(m_i - shift)
        part = tl.sum(weight * tl.reshape(total, (BLOCK_I, BLOCK_J)), axis=1)
        total_i = total_i * shrink + part
        v1 = _load_rows(v1_head + j * dv, dv, DV, EVEN_DV).to(tl.float32)
        o = o * v1 * tl.reshape(weight, (BLOCK_M,))[:, None]
        acc = acc * shrink[:, None] + tl.sum(tl.reshape(o, (BLOCK_I, BLOCK_J, DV)), axis=1)
        m_i = new_m

    inverse, lse = _finish(m_i, total_i)
    queries = i0 + tl.arange(0, BLOCK_I)
    flat = flat0 + split.to(tl.int64) * total_rows + queries
    cols = tl.arange(0, DV)[None, :]
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    inside = (queries < n_q)[:, None] & (cols < dv)
    tl.store(out_ptr + (flat * dv)[:, None] + cols, out, mask=inside)
    tl.store(lse_ptr + flat, lse, mask=queries < n_q)


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
        shift = _finite_floor(new_m)
        shrink, weight = tl.exp2(m - shift), tl.exp2(part_m - shift)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        m = new_m
    inverse, lse = _finish(m, total)
    out = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (rows * dv)[:, None] + cols, out, mask=inside[:, None] & (cols < dv))
    tl.store(lse_ptr + rows, lse, mask=inside)


@triton.jit
def tensor_attention_bwd_rows_stats_kernel(
    out_ptr,  # [rows, dv]
    dout_ptr,  # [rows, dv]
    lse_ptr,  # float32 [rows]
    dlse_ptr,  # float32 [rows] or None
    shift_ptr,  # float32 [rows]: lse in units of log 2; +inf for rows without a valid triple
    delta_ptr,  # float32 [rows]: <dout, out> - dlse, 0 for those rows
    total_rows,
    dv,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < total_rows
    cols = tl.arange(0, DV)[None, :]
    at = (rows * dv)[:, None] + cols
    here = inside[:, None] & (cols < dv)
    out = tl.load(out_ptr + at, mask=here, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=here, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, axis=1)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=inside, other=0.0)
    empty = lse == NEG_INF
    tl.store(shift_ptr + rows, tl.where(empty, POS_INF, lse * LOG2E), mask=inside)
    tl.store(delta_ptr + rows, tl.where(empty, 0.0, delta), mask=inside)


@triton.jit
def _gradient_block(
    a,  # [BLOCK_M, D] q * k1 with the scale
    b,  # [BLOCK_M, DV] dout * v1
    shift,  # [BLOCK_M] lse less the row's penalty
    delta,  # [BLOCK_M]
    p,
    mask2_rows,
    k2_head,
    v2_head,
    k0,
    n_2,
    d,
    dv,
    left2,
    right2,
    EDGE: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P, dS and the tiles of K2 and V2."""
    k = k0 + tl.arange(0, BLOCK_N)
    near = k
    if EDGE:
        near = tl.minimum(k, n_2 - 1)
    k2 = _load_rows(k2_head + near * d, d, D, EVEN_D)
    v2 = _load_rows(v2_head + near * dv, dv, DV, EVEN_DV)
    s = _scores(
        a, k2, p, mask2_rows, k, near, n_2, left2, right2, EDGE, MASK2_ROWS, WIDE, PRECISION
    )
    prob = tl.exp2(s - shift[:, None])
    dp = tl.zeros((b.shape[0], BLOCK_N), tl.float32)
    dp = _dot(b, tl.trans(v2), dp, WIDE, PRECISION)
    return prob, prob * (dp - delta[:, None]), k2, v2


@triton.jit
def tensor_attention_bwd_q_rows_kernel(
    q_ptr,  # as in the forward
    k1_ptr,
    k2_ptr,
    v1_ptr,
    v2_ptr,
    mask1_ptr,
    mask2_ptr,
    dout_ptr,  # [B, H, n_q, dv]
    shift_ptr,  # float32 [B, H, n_q]
    delta_ptr,  # float32 [B, H, n_q]
    dq_ptr,  # [splits, B, H, n_q, d]
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    total_rows,
    logit_scale,
    scale,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n_rows = n_q * PACK
    n_tiles = tl.cdiv(n_rows, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tile = n_tiles - 1 - pid % n_tiles
    packs = n_heads // PACK
    batch = (pid // n_tiles // packs).to(tl.int64)
    head0 = pid // n_tiles % packs * PACK
    key_head = batch * (n_heads // GROUP) + head0 // GROUP

    row0 = tile * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    near_rows = tl.minimum(rows, n_rows - 1)
    i = near_rows // PACK
    head = head0 + near_rows % PACK
    flat = (batch * n_heads + head) * n_q + i
    p = i + q_offset
    p0 = row0 // PACK + q_offset
    p1 = tl.minimum(row0 + BLOCK_M - 1, n_rows - 1) // PACK + q_offset

    k1_head = k1_ptr + key_head * n_1 * d
    v1_head = v1_ptr + key_head * n_1 * dv
    k2_head = k2_ptr + key_head * n_2 * d
    v2_head = v2_ptr + key_head * n_2 * dv
    mask1_head = None
    if mask1_ptr is not None:
        mask1_head = mask1_ptr + batch * stride_mask1_b + head.to(tl.int64) * stride_mask1_h
    mask2_rows = None
    if mask2_ptr is not None:
        if MASK2_ROWS:
            mask2_rows = (
                mask2_ptr
                + batch * stride_mask2_b
                + head.to(tl.int64) * stride_mask2_h
                + i.to(tl.int64) * stride_mask2_row
            )
        else:
            mask2_rows = mask2_ptr + batch * stride_mask2_b + head0.to(tl.int64) * stride_mask2_h

    q = _load_rows(q_ptr + flat * d, d, D, EVEN_D)
    dout = _load_rows(dout_ptr + flat * dv, dv, DV, EVEN_DV)
    lse = tl.load(shift_ptr + flat)
    delta = tl.load(delta_ptr + flat)
    j_lo = tl.maximum(p0 - left1, 0)
    j_hi = tl.minimum(p1 + right1 + 1, n_1)
    per_split = tl.cdiv(tl.maximum(j_hi - j_lo, 0), tl.num_programs(1))
    j_lo += split * per_split
    j_hi = tl.minimum(j_hi, j_lo + per_split)
    k_lo, first, last, end = _key_phases(p0, p1, left2, right2, n_2, BLOCK_N)

    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for j in range(j_lo, j_hi):
        k1 = _load_row(k1_head + j * d, d, D, EVEN_D)
        v1 = _load_row(v1_head + j * dv, dv, DV, EVEN_DV)
        a = (q.to(tl.float32) * (k1 * logit_scale)[None, :]).to(q.dtype)
        b = (dout.to(tl.float32) * v1[None, :]).to(dout.dtype)
        shift = lse - _row_penalty(p, i, j, left1, right1, stride_mask1_row, mask1_head, LIMITED)
        x = tl.zeros((BLOCK_M, D), tl.float32)
        for phase in tl.static_range(3):
            if phase == 0:
                start, stop = 0, first
            elif phase == 1:
                start, stop = first, last
            else:
                start, stop = last, end
            if phase == 1 or (LIMITED or (phase == 2 and not EVEN_N)):
                for t in range(start, stop):
                    _, ds, k2, _ = _gradient_block(
                        a,
                        b,
                        shift,
                        delta,
                        p,
                        mask2_rows,
                        k2_head,
                        v2_head,
                        k_lo + t * BLOCK_N,
                        n_2,
                        d,
                        dv,
                        left2,
                        right2,
                        phase != 1,
                        MASK2_ROWS,
                        EVEN_D,
                        EVEN_DV,
                        D,
                        DV,
                        BLOCK_N,
                        WIDE,
                        PRECISION,
                    )
                    x = _dot(ds.to(k2.dtype), k2, x, WIDE, PRECISION)
        dq += x * k1[None, :]

    flat += split.to(tl.int64) * total_rows
    cols = tl.arange(0, D)[None, :]
    tl.store(
        dq_ptr + (flat * d)[:, None] + cols,
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=(rows < n_rows)[:, None] & (cols < d),
    )


@triton.jit
def tensor_attention_bwd_kv_rows_kernel(
    q_ptr,  # as in the forward
    k1_ptr,
    k2_ptr,
    v1_ptr,
    v2_ptr,
    mask1_ptr,
    mask2_ptr,
    dout_ptr,
    shift_ptr,
    delta_ptr,
    dk2_ptr,  # [splits, B, H / GROUP, n_2, d], used with WANT_K
    dv2_ptr,  # [splits, B, H / GROUP, n_2, dv], used with WANT_V
    part_k_ptr,  # float32 [heads of this launch, blocks, span, d]: parts of dk1
    part_v_ptr,  # float32 [heads of this launch, blocks, span, dv]: parts of dv1
    first_head,  # of this launch, among B H / GROUP
    span,
    total_keys,  # B H / GROUP n_2
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    logit_scale,
    scale,
    GROUP: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of axis 2
    BLOCK_N: tl.constexpr,  # rows: query GROUP + head of the group
):
    n_blocks = tl.cdiv(n_2, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    block = pid % n_blocks
    key_head = (pid // n_blocks + first_head).to(tl.int64)
    key_heads = n_heads // GROUP
    batch = key_head // key_heads
    head0 = key_head % key_heads * GROUP
    flat0 = (batch * n_heads + head0) * n_q

    k0 = block * BLOCK_M
    k = k0 + tl.arange(0, BLOCK_M)
    k_last = tl.minimum(k0 + BLOCK_M, n_2) - 1
    near_k = tl.minimum(k, k_last)
    inside = k < n_2
    k1_head = k1_ptr + key_head * n_1 * d
    v1_head = v1_ptr + key_head * n_1 * dv
    k2 = _load_rows(k2_ptr + key_head * n_2 * d + near_k * d, d, D, EVEN_D)
    v2 = _load_rows(v2_ptr + key_head * n_2 * dv + near_k * dv, dv, DV, EVEN_DV)
    if mask1_ptr is not None:
        mask1_ptr += batch * stride_mask1_b
    if mask2_ptr is not None:
        mask2_ptr += batch * stride_mask2_b

    p_lo, p_hi, j_lo, j_hi = _first_axis_span(
        block, BLOCK_M, n_2, right2, left2, n_q, n_1, q_offset, left1, right1
    )
    per_split = tl.cdiv(j_hi - j_lo, tl.num_programs(1))
    j_start = j_lo + split * per_split
    part_row = (pid.to(tl.int64) * span - j_lo).to(tl.int64)
    d_cols = tl.arange(0, D)
    dv_cols = tl.arange(0, DV)

    if WANT_K:
        dk2 = tl.zeros((BLOCK_M, D), tl.float32)
    if WANT_V:
        dv2 = tl.zeros((BLOCK_M, DV), tl.float32)
    for j in range(j_start, tl.minimum(j_hi, j_start + per_split)):
        k1 = _load_row(k1_head + j * d, d, D, EVEN_D)
        v1 = _load_row(v1_head + j * dv, dv, DV, EVEN_DV)
        a = (k2.to(tl.float32) * (k1 * logit_scale)[None, :]).to(k2.dtype)
        if WANT_K:
            b = (v2.to(tl.float32) * v1[None, :]).to(v2.dtype)
            g = tl.zeros((BLOCK_M, D), tl.float32)
        if WANT_V:
            w = tl.zeros((BLOCK_M, DV), tl.float32)
        # Queries with j in their window: an exact range. Not so for the block's keys k.
        i_lo = tl.maximum(p_lo, j - right1) - q_offset
        i_hi = tl.minimum(p_hi, j + left1) - q_offset + 1
        full_lo = tl.maximum(k_last - right2 - q_offset, i_lo)
        full_hi = tl.minimum(k0 + left2 - q_offset + 1, i_hi)
        row_lo = i_lo * GROUP
        row_hi = i_hi * GROUP
        first, last, end = _phases(row_lo, row_hi, full_lo * GROUP, full_hi * GROUP, BLOCK_N)
        for phase in tl.static_range(3):
            if phase == 0:
                start, stop = 0, first
            elif phase == 1:
                start, stop = first, last
            else:
                start, stop = last, end
            # Rows beyond the end need no masked tile: their shift is +inf.
            if phase != 0 or LIMITED:
                for t in range(start, stop):
                    rows = row_lo + t * BLOCK_N + tl.arange(0, BLOCK_N)
                    live = rows < row_hi
                    near = tl.minimum(rows, row_hi - 1)
                    i = near // GROUP
                    head = near % GROUP
                    flat = flat0 + head.to(tl.int64) * n_q + i
                    q = _load_rows(q_ptr + flat * d, d, D, EVEN_D)
                    dout = _load_rows(dout_ptr + flat * dv, dv, DV, EVEN_DV)
                    shift = tl.load(shift_ptr + flat, mask=live, other=POS_INF)
                    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    s = _dot(a, tl.trans(q), s, WIDE, PRECISION)
                    if mask1_ptr is not None:
                        at = (head0 + head) * stride_mask1_h + i.to(tl.int64) * stride_mask1_row
                        shift -= tl.load(mask1_ptr + at + j) * LOG2E
                    if mask2_ptr is not None:
                        if MASK2_ROWS:
                            at = (head0 + head) * stride_mask2_h + i.to(tl.int64) * stride_mask2_row
                            s += tl.load(mask2_ptr + at[None, :] + near_k[:, None]) * LOG2E
                        else:
                            at = head0 * stride_mask2_h + near_k
                            s += (tl.load(mask2_ptr + at) * LOG2E)[:, None]
                    if LIMITED and phase != 1:
                        p = (i + q_offset)[None, :]
                        kept = near_k[:, None]
                        s = tl.where((kept >= p - left2) & (kept <= p + right2), s, NEG_INF)
                    prob = tl.exp2(s - shift[None, :])
                    if WANT_V:
                        w = _dot(prob.to(dout.dtype), dout, w, WIDE, PRECISION)
                    if WANT_K:
                        delta = tl.load(delta_ptr + flat, mask=live, other=0.0)
                        dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                        dp = _dot(b, tl.trans(dout), dp, WIDE, PRECISION)
                        ds = prob * (dp - delta[None, :])
                        g = _dot(ds.to(q.dtype), q, g, WIDE, PRECISION)
        # Repeated rows beyond the end must not enter the column sums.
        if WANT_K:
            dk2 += g * k1[None, :]
            g *= k2.to(tl.float32)
            if not EVEN_N:
                g = tl.where(inside[:, None], g, 0.0)
            ptrs = part_k_ptr + (part_row + j) * d + d_cols
            tl.store(ptrs, tl.sum(g, axis=0), mask=d_cols < d)
        if WANT_V:
            dv2 += w * v1[None, :]
            w *= v2.to(tl.float32)
            if not EVEN_N:
                w = tl.where(inside[:, None], w, 0.0)
            ptrs = part_v_ptr + (part_row + j) * dv + dv_cols
            tl.store(ptrs, tl.sum(w, axis=0), mask=dv_cols < dv)

    flat_k = split.to(tl.int64) * total_keys + key_head * n_2 + k
    if WANT_K:
        tl.store(
            dk2_ptr + (flat_k * d)[:, None] + d_cols[None, :],
            (dk2 * scale).to(dk2_ptr.dtype.element_ty),
            mask=inside[:, None] & (d_cols < d)[None, :],
        )
    if WANT_V:
        tl.store(
            dv2_ptr + (flat_k * dv)[:, None] + dv_cols[None, :],
            dv2.to(dv2_ptr.dtype.element_ty),
            mask=inside[:, None] & (dv_cols < dv)[None, :],
        )


@triton.jit
def tensor_attention_parts_kernel(
    part_ptr,  # float32 [heads of this launch HEADS, n_blocks, span, width]
    out_ptr,  # [key heads of all launches, n_1, width]
    first_head,  # the first key head of this launch
    n_blocks,
    span,
    n_axis,
    back,  # this and the next: _first_axis_span
    ahead,
    n_q,
    n_1,
    width,
    q_offset,
    left1,
    right1,
    factor,
    HEADS: tl.constexpr,  # heads of parts that belong to one key head
    STEP: tl.constexpr,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Adds up the parts of dk1 or dv1, in the order of heads and blocks."""
    tiles = tl.cdiv(n_1, BLOCK_R)
    pid = tl.program_id(0)
    j0 = pid % tiles * BLOCK_R
    local = (pid // tiles).to(tl.int64)
    j = j0 + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, W)[None, :]
    # Blocks whose span may reach j0 .. j0 + BLOCK_R - 1.
    lo = tl.maximum(j0 - right1 - ahead, 0) // STEP
    hi = tl.minimum(tl.maximum(j0 + BLOCK_R - 1 + left1 + back, -1) // STEP + 1, n_blocks)
    acc = tl.zeros((BLOCK_R, W), tl.float32)
    for head in range(HEADS):
        for block in range(lo, hi):
            _, _, j_lo, j_hi = _first_axis_span(
                block, STEP, n_axis, back, ahead, n_q, n_1, q_offset, left1, right1
            )
            row = ((local * HEADS + head) * n_blocks + block) * span + (j - j_lo)
            here = ((j >= j_lo) & (j < j_hi))[:, None] & (cols < width)
            acc += tl.load(part_ptr + (row * width)[:, None] + cols, mask=here, other=0.0)
    out = out_ptr + (((local + first_head) * n_1 + j) * width)[:, None] + cols
    tl.store(
        out,
        (acc * factor).to(out_ptr.dtype.element_ty),
        mask=(j < n_1)[:, None] & (cols < width),
    )


@triton.jit
def tensor_attention_bwd_q_pairs_kernel(
    q_ptr,  # as in the forward
    k1_ptr,
    k2_ptr,
    v1_ptr,
    v2_ptr,
    mask1_ptr,
    mask2_ptr,
    dout_ptr,
    shift_ptr,
    delta_ptr,
    dq_ptr,  # [B, H, n_q, d]
    part_k_ptr,  # float32 [heads of this launch, tiles, span, d]: parts of dk1
    part_v_ptr,  # float32 [heads of this launch, tiles, span, dv]: parts of dv1
    first_head,  # of this launch, among B H
    span,
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    logit_scale,
    scale,
    GROUP: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,  # holds every window of axis 1
    SUM_ROWS: tl.constexpr,  # at least BLOCK_J + BLOCK_M / BLOCK_J - 1
):
    BLOCK_I: tl.constexpr = BLOCK_M // BLOCK_J
    n_tiles = tl.cdiv(n_q, BLOCK_I)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    local = pid // n_tiles
    batch = ((local + first_head) // n_heads).to(tl.int64)
    head = (local + first_head) % n_heads
    key_head = batch * (n_heads // GROUP) + head // GROUP

    i0 = tile * BLOCK_I
    row = tl.arange(0, BLOCK_M)
    i_row = i0 + row // BLOCK_J
    i = tl.minimum(i_row, n_q - 1)
    flat0 = (batch * n_heads + head) * n_q
    p = i + q_offset
    p0 = i0 + q_offset
    p1 = tl.minimum(i0 + BLOCK_I, n_q) - 1 + q_offset
    k2_head = k2_ptr + key_head * n_2 * d
    v2_head = v2_ptr + key_head * n_2 * dv
    head_64 = head.to(tl.int64)
    mask2_rows = None
    if mask2_ptr is not None:
        mask2_rows = mask2_ptr + batch * stride_mask2_b + head_64 * stride_mask2_h
        if MASK2_ROWS:
            mask2_rows += i.to(tl.int64) * stride_mask2_row

    j, valid = _pair_keys(p, 0, left1, right1, n_1, BLOCK_J, BLOCK_M)
    k1_rows = k1_ptr + key_head * n_1 * d + j * d
    q_rows = q_ptr + (flat0 + i) * d
    q = _load_rows(q_rows, d, D, EVEN_D)
    k1 = _load_rows(k1_rows, d, D, EVEN_D)
    a = (q.to(tl.float32) * k1.to(tl.float32) * logit_scale).to(q.dtype)
    dout = _load_rows(dout_ptr + (flat0 + i) * dv, dv, DV, EVEN_DV)
    v1 = _load_rows(v1_ptr + key_head * n_1 * dv + j * dv, dv, DV, EVEN_DV)
    b = (dout.to(tl.float32) * v1.to(tl.float32)).to(dout.dtype)
    # Repeated queries beyond the end count as invalid too.
    valid = valid & (i_row < n_q)
    shift = tl.load(shift_ptr + flat0 + i)
    if mask1_ptr is not None:
        at = batch * stride_mask1_b + head_64 * stride_mask1_h
        shift -= tl.load(mask1_ptr + at + i.to(tl.int64) * stride_mask1_row + j) * LOG2E
    shift = tl.where(valid, shift, POS_INF)
    delta = tl.load(delta_ptr + flat0 + i)
    k_lo, first, last, end = _key_phases(p0, p1, left2, right2, n_2, BLOCK_N)

    x = tl.zeros((BLOCK_M, D), tl.float32)
    if WANT_V:
        y = tl.zeros((BLOCK_M, DV), tl.float32)
    for phase in tl.static_range(3):
        if phase == 0:
            start, stop = 0, first
        elif phase == 1:
            start, stop = first, last
        else:
            start, stop = last, end
        if phase == 1 or (LIMITED or (phase == 2 and not EVEN_N)):
            for t in range(start, stop):
                prob, ds, k2, v2 = _gradient_block(
                    a,
                    b,
                    shift,
                    delta,
                    p,
                    mask2_rows,
                    k2_head,
                    v2_head,
                    k_lo + t * BLOCK_N,
                    n_2,
                    d,
                    dv,
                    left2,
                    right2,
                    phase != 1,
                    MASK2_ROWS,
                    EVEN_D,
                    EVEN_DV,
                    D,
                    DV,
                    BLOCK_N,
                    WIDE,
                    PRECISION,
                )
                x = _dot(ds.to(k2.dtype), k2, x, WIDE, PRECISION)
                if WANT_V:
                    y = _dot(prob.to(v2.dtype), v2, y, WIDE, PRECISION)

    d_cols = tl.arange(0, D)[None, :]
    dv_cols = tl.arange(0, DV)[None, :]
    k1 = _load_rows(k1_rows, d, D, EVEN_D).to(tl.float32)
    dq = tl.sum(tl.reshape(x * k1, (BLOCK_I, BLOCK_J, D)), axis=1) * scale
    queries = i0 + tl.arange(0, BLOCK_I)
    tl.store(
        dq_ptr + ((flat0 + queries) * d)[:, None] + d_cols,
        dq.to(dq_ptr.dtype.element_ty),
        mask=(queries < n_q)[:, None] & (d_cols < d),
    )
    if WANT_K or WANT_V:
        # Rows (i, j) of one j stand on a diagonal: their sum is a product with zeros and ones.
        _, _, j_lo, j_hi = _first_axis_span(
            tile, BLOCK_I, n_q, -q_offset, q_offset, n_q, n_1, q_offset, left1, right1
        )
        sums = tl.arange(0, SUM_ROWS)
        place = (pid.to(tl.int64) * span + sums)[:, None]
        stored = (sums < j_hi - j_lo)[:, None]
        pick = (sums[:, None] == (j - j_lo)[None, :]) & valid[None, :]
        pick = tl.where(pick, 1.0, 0.0)
    if WANT_K:
        z = x * _load_rows(q_rows, d, D, EVEN_D).to(tl.float32)
        z = tl.dot(pick, z, input_precision=SUM_PRECISION)
        tl.store(part_k_ptr + place * d + d_cols, z, mask=stored & (d_cols < d))
    if WANT_V:
        z = y * _load_rows(dout_ptr + (flat0 + i) * dv, dv, DV, EVEN_DV).to(tl.float32)
        z = tl.dot(pick, z, input_precision=SUM_PRECISION)
        tl.store(part_v_ptr + place * dv + dv_cols, z, mask=stored & (dv_cols < dv))


@triton.jit
def tensor_attention_bwd_kv_pairs_kernel(
    q_ptr,  # as in the forward
    k1_ptr,
    k2_ptr,
    v1_ptr,
    v2_ptr,
    mask1_ptr,
    mask2_ptr,
    dout_ptr,
    shift_ptr,
    delta_ptr,
    dk2_ptr,  # [B, H / GROUP, n_2, d], used with WANT_K
    dv2_ptr,  # [B, H / GROUP, n_2, dv], used with WANT_V
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    logit_scale,
    GROUP: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of axis 2
    BLOCK_N: tl.constexpr,  # pairs (i, j)
    BLOCK_J: tl.constexpr,  # holds every window of axis 1
):
    BLOCK_I: tl.constexpr = BLOCK_N // BLOCK_J
    n_blocks = tl.cdiv(n_2, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % n_blocks
    key_head = (pid // n_blocks).to(tl.int64)
    key_heads = n_heads // GROUP
    batch = key_head // key_heads
    k0 = block * BLOCK_M
    k = k0 + tl.arange(0, BLOCK_M)
    k_last = tl.minimum(k0 + BLOCK_M, n_2) - 1
    near_k = tl.minimum(k, k_last)
    k1_head = k1_ptr + key_head * n_1 * d
    v1_head = v1_ptr + key_head * n_1 * dv
    k2 = _load_rows(k2_ptr + key_head * n_2 * d + near_k * d, d, D, EVEN_D)
    v2 = _load_rows(v2_ptr + key_head * n_2 * dv + near_k * dv, dv, DV, EVEN_DV)

    p_lo, p_hi, _, _ = _first_axis_span(
        block, BLOCK_M, n_2, right2, left2, n_q, n_1, q_offset, left1, right1
    )
    i_lo = p_lo - q_offset
    i_hi = p_hi - q_offset + 1
    first, last, end = _phases(
        i_lo,
        i_hi,
        tl.maximum(k_last - right2 - q_offset, i_lo),
        tl.minimum(k0 + left2 - q_offset + 1, i_hi),
        BLOCK_I,
    )
    if WANT_K:
        dk2 = tl.zeros((BLOCK_M, D), tl.float32)
    if WANT_V:
        dv2 = tl.zeros((BLOCK_M, DV), tl.float32)
    for member in range(GROUP):
        head = key_head % key_heads * GROUP + member
        flat0 = (batch * n_heads + head) * n_q
        for phase in tl.static_range(3):
            if phase == 0:
                start, stop = 0, first
            elif phase == 1:
                start, stop = first, last
            else:
                start, stop = last, end
            if phase != 0 or LIMITED:
                for t in range(start, stop):
                    i = i_lo + t * BLOCK_I + tl.arange(0, BLOCK_N) // BLOCK_J
                    live = i < i_hi
                    i = tl.minimum(i, i_hi - 1)
                    p = i + q_offset
                    j, valid = _pair_keys(p, 0, left1, right1, n_1, BLOCK_J, BLOCK_N)
                    q = _load_rows(q_ptr + (flat0 + i) * d, d, D, EVEN_D).to(tl.float32)
                    k1 = _load_rows(k1_head + j * d, d, D, EVEN_D).to(tl.float32)
                    a = (q * k1 * logit_scale).to(k2.dtype)
                    dout = _load_rows(dout_ptr + (flat0 + i) * dv, dv, DV, EVEN_DV)
                    v1 = _load_rows(v1_head + j * dv, dv, DV, EVEN_DV)
                    b = (dout.to(tl.float32) * v1.to(tl.float32)).to(v2.dtype)
                    shift = tl.load(shift_ptr + flat0 + i)
                    if mask1_ptr is not None:
                        at = batch * stride_mask1_b + head * stride_mask1_h
                        at += i.to(tl.int64) * stride_mask1_row
                        shift -= tl.load(mask1_ptr + at + j) * LOG2E
                    shift = tl.where(live & valid, shift, POS_INF)
                    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    s = _dot(k2, tl.trans(a), s, WIDE, PRECISION)
                    if mask2_ptr is not None:
                        at = batch * stride_mask2_b + head * stride_mask2_h
                        if MASK2_ROWS:
                            at += i.to(tl.int64) * stride_mask2_row
                            s += tl.load(mask2_ptr + at[None, :] + near_k[:, None]) * LOG2E
                        else:
                            s += (tl.load(mask2_ptr + at + near_k) * LOG2E)[:, None]
                    if LIMITED and phase != 1:
                        kept = near_k[:, None]
                        low = (p - left2)[None, :]
                        high = (p + right2)[None, :]
                        s = tl.where((kept >= low) & (kept <= high), s, NEG_INF)
                    prob = tl.exp2(s - shift[None, :])
                    if WANT_V:
                        dv2 = _dot(prob.to(b.dtype), b, dv2, WIDE, PRECISION)
                    if WANT_K:
                        delta = tl.load(delta_ptr + flat0 + i)
                        dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                        dp = _dot(v2, tl.trans(b), dp, WIDE, PRECISION)
                        ds = prob * (dp - delta[None, :])
                        dk2 = _dot(ds.to(a.dtype), a, dk2, WIDE, PRECISION)

    flat_k = key_head * n_2 + k
    inside = (k < n_2)[:, None]
    if WANT_K:
        cols = tl.arange(0, D)[None, :]
        tl.store(
            dk2_ptr + (flat_k * d)[:, None] + cols,
            (dk2 * LN2).to(dk2_ptr.dtype.element_ty),  # a holds s log2(e)
            mask=inside & (cols < d),
        )
    if WANT_V:
        cols = tl.arange(0, DV)[None, :]
        tl.store(
            dv2_ptr + (flat_k * dv)[:, None] + cols,
            dv2.to(dv2_ptr.dtype.element_ty),
            mask=inside & (cols < dv),
        )


@triton.jit
def tensor_attention_bwd_mask_kernel(
    q_ptr,  # as in the forward
    k1_ptr,
    k2_ptr,
    v1_ptr,
    v2_ptr,
    mask1_ptr,
    mask2_ptr,
    dout_ptr,
    shift_ptr,
    delta_ptr,
    dmask_ptr,  # float32 [mask1's B, mask1's H, n_q, n_1], zeros on entry
    mask_heads,  # 1 or n_heads
    batches,  # this and the next: how many of either share one mask
    heads,
    n_q,
    n_1,
    n_2,
    d,
    dv,
    n_heads,
    stride_mask1_b,
    stride_mask1_h,
    stride_mask1_row,
    stride_mask2_b,
    stride_mask2_h,
    stride_mask2_row,
    q_offset,
    left1,
    right1,
    left2,
    right2,
    logit_scale,
    GROUP: tl.constexpr,
    LIMITED: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    MASK2_ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,  # of axis 1, per program
):
    """dmask1; called with the axes exchanged it gives dmask2.

    Heads and batches that share the mask are added up by the program that owns the result.
    """
    n_tiles = tl.cdiv(n_q, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    slab = pid // n_tiles
    batch0 = slab // mask_heads
    head0 = slab % mask_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.minimum(rows, n_q - 1)
    p = i + q_offset
    p0 = tile * BLOCK_M + q_offset
    p1 = tl.minimum(tile * BLOCK_M + BLOCK_M, n_q) - 1 + q_offset
    j_lo = tl.maximum(tl.program_id(1) * KEYS, p0 - left1)
    j_hi = tl.minimum(tl.minimum(tl.program_id(1) * KEYS + KEYS, n_1), p1 + right1 + 1)
    k_lo, first, last, end = _key_phases(p0, p1, left2, right2, n_2, BLOCK_N)
    out = dmask_ptr + (slab.to(tl.int64) * n_q + i) * n_1
    for j in range(j_lo, j_hi):
        acc = tl.zeros((BLOCK_M,), tl.float32)
        for member in range(batches * heads):
            batch = (batch0 + member // heads).to(tl.int64)
            head = (head0 + member % heads).to(tl.int64)
            flat = (batch * n_heads + head) * n_q + i
            key_head = batch * (n_heads // GROUP) + head // GROUP
            q = _load_rows(q_ptr + flat * d, d, D, EVEN_D)
            dout = _load_rows(dout_ptr + flat * dv, dv, DV, EVEN_DV)
            k1 = _load_row(k1_ptr + (key_head * n_1 + j) * d, d, D, EVEN_D)
            v1 = _load_row(v1_ptr + (key_head * n_1 + j) * dv, dv, DV, EVEN_DV)
            a = (q.to(tl.float32) * (k1 * logit_scale)[None, :]).to(q.dtype)
            b = (dout.to(tl.float32) * v1[None, :]).to(dout.dtype)
            mask1_head = None
            if mask1_ptr is not None:
                mask1_head = mask1_ptr + batch * stride_mask1_b + head * stride_mask1_h
            mask2_rows = None
            if mask2_ptr is not None:
                mask2_rows = mask2_ptr + batch * stride_mask2_b + head * stride_mask2_h
                if MASK2_ROWS:
                    mask2_rows += i.to(tl.int64) * stride_mask2_row
            shift = tl.load(shift_ptr + flat)
            shift -= _row_penalty(p, i, j, left1, right1, stride_mask1_row, mask1_head, LIMITED)
            delta = tl.load(delta_ptr + flat)
            for phase in tl.static_range(3):
                if phase == 0:
                    start, stop = 0, first
                elif phase == 1:
                    start, stop = first, last
                else:
                    start, stop = last, end
                if phase == 1 or (LIMITED or (phase == 2 and not EVEN_N)):
                    for t in range(start, stop):
                        _, ds, _, _ = _gradient_block(
                            a,
                            b,
                            shift,
                            delta,
                            p,
                            mask2_rows,
                            k2_ptr + key_head * n_2 * d,
                            v2_ptr + key_head * n_2 * dv,
                            k_lo + t * BLOCK_N,
                            n_2,
                            d,
                            dv,
                            left2,
                            right2,
                            phase != 1,
                            MASK2_ROWS,
                            EVEN_D,
                            EVEN_DV,
                            D,
                            DV,
                            BLOCK_N,
                            WIDE,
                            PRECISION,
                        )
                        acc += tl.sum(ds, axis=1)
        tl.store(out + j, acc, mask=rows < n_q)


# ------------------------------------------------------------------------------------- launchers

_OPTIONS = {"enable_fp_fusion": True}  # said aloud: its default changes in Triton 3.10
_MAX_LENGTH = 2**28  # sums of a few lengths and UNLIMITED stay below 2^31


class _Problem(NamedTuple):
    """The tensors after checks, bias and exchange of the axes (on top of this file)."""

    q: torch.Tensor
    k1: torch.Tensor
    k2: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor
    mask1: torch.Tensor | None
    mask2: torch.Tensor | None
    scale: float
    q_offset: int
    limits: tuple[int, int, int, int]  # left1, right1, left2, right2
    swapped: bool

    @property
    def group(self) -> int:
        return self.q.shape[1] // max(1, self.k1.shape[1])

    @property
    def spans(self) -> tuple[int, int]:
        """Most keys of either axis that one query meets."""
        left1, right1, left2, right2 = self.limits
        n_1, n_2 = self.k1.shape[2], self.k2.shape[2]
        return min(n_1, left1 + right1 + 1), min(n_2, left2 + right2 + 1)

    @property
    def empty(self) -> bool:
        """No triple at all."""
        return 0 in (self.q.numel(), self.k1.numel(), self.k2.numel())

    def exchanged(self) -> _Problem:
        left1, right1, left2, right2 = self.limits
        return self._replace(
            k1=self.k2,
            k2=self.k1,
            v1=self.v2,
            v2=self.v1,
            mask1=self.mask2,
            mask2=self.mask1,
            limits=(left2, right2, left1, right1),
            swapped=not self.swapped,
        )

    def arguments(self, pack: int, block_n: int | None) -> dict[str, Any]:
        """What all kernels take. pack: query heads side by side; block_n: of axis 2."""
        q, k1, k2, v1, v2 = self[:5]
        d, dv = q.shape[3], v1.shape[3]
        left1, right1, left2, right2 = self.limits
        strides1, strides2 = _mask_strides(self.mask1), _mask_strides(self.mask2)
        width, v_width = _padded(d), _padded(dv)
        arguments = {
            "q_ptr": q,
            "k1_ptr": k1,
            "k2_ptr": k2,
            "v1_ptr": v1,
            "v2_ptr": v2,
            "mask1_ptr": self.mask1,
            "mask2_ptr": self.mask2,
            "n_q": q.shape[2],
            "n_1": k1.shape[2],
            "n_2": k2.shape[2],
            "d": d,
            "dv": dv,
            "n_heads": q.shape[1],
            "stride_mask1_b": strides1[0],
            "stride_mask1_h": strides1[1],
            "stride_mask1_row": strides1[2],
            "stride_mask2_b": strides2[0],
            "stride_mask2_h": strides2[1],
            "stride_mask2_row": strides2[2],
            "q_offset": self.q_offset,
            "left1": left1,
            "right1": right1,
            "left2": left2,
            "right2": right2,
            "logit_scale": self.scale * math.log2(math.e),
            "GROUP": self.group,
            "LIMITED": min(self.limits) < UNLIMITED,
            "EVEN_D": width == d,
            "EVEN_DV": v_width == dv,
            # Heads side by side may have rows of their own.
            "MASK2_ROWS": strides2[2] != 0 or (pack > 1 and strides2[1] != 0),
            "WIDE": not q.is_cuda and q.dtype == torch.bfloat16,
            "PRECISION": dot_precision(q.dtype),
            "D": width,
            "DV": v_width,
            **_OPTIONS,
        }
        if block_n is not None:
            arguments["EVEN_N"] = k2.shape[2] % block_n == 0
        return arguments


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, head and row, 0 where the mask is repeated."""
    if mask is None:
        return 0, 0, 0
    b, h, row = (mask.stride(k) if mask.shape[k] > 1 else 0 for k in range(3))
    return b, h, row


def _window(w: int | None, causal: bool) -> tuple[int, int]:
    if w is not None and w != -1 and w < 1:
        raise ValueError(f"windows must be positive, got {w}")
    left = UNLIMITED if w is None or w == -1 or w > UNLIMITED else w - 1
    return left, 0 if causal else left


def _problem(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None,
    mask2: torch.Tensor | None,
    scale: float,
    causal: bool,
    w1: int | None,
    w2: int | None,
    q_offset: int,
    kv_bias: tuple[float, float],
) -> _Problem:
    named = {"q": q, "k1": k1, "k2": k2, "v1": v1, "v2": v2}
    for name, t in named.items():
        if t.dim() != 4:
            raise ValueError(f"{name} needs 4 dimensions, got shape {tuple(t.shape)}")
        if t.dtype != q.dtype:
            raise TypeError(f"q and {name} need one dtype, got {q.dtype} and {t.dtype}")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the Triton kernels take float32, bfloat16 and float16, got {q.dtype}")
    (b, h, n_q, d), (_, kv_heads, n_1, _), dv = q.shape, k1.shape, v1.shape[3]
    n_2 = k2.shape[2]
    for name, want in (
        ("k1", (b, kv_heads, n_1, d)),
        ("k2", (b, kv_heads, n_2, d)),
        ("v1", (b, kv_heads, n_1, dv)),
        ("v2", (b, kv_heads, n_2, dv)),
    ):
        if tuple(named[name].shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(named[name].shape)}")
    if h and (kv_heads == 0 or h % kv_heads):
        raise ValueError(f"q has {h} heads, k1 {kv_heads}, which does not divide them")
    if max(d, dv) > 256:
        raise ValueError(f"head dimensions up to 256, got d = {d}, dv = {dv}")
    if (
        max(n_q, n_1, n_2, abs(q_offset)) >= _MAX_LENGTH
        or max(n_q * max(1, h), max(n_1, n_2) * max(d, dv)) >= 2**31
    ):
        raise ValueError(f"lengths {n_q}, {n_1}, {n_2} or q_offset {q_offset} are too large")
    masks = []
    for name, mask, n in (("mask1", mask1, n_1), ("mask2", mask2, n_2)):
        if mask is not None:
            full = (b, h, n_q, n)
            if mask.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {mask.dtype}")
            if mask.dim() != 4 or any(
                m != f and (m != 1 or at == 3) for at, (m, f) in enumerate(zip(mask.shape, full))
            ):
                raise ValueError(f"{name} {tuple(mask.shape)} does not broadcast to {full}")
            if n > 1 and mask.stride(3) != 1:
                mask = mask.contiguous()
        masks.append(mask)
    bias_k, bias_v = kv_bias
    p = _Problem(
        q.contiguous(),
        k1.contiguous(),
        # Rounded to the input's type, as the product's operand would be anyway.
        (k2 + bias_k if bias_k else k2).contiguous(),
        v1.contiguous(),
        (v2 + bias_v if bias_v else v2).contiguous(),
        *masks,
        float(scale),
        q_offset,
        _window(w1, causal) + _window(w2, causal),
        False,
    )
    return p.exchanged() if p.spans[1] < p.spans[0] else p


def choose_config(kernel: str, p_dtype: torch.dtype, d: int, dv: int, device: Any) -> Config:
    """Tiles of `kernel`, a name of the table."""
    kind = "half" if p_dtype.itemsize == 2 else dot_precision(p_dtype)
    config = TABLE[kernel, kind, max(64, _padded(max(d, dv)))]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in (
        (8, 6),
        (8, 9),
        (12, 0),
        (12, 1),
    ):
        # 99 KiB of shared memory instead of 163 or more.
        config = config._replace(num_stages=1, block_n=max(16, config.block_n // 2))
    return config


class Cost(NamedTuple):
    """Share of the computed triples that are valid, if windows only limit them."""

    rows: float
    packed: float
    pairs: float


def valid_share(p: _Problem, rows: Config, pairs: Config) -> Cost:
    n_q, n_1, n_2 = p.q.shape[2], p.k1.shape[2], p.k2.shape[2]
    span1, span2 = p.spans

    def share(queries: float, rows: int, keys: int, c: Config) -> float:
        """Tiles of `queries` queries in c.block_m rows, `keys` keys of axis 1 one after another."""
        span = min(n_2, span2 + math.ceil(min(queries, n_q)) - 1)
        computed = cdiv(rows, c.block_m) * c.block_m * keys * cdiv(span, c.block_n) * c.block_n
        return rows * span1 * span2 / computed

    def by_rows(pack: int) -> float:
        queries = max(1.0, rows.block_m / pack)
        keys = min(n_1, span1 + math.ceil(min(queries, n_q)) - 1)
        return share(queries, n_q * pack, keys, rows)

    block_j = min(pairs.block_m, triton.next_power_of_2(span1))
    used = span1 / (cdiv(span1, block_j) * block_j)  # of the keys' rows
    by_pairs = share(pairs.block_m // block_j, n_q * block_j, span1, pairs) * used
    return Cost(by_rows(1), by_rows(p.group), by_pairs)


def choose_tiling(p: _Problem, rows: Config, pairs: Config) -> str:
    """Picks "rows" (T1), "packed" (T2) or "pairs" (T3), by the share of valid triples.

    Heads that share keys are always packed: the windows of a tile's rows then differ less. Pairs
    lose half a share in ten to rows: they gather their rows and add them up at the end.
    """
    cost = valid_share(p, rows, pairs)
    by_rows = "packed" if p.group > 1 else "rows"
    return "pairs" if 0.95 * cost.pairs > getattr(cost, by_rows) else by_rows


def _splits(programs: int, keys: int, least: int) -> int:
    """Parts of `keys` steps, of at least `least` each, that fill the device."""
    return max(1, min(cdiv(FULL_GRID, max(1, programs)), keys // least))


def _launch_options(c: Config) -> dict[str, int]:
    return {"num_warps": c.num_warps, "num_stages": c.num_stages}


def _vector_rows(dv: int) -> int:
    """Rows per program of the kernels that only stream rows."""
    return max(1, 4096 // _padded(dv))


def tensor_attention_fwd(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None = None,
    mask2: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    w1: int | None = None,
    w2: int | None = None,
    q_offset: int = 0,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    tiling: str | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of exact tensor attention (formula on top of this file).

    Args:
        q (B, H, n_q, d), k1 (B, Hkv, n_1, d), k2 (B, Hkv, n_2, d), v1 (B, Hkv, n_1, dv),
            v2 (B, Hkv, n_2, dv): one dtype of float32, bfloat16, float16; Hkv divides H;
            d, dv <= 256. Made contiguous if they are not.
        mask1 (B or 1, H or 1, n_q or 1, n_1), mask2 (.., n_2): float32, added to the logits, or
            None. -inf leaves a pair out, as does anything below about -2.3e38.
        causal, w1, w2, q_offset: with p = i + q_offset, causal keeps p - w < j <= p, a window
            alone |p - j| < w; None or -1 is no window.
        kv_bias: numbers added to k2 and to v2.
        tiling, config, splits: "rows", "packed" or "pairs", tiles, parts of axis 1 (None: by
            shape).

    Returns:
        out (B, H, n_q, dv) in the inputs' dtype and lse (B, H, n_q), float32, natural logarithm;
        0 and -inf for rows without a valid triple.
    """
    p = _problem(q, k1, k2, v1, v2, mask1, mask2, scale, causal, w1, w2, q_offset, kv_bias)
    (b, h, n_q, d), dv = p.q.shape, p.v1.shape[3]
    out = torch.empty((b, h, n_q, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, n_q), dtype=torch.float32, device=q.device)
    if p.empty or not out.numel():
        return out.zero_(), lse.fill_(-math.inf)
    row_config = config or choose_config("fwd rows", q.dtype, d, dv, q.device)
    pair_config = config or choose_config("fwd pairs", q.dtype, d, dv, q.device)
    tiling = tiling or choose_tiling(p, row_config, pair_config)
    pack = p.group if tiling == "packed" else 1
    total = b * h * n_q
    if tiling == "pairs":
        c, kernel = pair_config, tensor_attention_fwd_pairs_kernel
        block_j = min(c.block_m, triton.next_power_of_2(p.spans[0]))
        programs = cdiv(n_q, c.block_m // block_j) * b * h
        splits = splits or _splits(programs, cdiv(p.spans[0], block_j), 1)
        extra = {"BLOCK_J": block_j}
    else:
        c, kernel = row_config, tensor_attention_fwd_rows_kernel
        programs = cdiv(n_q * pack, c.block_m) * (b * h // pack)
        splits = splits or _splits(programs, p.spans[0], 16)
        extra = {"PACK": pack}
    with device_guard(q):
        part, part_lse = out, lse
        if splits > 1:
            part = torch.empty((splits, total, dv), dtype=torch.float32, device=q.device)
            part_lse = torch.empty((splits, total), dtype=torch.float32, device=q.device)
        kernel[(programs, splits)](
            out_ptr=part,
            lse_ptr=part_lse,
            total_rows=total,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            **p.arguments(pack, c.block_n),
            **extra,
            **_launch_options(c),
        )
        if splits > 1:
            block_r = _vector_rows(dv)
            tensor_attention_merge_kernel[(cdiv(total, block_r),)](
                part,
                part_lse,
                out,
                lse,
                total,
                dv,
                splits,
                DV=_padded(dv),
                BLOCK_R=block_r,
                num_warps=4,
                **_OPTIONS,
            )
    return out, lse


def tensor_attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    v1: torch.Tensor,
    v2: torch.Tensor,
    mask1: torch.Tensor | None,
    mask2: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    w1: int | None = None,
    w2: int | None = None,
    q_offset: int = 0,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    want: Sequence[bool] = (True,) * 7,
    tiling: str | None = None,
    config: Config | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of tensor_attention_fwd.

    Args:
        dout (B, H, n_q, dv): in the inputs' dtype; dlse (B, H, n_q) float32, or None (0).
        out, lse: what the forward returned; the rest as given to it.
        want: which of the seven results are needed; gradients of masks that are None never are.
        tiling: "rows", "packed" (rows in the pass over queries) or "pairs".

    Returns:
        dq, dk1, dk2, dv1, dv2 in the inputs' dtype, dmask1, dmask2 float32; None if not wanted.
    """
    p = _problem(q, k1, k2, v1, v2, mask1, mask2, scale, causal, w1, w2, q_offset, kv_bias)
    want_q, want_k1, want_k2, want_v1, want_v2, want_m1, want_m2 = want
    want_m1 = want_m1 and mask1 is not None
    want_m2 = want_m2 and mask2 is not None
    shapes = (p.q, k1, k2, v1, v2)
    if p.empty or not out.numel():
        zeros = [torch.zeros(t.shape, dtype=q.dtype, device=q.device) for t in shapes]
        masks = [
            torch.zeros(m.shape, dtype=torch.float32, device=q.device) if w else None
            for m, w in ((mask1, want_m1), (mask2, want_m2))
        ]
        return (*(z if w else None for z, w in zip(zeros, want)), *masks)
    for name, t, like in (("dout", dout, out), ("dlse", dlse, lse)):
        if t is not None and t.shape != like.shape:
            raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(t.shape)}")
    if dout.dtype != q.dtype:
        raise TypeError(f"dout must be {q.dtype}, got {dout.dtype}")
    with device_guard(q):
        g = _Rows.of(p, dout.contiguous(), out, lse, dlse)
        if p.swapped:
            want_k1, want_k2, want_v1, want_v2 = want_k2, want_k1, want_v2, want_v1
        backward = _backward_pairs if _take_pairs(p, tiling, config) else _backward_rows
        dq, dk1, dk2, dv1, dv2 = backward(
            p, g, want_q, want_k1, want_k2, want_v1, want_v2, tiling, config, splits
        )
        if p.swapped:
            dk1, dk2, dv1, dv2 = dk2, dk1, dv2, dv1
        here, there = (p.exchanged(), p) if p.swapped else (p, p.exchanged())
        dmask1 = _mask_gradient(here, g, config) if want_m1 else None
        dmask2 = _mask_gradient(there, g, config) if want_m2 else None
    return dq, dk1, dk2, dv1, dv2, dmask1, dmask2


class _Rows(NamedTuple):
    """What the backward kernels know of a query."""

    dout: torch.Tensor
    shift: torch.Tensor
    delta: torch.Tensor

    @staticmethod
    def of(
        p: _Problem,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
    ) -> _Rows:
        shift, delta = torch.empty_like(lse), torch.empty_like(lse)
        dv, total = out.shape[3], lse.numel()
        block_r = _vector_rows(dv)
        tensor_attention_bwd_rows_stats_kernel[(cdiv(total, block_r),)](
            out.contiguous(),
            dout,
            lse.contiguous(),
            None if dlse is None else dlse.contiguous(),
            shift,
            delta,
            total,
            dv,
            DV=_padded(dv),
            BLOCK_R=block_r,
            num_warps=4,
            **_OPTIONS,
        )
        return _Rows(dout, shift, delta)

    def arguments(self) -> dict[str, torch.Tensor]:
        return {"dout_ptr": self.dout, "shift_ptr": self.shift, "delta_ptr": self.delta}


def _bwd_config(name: str, p: _Problem, config: Config | None) -> Config:
    return config or choose_config(name, p.q.dtype, p.q.shape[3], p.v1.shape[3], p.q.device)


def _take_pairs(p: _Problem, tiling: str | None, config: Config | None) -> bool:
    """Pairs where they win in the pass over queries and one tile holds a query's window."""
    rows, pairs = (_bwd_config(f"bwd q {kind}", p, config) for kind in ("rows", "pairs"))
    tallest = min(pairs.block_m, _bwd_config("bwd kv pairs", p, config).block_n)
    if triton.next_power_of_2(p.spans[0]) > tallest:
        if tiling == "pairs":
            raise ValueError(f"a window of {p.spans[0]} does not fit tiles of {tallest} pairs")
        return False
    return (tiling or choose_tiling(p, rows, pairs)) == "pairs"


def _heads_per_launch(heads: int, scratch: int, programs: int) -> int:
    """Heads at a time: as SCRATCH_BYTES allow, but enough of them for FULL_GRID / 2 programs."""
    fits = SCRATCH_BYTES // max(1, scratch)
    return min(heads, max(1, fits, cdiv(FULL_GRID // 2, programs)))


def _sum_splits(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t[0] if t.shape[0] == 1 else t.sum(0).to(dtype)


def _sum_parts(
    p: _Problem,
    part: torch.Tensor,
    out: torch.Tensor,
    first_head: int,
    heads: int,
    factor: float,
    per_head: int,
    step: int,
    n_axis: int,
    back: int,
    ahead: int,
) -> None:
    """out[first_head:] = factor times the sums of the parts of `heads` key heads."""
    n_1, width = out.shape[-2:]
    block_r = max(16, 2048 // _padded(width))
    left1, right1 = p.limits[:2]
    tensor_attention_parts_kernel[(cdiv(n_1, block_r) * heads,)](
        part,
        out,
        first_head,
        cdiv(n_axis, step),
        part.shape[-2],
        n_axis,
        back,
        ahead,
        p.q.shape[2],
        n_1,
        width,
        p.q_offset,
        left1,
        right1,
        factor,
        HEADS=per_head,
        STEP=step,
        W=_padded(width),
        BLOCK_R=block_r,
        num_warps=4,
        **_OPTIONS,
    )


def _backward_rows(
    p: _Problem,
    g: _Rows,
    want_q: bool,
    want_k1: bool,
    want_k2: bool,
    want_v1: bool,
    want_v2: bool,
    tiling: str | None,
    config: Config | None,
    splits: int | None,
) -> tuple[torch.Tensor | None, ...]:
    (b, h, n_q, d), dv = p.q.shape, p.v1.shape[3]
    dtype, device = p.q.dtype, p.q.device
    span1, span2 = p.spans
    dq = dk1 = dk2 = dv1 = dv2 = None
    if want_q:
        c = _bwd_config("bwd q rows", p, config)
        pack = 1 if tiling == "rows" else p.group
        programs = cdiv(n_q * pack, c.block_m) * (b * h // pack)
        parts = splits or _splits(programs, span1, 16)
        shape = (parts, b, h, n_q, d)
        dq = torch.empty(shape, dtype=dtype if parts == 1 else torch.float32, device=device)
        tensor_attention_bwd_q_rows_kernel[(programs, parts)](
            dq_ptr=dq,
            total_rows=b * h * n_q,
            scale=p.scale,
            PACK=pack,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            **g.arguments(),
            **p.arguments(pack, c.block_n),
            **_launch_options(c),
        )
        dq = _sum_splits(dq, dtype)
    c = _bwd_config("bwd kv rows", p, config)
    n_1, n_2, heads = p.k1.shape[2], p.k2.shape[2], p.k1.shape[1] * b
    blocks = cdiv(n_2, c.block_m)
    # Widths of both sides, bounded before they are added: see _first_axis_span.
    reach = min(n_q, c.block_m + sum(p.limits[2:])) + sum(p.limits[:2])
    span = min(n_1, reach)
    want_k, want_v = want_k1 or want_k2, want_v1 or want_v2
    # Accumulators of both do not fit the registers beyond 128 columns.
    turns = [(want_k, want_v)]
    if max(_padded(d), _padded(dv)) > 128:
        turns = [(want_k, False), (False, want_v)]
    for turn_k, turn_v in turns:
        if not (turn_k or turn_v):
            continue
        width = d * turn_k + dv * turn_v
        at_once = _heads_per_launch(heads, blocks * span * width * 4, blocks)
        parts = splits or _splits(blocks * at_once, span, 16)
        out_dtype = dtype if parts == 1 else torch.float32
        g_k, g_v, part_k, part_v = p.k2, p.v2, None, None
        if turn_k:
            g_k = torch.empty((parts, *p.k2.shape), dtype=out_dtype, device=device)
            part_k = torch.empty((at_once, blocks, span, d), dtype=torch.float32, device=device)
            dk1 = torch.empty_like(p.k1)
        if turn_v:
            g_v = torch.empty((parts, *p.v2.shape), dtype=out_dtype, device=device)
            part_v = torch.empty((at_once, blocks, span, dv), dtype=torch.float32, device=device)
            dv1 = torch.empty_like(p.v1)
        for first in range(0, heads, at_once):
            count = min(at_once, heads - first)
            tensor_attention_bwd_kv_rows_kernel[(blocks * count, parts)](
                dk2_ptr=g_k,
                dv2_ptr=g_v,
                part_k_ptr=part_k,
                part_v_ptr=part_v,
                first_head=first,
                span=span,
                total_keys=heads * n_2,
                scale=p.scale,
                WANT_K=turn_k,
                WANT_V=turn_v,
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                **g.arguments(),
                **p.arguments(p.group, c.block_m),
                **_launch_options(c),
            )
            where = (1, c.block_m, n_2, p.limits[3], p.limits[2])
            if part_k is not None:
                _sum_parts(p, part_k, dk1, first, count, p.scale, *where)
            if part_v is not None:
                _sum_parts(p, part_v, dv1, first, count, 1.0, *where)
        if turn_k:
            dk2 = _sum_splits(g_k, dtype)
        if turn_v:
            dv2 = _sum_splits(g_v, dtype)
    return (
        dq,
        dk1 if want_k1 else None,
        dk2 if want_k2 else None,
        dv1 if want_v1 else None,
        dv2 if want_v2 else None,
    )


def _backward_pairs(
    p: _Problem,
    g: _Rows,
    want_q: bool,
    want_k1: bool,
    want_k2: bool,
    want_v1: bool,
    want_v2: bool,
    tiling: str | None,
    config: Config | None,
    splits: int | None,
) -> tuple[torch.Tensor | None, ...]:
    (b, _, n_q, d), dv = p.q.shape, p.v1.shape[3]
    device, half = p.q.device, p.q.dtype.itemsize == 2
    dq = dk1 = dk2 = dv1 = dv2 = None
    block_j = triton.next_power_of_2(p.spans[0])
    key_heads = p.k1.shape[1] * b
    if want_q or want_k1 or want_v1:
        c = _bwd_config("bwd q pairs", p, config)
        block_i = c.block_m // block_j
        tiles = cdiv(n_q, block_i)
        span = min(p.k1.shape[2], block_j + block_i - 1)
        scratch = tiles * span * (d * want_k1 + dv * want_v1) * 4 * p.group
        at_once = _heads_per_launch(key_heads, scratch, tiles * p.group)
        dq = torch.empty_like(p.q)
        part_k, part_v = (
            torch.empty((at_once, p.group, tiles, span, n), dtype=torch.float32, device=device)
            if wanted
            else None
            for wanted, n in ((want_k1, d), (want_v1, dv))
        )
        dk1 = torch.empty_like(p.k1) if want_k1 else None
        dv1 = torch.empty_like(p.v1) if want_v1 else None
        for first in range(0, key_heads, at_once):
            count = min(at_once, key_heads - first)
            tensor_attention_bwd_q_pairs_kernel[(tiles * p.group * count,)](
                dq_ptr=dq,
                part_k_ptr=part_k,
                part_v_ptr=part_v,
                first_head=first * p.group,
                span=span,
                scale=p.scale,
                WANT_K=want_k1,
                WANT_V=want_v1,
                # Exact enough for what is rounded to 16 bits, and on tensor cores.
                SUM_PRECISION="tf32x3" if half else "ieee",
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_J=block_j,
                SUM_ROWS=max(16, triton.next_power_of_2(block_j + block_i - 1)),
                **g.arguments(),
                **p.arguments(1, c.block_n),
                **_launch_options(c),
            )
            where = (p.group, block_i, n_q, -p.q_offset, p.q_offset)
            if dk1 is not None:
                _sum_parts(p, part_k, dk1, first, count, p.scale, *where)
            if dv1 is not None:
                _sum_parts(p, part_v, dv1, first, count, 1.0, *where)
    if want_k2 or want_v2:
        c = _bwd_config("bwd kv pairs", p, config)
        dk2 = torch.empty_like(p.k2) if want_k2 else None
        dv2 = torch.empty_like(p.v2) if want_v2 else None
        tensor_attention_bwd_kv_pairs_kernel[(cdiv(p.k2.shape[2], c.block_m) * key_heads,)](
            dk2_ptr=dk2,
            dv2_ptr=dv2,
            WANT_K=want_k2,
            WANT_V=want_v2,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_J=block_j,
            **g.arguments(),
            **p.arguments(1, None),
            **_launch_options(c),
        )
    return dq if want_q else None, dk1, dk2, dv1, dv2


def _mask_gradient(p: _Problem, g: _Rows, config: Config | None) -> torch.Tensor:
    """Gradient of p.mask1."""
    b, h, n_q, _ = p.q.shape
    n_1 = p.k1.shape[2]
    shape = p.mask1.shape
    c = _bwd_config("bwd mask", p, config)
    dmask = torch.zeros((*shape[:2], n_q, n_1), dtype=torch.float32, device=p.q.device)
    keys = 32
    grid = (cdiv(n_q, c.block_m) * shape[0] * shape[1], cdiv(n_1, keys))
    tensor_attention_bwd_mask_kernel[grid](
        dmask_ptr=dmask,
        mask_heads=shape[1],
        batches=b // shape[0],
        heads=h // shape[1],
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        KEYS=keys,
        **g.arguments(),
        **p.arguments(1, c.block_n),
        **_launch_options(c),
    )
    return dmask.sum(2, keepdim=True) if shape[2] < n_q else dmask


# --------------------------------------------------------------------------------- compile checks

_FLOAT32 = ("mask1_ptr", "mask2_ptr", "lse_ptr", "dlse_ptr", "shift_ptr", "delta_ptr", "part_ptr")
_FLOAT32 += ("part_k_ptr", "part_v_ptr", "part_lse_ptr", "dmask_ptr")


def _case(
    kernel: Any,
    name: str | None,
    dtype: str,
    d: int = 64,
    precision: str = "ieee",
    even: bool = True,
    one: bool = False,
    **constexprs: Any,
) -> dict[str, Any]:
    """One entry of COMPILE_CASES; `divisible` names arguments that are usually multiples of 16.

    even: no windows, no masks, everything fits the tiles. one: sizes of 1, which Triton makes
    constants.
    """
    kind = precision if dtype == "fp32" else "half"
    c = Config(0, 0, 4, 1)
    if name is not None:
        c = TABLE[name, kind, d]
        constexprs |= {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "PRECISION": precision}
    constexprs |= {"D": d, "DV": d, "EVEN_N": even, "EVEN_D": even, "EVEN_DV": even, "WIDE": False}
    constexprs = {"LIMITED": not even, "MASK2_ROWS": not even, "GROUP": 1, "PACK": 1} | constexprs
    if even:
        constexprs |= {"mask1_ptr": None, "mask2_ptr": None, "dlse_ptr": None}
    if one:
        sizes = ("n_q", "n_1", "n_2", "n_heads", "n_splits", "n_blocks", "total_rows", "span")
        constexprs |= dict.fromkeys(sizes + ("batches", "heads", "mask_heads"), 1)
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs or argument.isupper():
            continue
        if argument.endswith("_ptr"):
            signature[argument] = "*fp32" if argument in _FLOAT32 else f"*{dtype}"
        elif argument in ("logit_scale", "scale", "factor"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i64" if argument.startswith("stride") else "i32"
    tensor_cores = name is not None and (kind == "half" or precision == "tf32")
    ptx = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": {**_launch_options(c), **_OPTIONS},
        "ptx_has": ptx if tensor_cores and c.block_m >= 64 else {},
        "divisible": [n for n in signature if n.endswith("_ptr") or n in ("d", "dv")],
    }


def _cases_of_type(
    dtype: str, d: int, precision: str = "ieee", even: bool = True, one: bool = False
) -> list[dict[str, Any]]:
    def case(kernel: Any, name: str | None, **constexprs: Any) -> dict[str, Any]:
        return _case(kernel, name, dtype, d, precision, even, one, **constexprs)

    kind = precision if dtype == "fp32" else "half"
    group = 1 if even else 4
    exact = {"SUM_PRECISION": "tf32x3" if kind == "half" else "ieee"}
    # Windows of 32, or as many as the tile holds.
    in_fwd, in_q = (min(32, TABLE[name, kind, d].block_m) for name in ("fwd pairs", "bwd q pairs"))
    in_kv = min(32, TABLE["bwd kv pairs", kind, d].block_n)
    sums = triton.next_power_of_2(in_q + TABLE["bwd q pairs", kind, d].block_m // in_q - 1)
    both = {"WANT_K": True, "WANT_V": d <= 128}
    return [
        case(tensor_attention_fwd_rows_kernel, "fwd rows", GROUP=group, PACK=group),
        case(tensor_attention_fwd_pairs_kernel, "fwd pairs", GROUP=group, BLOCK_J=in_fwd),
        case(tensor_attention_bwd_q_rows_kernel, "bwd q rows", GROUP=group, PACK=group),
        case(tensor_attention_bwd_kv_rows_kernel, "bwd kv rows", GROUP=group, **both),
        case(
            tensor_attention_bwd_q_pairs_kernel,
            "bwd q pairs",
            GROUP=group,
            BLOCK_J=in_q,
            SUM_ROWS=max(16, sums),
            WANT_K=True,
            WANT_V=True,
            **exact,
        ),
        case(
            tensor_attention_bwd_kv_pairs_kernel,
            "bwd kv pairs",
            GROUP=group,
            BLOCK_J=in_kv,
            WANT_K=True,
            WANT_V=True,
        ),
        case(tensor_attention_bwd_mask_kernel, "bwd mask", GROUP=group, KEYS=32),
    ]


COMPILE_CASES = [
    *_cases_of_type("bf16", 64),
    *_cases_of_type("fp16", 128, even=False),
    *_cases_of_type("bf16", 256)[:4],
    *_cases_of_type("fp32", 64, "tf32")[:4],
    *_cases_of_type("fp32", 64, "ieee")[2:5],
    *_cases_of_type("bf16", 64, one=True)[:4:3],
    _case(tensor_attention_merge_kernel, None, "bf16", BLOCK_R=64),
    _case(tensor_attention_bwd_rows_stats_kernel, None, "bf16", even=False, BLOCK_R=64),
    _case(tensor_attention_parts_kernel, None, "bf16", HEADS=1, STEP=64, W=64, BLOCK_R=32),
]
