"""Linear layer, softmax statistics and softmax gradient by tiles; logits are never stored.

With t = x W^T + bias and z = pre t, or z = post tanh(pre t) when capped (all per row):

  statistics   m = max_j z_j,  rest = sum_{j != y} exp(z_j - m),  zy = z_y,
               ez = sum_{j != y} exp(z_j - m) (z_j - m)  (entropy),
               wz = sum_j w_j (z_j - m)                  (label smoothing)
  gradient     u_j = z_j - m
               dz_j = exp(u_j) (a + b u_j)               - spread w_j
               dz_y = exp(u_y) (label_a + b u_y) - label - spread w_y     replaces the line above
               times dz/dt, the slope of the transform
  products     dx = dz W,  dW = dz^T x,  dbias = column sums of dz

The coefficients m, a, b, label_a, label, spread are float32 numbers of one row. They hold
everything that makes one loss differ from another (csrc/common/row_softmax.h, RowCoeffs), so these
kernels know no loss.

Who owns what. Statistics: one program per (tile of rows, part of the vocabulary). It walks the
vocabulary tiles of its part, keeps the running values of its rows in registers and writes one
partial result per row; a second kernel merges the parts in index order. Gradient: one program per
(tile of rows, tile of columns) of a block of columns, so that the caller bounds the memory by the
width of the block. Products: one program per tile of the result; it alone adds up that tile, in
index order. Nothing is atomic and nothing waits: the same inputs give the same bits.

Programs are numbered so that those in flight form a square patch of (rows, columns): each tile of
x and of W that they read then serves several of them from the L2 cache.

Memory traffic, N rows, V classes, D features, b bytes per number, P parts: statistics read x and W
(about N V D b / tile edges through L2, DRAM sees x and W a few times) and write 12 to 24 bytes per
row and part. The gradient writes N V b, the products read it once each per column patch.

Filtering: a tile of the gradient in which every entry is below its row's threshold and which holds
no label is marked 0 in a tile mask and not stored. The products and the column sums walk lists of
the tiles marked 1. The lists, made by one small kernel, replace a branch in the inner loop: a loop
with a branch around its loads would not be pipelined.

Numerics: float32 accumulators; the label is left out of `rest`, so 1 - p_y = rest / sum keeps its
relative accuracy for confident rows. exp(z - m) is exp2((z - m) log2 e): with the difference taken
first the error does not grow with the size of the logits, as it does in exp2(fma(z, log2 e, ..)),
and beside the product the extra instruction is free.

Label smoothing subtracts spread w_j everywhere, and no tile would be small. Without cap it can be
left out of dz and added to the products as a rank one term (`outer`): dx_i -= spread_i (w^T W),
dW_j -= w_j (spread^T x), dbias_j -= w_j (sum of spread), each times pre.

Rows at or beyond `n_valid`, a number in device memory, are ignored: no element of x, target or
coefficients is read for them. The caller has sorted them to the end.

Paper: the idea to recompute the logits tile by tile and to skip gradient tiles too small to matter
is that of Wijmans, Huval, Hertzberg, Koltun, Kraehenbuehl, "Cut Your Losses in Large-Vocabulary
Language Models" (arXiv 2411.09009). Different here: thresholds are relative to each row's own
gradient, label tiles are never skipped, and sums are taken in a fixed order instead of under locks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import FULL_GRID, cdiv, check_rows, device_guard, dot_precision

LOG2E = tl.constexpr(1.4426950408889634)
NEG_INF = tl.constexpr(float("-inf"))
POS_INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))

# --------------------------------------------------------------------------------------- kernels


@triton.jit
def _patch(pid, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: columns advance after GROUP row tiles."""
    per_group = GROUP * n_col_tiles
    first = pid // per_group * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    local = pid % per_group
    return first + local % height, local // height


@triton.jit
def _live_rows(n_valid_ptr, n_rows):
    if n_valid_ptr is None:
        return n_rows
    else:
        return tl.minimum(tl.load(n_valid_ptr), n_rows)


@triton.jit
def _dot(a, b, acc, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    if WIDE:  # Triton's interpreter multiplies the bit patterns of bfloat16 numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    elif a.dtype != b.dtype:  # a float32 gradient meets half x or W
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile_product(
    x_rows,  # [BLOCK_M, 1] pointers to rows of x
    w_rows,  # [BLOCK_N, 1] pointers to rows of W
    n_inner,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    inner = tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_rows + inner
    w_ptrs = w_rows + inner
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, n_inner, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=inner < n_inner - k, other=0.0)
            w = tl.load(w_ptrs, mask=inner < n_inner - k, other=0.0)
        acc = _dot(x, tl.trans(w), acc, WIDE, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return acc


@triton.jit
def _tanh(x):
    """The ratio of csrc/common/math.h (tanh_ratio): relative error 2.1e-8."""
    # Not clamped by minimum and maximum, which may lose a NaN.
    x = tl.where(x > 9.02, 9.02, tl.where(x < -9.02, -9.02, x))
    s = x * x
    p = 2.05834817204312e-05 + s * 1.3319069092140122e-08
    p = 0.9999999790134189 + s * (0.13379718117941633 + s * (0.003494034715939948 + s * p))
    q = 0.025871073938015986 + s * (0.000328309300082503 + s * 7.762018985640709e-07)
    q = 1.0 + s * (0.46713033358670913 + s * q)
    return x * p / q


@triton.jit
def _transform(t, pre, post, CAP: tl.constexpr):
    """z and tanh(pre t) (z again without cap, where it is not used)."""
    if CAP:
        th = _tanh(t * pre)
        return th * post, th
    else:
        z = t * pre
        return z, z


@triton.jit
def _label_in_tile(target, col0, BLOCK_N: tl.constexpr):
    """Column of the label inside the tile that starts at col0, -1 where it is elsewhere.

    In 64 bits up to here: a label that does not fit 32 bits must not look like a small one.
    """
    local = target.to(tl.int64) - col0
    return tl.where((local >= 0) & (local < BLOCK_N), local, -1).to(tl.int32)


@triton.jit
def _finite_floor(m):
    # -inf - -inf is NaN: entries that are all -inf are measured from 0.
    return tl.where(m == NEG_INF, 0.0, m)


@triton.jit
def linear_softmax_stats_kernel(
    x_ptr,  # [n_rows, n_inner]
    w_ptr,  # [n_cols, n_inner]
    bias_ptr,  # [n_cols] or None
    target_ptr,  # [n_rows] or None
    class_weight_ptr,  # float32 [n_cols] or None
    n_valid_ptr,  # one integer or None
    part_ptr,  # float32 [3 to 6][n_splits][n_rows]: m, rest, zy, then ez, then wz and sum of w
    n_rows,
    n_cols,
    n_inner,
    stride_x_row,
    stride_w_row,
    n_splits,
    tiles_per_split,
    pre,
    post,
    CAP: tl.constexpr,
    WANT_ENTROPY: tl.constexpr,
    WANT_SUM: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, split = _patch(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), n_splits, GROUP)
    row0 = row_tile.to(tl.int64) * BLOCK_M
    n_live = _live_rows(n_valid_ptr, n_rows)
    if row0 >= n_live:
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    # A tile that reaches over the end reads the last row again instead of a mask in the loop.
    near = tl.minimum(rows, n_live - 1)
    x_rows = x_ptr + near[:, None] * stride_x_row
    offsets = tl.arange(0, BLOCK_N)

    m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    zy = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    ez = tl.zeros((BLOCK_M,), tl.float32)
    wz = tl.zeros((BLOCK_M,), tl.float32)
    w_sum = tl.zeros((BLOCK_M,), tl.float32)

    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(n_cols, BLOCK_N))
    for tile in range(split * tiles_per_split, last_tile):
        col0 = tile * BLOCK_N
        cols = col0 + offsets
        inside = cols < n_cols
        near_cols = tl.minimum(cols, n_cols - 1)
        w_rows = w_ptr + near_cols.to(tl.int64)[:, None] * stride_w_row
        t = _tile_product(
            x_rows, w_rows, n_inner, EVEN_K, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if bias_ptr is not None:
            t += tl.load(bias_ptr + near_cols).to(tl.float32)[None, :]
        z, _ = _transform(t, pre, post, CAP)
        z = tl.where(inside[None, :], z, NEG_INF)

        new_m = tl.maximum(m, tl.max(z, axis=1))
        floor = _finite_floor(new_m)
        u = z - floor[:, None]
        e = tl.exp2(u * LOG2E)
        if target_ptr is not None:
            local = _label_in_tile(tl.load(target_ptr + near), col0, BLOCK_N)
            is_label = offsets[None, :] == local[:, None]
            here = tl.sum(tl.where(is_label, z, 0.0), axis=1)
            zy = tl.where(local >= 0, here, zy)
            e = tl.where(is_label, 0.0, e)

        shift = _finite_floor(m) - floor
        shrink = tl.exp2((m - floor) * LOG2E)
        if WANT_ENTROPY:
            # exp(u) u is 0 for u = -inf; a NaN stays one.
            eu = tl.where(e == 0.0, 0.0, e * u)
            moved = tl.where(shrink == 0.0, 0.0, shrink * (ez + shift * rest))
            ez = moved + tl.sum(eu, axis=1)
        rest = rest * shrink + tl.sum(e, axis=1)
        if WANT_SUM:
            if class_weight_ptr is None:
                w = inside.to(tl.float32)
            else:
                w = tl.load(class_weight_ptr + cols, mask=inside, other=0.0)
            # A weight of zero hides an infinite logit.
            wu = tl.where(w[None, :] == 0.0, 0.0, w[None, :] * u)
            wz = wz + tl.where(w_sum == 0.0, 0.0, shift * w_sum) + tl.sum(wu, axis=1)
            w_sum += tl.sum(w, axis=0)
        m = new_m

    stored = rows < n_live
    field = tl.cast(n_splits, tl.int64) * n_rows
    out = part_ptr + tl.cast(split, tl.int64) * n_rows + rows
    tl.store(out, m, mask=stored)
    tl.store(out + field, rest, mask=stored)
    tl.store(out + 2 * field, zy, mask=stored)
    out += 3 * field
    if WANT_ENTROPY:
        tl.store(out, ez, mask=stored)
        out += field
    if WANT_SUM:
        tl.store(out, wz, mask=stored)
        tl.store(out + field, w_sum, mask=stored)


@triton.jit
def merge_softmax_stats_kernel(
    part_ptr,  # as above
    n_valid_ptr,
    out_ptr,  # float32 [3 to 5][n_rows]: m, rest, zy, then ez, then wz
    n_rows,
    n_splits,
    WANT_ENTROPY: tl.constexpr,
    WANT_SUM: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rows < _live_rows(n_valid_ptr, n_rows)
    field = tl.cast(n_splits, tl.int64) * n_rows

    m = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    zy = tl.full((BLOCK_M,), NEG_INF, tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)
    ez = tl.zeros((BLOCK_M,), tl.float32)
    wz = tl.zeros((BLOCK_M,), tl.float32)
    w_sum = tl.zeros((BLOCK_M,), tl.float32)
    for split in range(n_splits):
        part = part_ptr + tl.cast(split, tl.int64) * n_rows + rows
        part_m = tl.load(part, mask=live, other=NEG_INF)
        part_rest = tl.load(part + field, mask=live, other=0.0)
        part_zy = tl.load(part + 2 * field, mask=live, other=NEG_INF)
        part += 3 * field
        new_m = tl.maximum(m, part_m)
        floor = _finite_floor(new_m)
        shift, part_shift = _finite_floor(m) - floor, _finite_floor(part_m) - floor
        shrink = tl.exp2((m - floor) * LOG2E)
        part_shrink = tl.exp2((part_m - floor) * LOG2E)
        if WANT_ENTROPY:
            part_ez = tl.load(part, mask=live, other=0.0)
            part += field
            one = tl.where(shrink == 0.0, 0.0, shrink * (ez + shift * rest))
            two = tl.where(
                part_shrink == 0.0, 0.0, part_shrink * (part_ez + part_shift * part_rest)
            )
            ez = one + two
        rest = rest * shrink + part_rest * part_shrink
        if WANT_SUM:
            part_wz = tl.load(part, mask=live, other=0.0)
            part_w = tl.load(part + field, mask=live, other=0.0)
            wz += tl.where(w_sum == 0.0, 0.0, shift * w_sum)
            wz += part_wz + tl.where(part_w == 0.0, 0.0, part_shift * part_w)
            w_sum += part_w
        zy = tl.where(part_zy == NEG_INF, zy, part_zy)
        m = new_m

    # What `rest` does not show by itself: an infinite or undefined label, and a row of -inf only.
    bad = (m == POS_INF) | (zy != zy)
    if WHOLE_ROW:
        bad = bad | (m == NEG_INF)
    rest = tl.where(bad, NAN, rest)
    inside = rows < n_rows
    out = out_ptr + rows
    tl.store(out, tl.where(live, m, 0.0), mask=inside)
    tl.store(out + n_rows, tl.where(live, rest, 0.0), mask=inside)
    out += 2 * tl.cast(n_rows, tl.int64)
    tl.store(out, tl.where(live, zy, 0.0), mask=inside)
    out += n_rows
    if WANT_ENTROPY:
        tl.store(out, tl.where(live, ez, 0.0), mask=inside)
        out += n_rows
    if WANT_SUM:
        tl.store(out, tl.where(live, wz, 0.0), mask=inside)


@triton.jit
def linear_softmax_grad_kernel(
    x_ptr,  # [n_rows, n_inner]
    w_ptr,  # [n_cols, n_inner], the block's rows of W
    bias_ptr,  # [n_cols] or None
    target_ptr,  # [n_rows] or None
    class_weight_ptr,  # float32 [n_cols] or None (1)
    n_valid_ptr,  # one integer or None
    m_ptr,  # this and the next five: float32 [n_rows], the last three None if not used
    a_ptr,
    label_a_ptr,
    label_ptr,
    b_ptr,
    spread_ptr,
    threshold_ptr,  # float32 [n_rows] or None
    dz_ptr,  # [n_rows, n_cols]
    mask_ptr,  # int8 [row tiles, column tiles], only with threshold
    n_rows,
    n_cols,
    n_inner,
    first_class,  # class of the block's first column
    stride_x_row,
    stride_w_row,
    stride_dz_row,
    pre,
    post,
    CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    n_col_tiles = tl.cdiv(n_cols, BLOCK_N)
    row_tile, col_tile = _patch(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), n_col_tiles, GROUP)
    row0 = row_tile.to(tl.int64) * BLOCK_M
    col0 = col_tile * BLOCK_N
    offsets = tl.arange(0, BLOCK_N)
    cols = col0 + offsets
    rows = row0 + tl.arange(0, BLOCK_M)
    dz_ptrs = dz_ptr + rows[:, None] * stride_dz_row + cols[None, :]
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    mask_ptr += row0 // BLOCK_M * n_col_tiles + col_tile

    n_live = _live_rows(n_valid_ptr, n_rows)
    if row0 >= n_live:
        tl.store(dz_ptrs, tl.zeros((BLOCK_M, BLOCK_N), dz_ptr.dtype.element_ty), mask=inside)
        if threshold_ptr is not None:
            tl.store(mask_ptr, 0)
        return

    near = tl.minimum(rows, n_live - 1)
    near_cols = tl.minimum(cols, n_cols - 1)
    x_rows = x_ptr + near[:, None] * stride_x_row
    w_rows = w_ptr + near_cols.to(tl.int64)[:, None] * stride_w_row
    t = _tile_product(x_rows, w_rows, n_inner, EVEN_K, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias_ptr is not None:
        t += tl.load(bias_ptr + near_cols).to(tl.float32)[None, :]
    z, th = _transform(t, pre, post, CAP)
    u = z - tl.load(m_ptr + near)[:, None]
    e = tl.exp2(u * LOG2E)

    a = tl.load(a_ptr + near)[:, None]
    if b_ptr is not None:
        bu = tl.where(e == 0.0, 0.0, tl.load(b_ptr + near)[:, None] * u)
    else:
        bu = 0.0
    dz = e * (a + bu)
    local = tl.full((BLOCK_M,), -1, tl.int32)
    if target_ptr is not None:
        target = tl.load(target_ptr + near).to(tl.int64) - first_class
        local = _label_in_tile(target, col0, BLOCK_N)
        label_a = tl.load(label_a_ptr + near)[:, None]
        label = tl.load(label_ptr + near)[:, None]
        dz = tl.where(offsets[None, :] == local[:, None], e * (label_a + bu) - label, dz)
    if spread_ptr is not None:
        spread = tl.load(spread_ptr + near)[:, None]
        if class_weight_ptr is None:
            dz -= spread
        else:
            dz -= spread * tl.load(class_weight_ptr + near_cols)[None, :]
    if CAP:
        dz *= (pre * post) * (1.0 - th) * (1.0 + th)
    else:
        dz *= pre
    live = rows < n_live
    dz = tl.where(live[:, None] & (cols[None, :] < n_cols), dz, 0.0)

    if threshold_ptr is None:
        tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    else:
        threshold = tl.load(threshold_ptr + near)[:, None]
        # Per entry, not by a maximum, which may lose a NaN. Zeros can always be left out.
        small = (tl.abs(dz) < threshold) | (dz == 0.0)
        counts = tl.where(small, 0, 1).to(tl.int32)
        keep = tl.max(tl.max(counts, axis=1) | ((local >= 0) & live).to(tl.int32), axis=0)
        tl.store(mask_ptr, keep.to(tl.int8))
        if keep != 0:
            tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def active_tiles_kernel(
    mask_ptr,  # int8
    list_ptr,  # int32 [lines, n_tiles]: ascending indices of the line's tiles marked 1
    count_ptr,  # int32 [lines]
    n_tiles,
    stride_line,
    stride_tile,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, n_tiles, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        ptrs = mask_ptr + line * stride_line + tiles.to(tl.int64) * stride_tile
        on = tl.load(ptrs, mask=tiles < n_tiles, other=0).to(tl.int32)
        place = count + tl.cumsum(on, axis=0) - on
        tl.store(list_ptr + line * n_tiles + place, tiles, mask=on != 0)
        count += tl.sum(on, axis=0)
    tl.store(count_ptr + line, count)


@triton.jit
def _step_start(list_ptr, i, steps, TILE: tl.constexpr, BLOCK_K: tl.constexpr):
    """First index along the summed dimension of step i: all of it, or the listed tiles only.

    Loops ask for the step after the current one and carry the answer over: a load of dz whose
    address comes from a load in the same iteration would cost a stage of the pipeline.
    """
    if list_ptr is None:
        return i * BLOCK_K
    else:
        SUB: tl.constexpr = TILE // BLOCK_K
        return tl.load(list_ptr + i // SUB, mask=i < steps, other=0) * TILE + i % SUB * BLOCK_K


@triton.jit
def _plus_outer(acc, left_ptr, right_ptr, rows, cols, n_rows, n_cols):
    if left_ptr is None:
        return acc
    else:
        left = tl.load(left_ptr + rows, mask=rows < n_rows, other=0.0)
        right = tl.load(right_ptr + cols, mask=cols < n_cols, other=0.0)
        return acc + left[:, None] * right[None, :]


@triton.jit
def masked_matmul_nn_kernel(
    dz_ptr,  # [n_rows, n_inner]
    w_ptr,  # [n_inner, n_cols]
    out_ptr,  # [n_rows, n_cols]
    left_ptr,  # float32 [n_rows] or None
    right_ptr,  # float32 [n_cols], with left_ptr
    n_valid_ptr,
    list_ptr,  # int32 [row tiles of BLOCK_M, tiles of TILE], or None: no mask
    count_ptr,  # int32 [row tiles of BLOCK_M]
    n_rows,
    n_cols,
    n_inner,
    stride_dz_row,
    stride_w_row,
    stride_out_row,
    ACCUMULATE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = _patch(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N), GROUP
    )
    row0 = row_tile.to(tl.int64) * BLOCK_M
    n_live = _live_rows(n_valid_ptr, n_rows)
    if list_ptr is None:
        steps = tl.where(row0 < n_live, tl.cdiv(n_inner, BLOCK_K), 0)
    else:
        steps = tl.load(count_ptr + row0 // BLOCK_M) * (TILE // BLOCK_K)
        list_ptr += row0 // BLOCK_M * tl.cdiv(n_inner, TILE)
    rows = row0 + tl.arange(0, BLOCK_M)
    near = tl.maximum(tl.minimum(rows, n_live - 1), 0)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dz_rows = dz_ptr + near[:, None] * stride_dz_row

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = _step_start(list_ptr, 0, steps, TILE, BLOCK_K)
    for i in range(steps):
        inner = start + tl.arange(0, BLOCK_K)
        start = _step_start(list_ptr, i + 1, steps, TILE, BLOCK_K)
        dz_ptrs = dz_rows + inner[None, :]
        w_ptrs = w_ptr + inner.to(tl.int64)[:, None] * stride_w_row + cols[None, :]
        if EVEN_K:
            dz = tl.load(dz_ptrs)
        else:
            dz = tl.load(dz_ptrs, mask=inner[None, :] < n_inner, other=0.0)
        if EVEN_K and EVEN_N:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(
                w_ptrs, mask=(inner[:, None] < n_inner) & (cols[None, :] < n_cols), other=0.0
            )
        acc = _dot(dz, w, acc, WIDE, PRECISION)

    acc = _plus_outer(acc, left_ptr, right_ptr, rows, cols, n_rows, n_cols)
    acc = tl.where(rows[:, None] < n_live, acc, 0.0)
    out_ptrs = out_ptr + rows[:, None] * stride_out_row + cols[None, :]
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=inside, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def masked_matmul_tn_kernel(
    dz_ptr,  # [n_inner, n_rows], n_inner: rows of the gradient, n_rows: classes of the block
    x_ptr,  # [n_inner, n_cols]
    out_ptr,  # [n_rows, n_cols]
    left_ptr,  # float32 [n_rows] or None
    right_ptr,  # float32 [n_cols], with left_ptr
    n_valid_ptr,
    list_ptr,  # int32 [class tiles of BLOCK_M, tiles of TILE], or None: no mask
    count_ptr,  # int32 [class tiles of BLOCK_M]
    n_rows,
    n_cols,
    n_inner,
    stride_dz_row,
    stride_x_row,
    stride_out_row,
    ACCUMULATE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = _patch(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N), GROUP
    )
    n_live = _live_rows(n_valid_ptr, n_inner)
    row0 = row_tile.to(tl.int64) * BLOCK_M
    if list_ptr is None:
        steps = tl.cdiv(n_live, BLOCK_K)
    else:
        steps = tl.load(count_ptr + row0 // BLOCK_M) * (TILE // BLOCK_K)
        list_ptr += row0 // BLOCK_M * tl.cdiv(n_inner, TILE)
    classes = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = _step_start(list_ptr, 0, steps, TILE, BLOCK_K)
    for i in range(steps):
        inner = start + tl.arange(0, BLOCK_K)
        start = _step_start(list_ptr, i + 1, steps, TILE, BLOCK_K)
        # Rows that are not live may hold NaN in x, which a zero in dz would not cancel.
        live = inner[:, None] < n_live
        at = inner.to(tl.int64)[:, None]
        dz_ptrs = dz_ptr + at * stride_dz_row + classes[None, :]
        x_ptrs = x_ptr + at * stride_x_row + cols[None, :]
        dz = tl.load(dz_ptrs, mask=live & (classes[None, :] < n_rows), other=0.0)
        x = tl.load(x_ptrs, mask=live & (cols[None, :] < n_cols), other=0.0)
        acc = _dot(tl.trans(dz), x, acc, WIDE, PRECISION)

    rows = row0 + tl.arange(0, BLOCK_M)
    acc = _plus_outer(acc, left_ptr, right_ptr, rows, cols, n_rows, n_cols)
    out_ptrs = out_ptr + rows[:, None] * stride_out_row + cols[None, :]
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    if ACCUMULATE:
        acc += tl.load(out_ptrs, mask=inside, other=0.0)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def column_sums_kernel(
    dz_ptr,  # [n_rows, n_cols]
    factor_ptr,  # float32 [n_rows] or None (1)
    part_ptr,  # float32 [n_splits, n_cols]
    n_valid_ptr,
    list_ptr,  # int32 [tiles of BLOCK_N columns, tiles of BLOCK_M rows], or None: no mask
    count_ptr,  # int32 [tiles of BLOCK_N columns]
    n_rows,
    n_cols,
    stride_dz_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (t, s) of a grid S high adds up row tiles s, s + S, .. of column tile t."""
    col_tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n_live = _live_rows(n_valid_ptr, n_rows)
    if list_ptr is None:
        count = tl.cdiv(n_live, BLOCK_M)
    else:
        count = tl.load(count_ptr + col_tile)
        list_ptr += col_tile * tl.cdiv(n_rows, BLOCK_M)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(split, count, tl.num_programs(1)):
        rows = _step_start(list_ptr, i, count, BLOCK_M, BLOCK_M) + tl.arange(0, BLOCK_M).to(
            tl.int64
        )
        ptrs = dz_ptr + rows[:, None] * stride_dz_row + cols[None, :]
        dz = tl.load(ptrs, mask=(rows[:, None] < n_live) & (cols[None, :] < n_cols), other=0.0)
        dz = dz.to(tl.float32)
        if factor_ptr is not None:
            dz *= tl.load(factor_ptr + rows, mask=rows < n_live, other=0.0)[:, None]
        acc += tl.sum(dz, axis=0)
    tl.store(part_ptr + split.to(tl.int64) * n_cols + cols, acc, mask=cols < n_cols)


@triton.jit
def merge_column_sums_kernel(
    part_ptr,  # float32 [n_splits, n_cols]
    out_ptr,  # [n_cols]
    n_cols,
    n_splits,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < n_cols
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for split in range(n_splits):
        acc += tl.load(part_ptr + tl.cast(split, tl.int64) * n_cols + cols, mask=inside, other=0.0)
    if ACCUMULATE:
        acc += tl.load(out_ptr + cols, mask=inside, other=0.0)
    tl.store(out_ptr + cols, acc.to(out_ptr.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------- launchers


class Config(NamedTuple):
    """Tile sizes and launch options. `group`: row tiles of a patch of programs (_patch)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


# Chosen by what the compiler reports (no spill in the loop over D, shared memory below the 163 KiB
# of sm_80) and by the tile sizes that large products are known to want. Not yet tuned on a device.
_TABLE = {
    # 16-bit inputs. Wide tiles read least; cap, entropy or sums need the registers for themselves.
    ("stats", "half"): Config(128, 256, 64, 8, 3),
    ("stats with more", "half"): Config(128, 128, 64, 8, 4),
    ("grad", "half"): Config(128, 128, 64, 8, 4),
    ("matmul", "half"): Config(128, 128, 64, 8, 3),
    # float32 on tensor cores (tf32)
    ("stats", "tf32"): Config(128, 128, 32, 8, 4),
    ("stats with more", "tf32"): Config(128, 128, 32, 8, 4),
    ("grad", "tf32"): Config(128, 128, 32, 8, 4),
    ("matmul", "tf32"): Config(128, 128, 32, 8, 3),
    # float32 in full precision: no tensor cores, smaller tiles
    ("stats", "ieee"): Config(64, 64, 32, 4, 3),
    ("stats with more", "ieee"): Config(64, 64, 32, 4, 3),
    ("grad", "ieee"): Config(64, 64, 32, 4, 3),
    ("matmul", "ieee"): Config(64, 64, 32, 4, 3),
}


def _for_few_rows(config: Config, block_m: int) -> Config:
    """Memory bound: low tiles and more loads in flight."""
    block_n = min(config.block_n, 128)
    return config._replace(block_m=block_m, block_n=block_n, num_warps=4, num_stages=4)


def choose_config(kernel: str, dtype: torch.dtype, rows: int) -> Config:
    """Tiles of `kernel`, a name of the table, for `rows` rows of the result."""
    config = _TABLE[kernel, "half" if dtype.itemsize == 2 else dot_precision(dtype)]
    block_m = max(16, triton.next_power_of_2(rows))
    return config if block_m >= config.block_m else _for_few_rows(config, block_m)


class SoftmaxStats(NamedTuple):
    """float32 [rows] each; the last two are None unless asked for. All 0 for ignored rows."""

    m: torch.Tensor  # max_j z_j
    rest: torch.Tensor  # sum_{j != y} exp(z_j - m)
    zy: torch.Tensor  # z_y; -inf where the label is none of the classes of `weight`
    ez: torch.Tensor | None  # sum_{j != y} exp(z_j - m) (z_j - m)
    wz: torch.Tensor | None  # sum_j w_j (z_j - m)


class GradCoeffs(NamedTuple):
    """Coefficients of dz, float32 [rows] each (formula on top of this file)."""

    m: torch.Tensor
    a: torch.Tensor
    label_a: torch.Tensor
    label: torch.Tensor
    b: torch.Tensor | None = None
    spread: torch.Tensor | None = None


class TileMask(NamedTuple):
    """Which tiles of a gradient block were stored: int8 [row tiles, column tiles], 1 stored."""

    tiles: torch.Tensor
    block_m: int
    block_n: int


_OPTIONS = {"enable_fp_fusion": True}  # said aloud: its default changes in Triton 3.10


def _check_problem(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x (N, D) and weight (V, D) expected, got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "x and weight need one dtype of float32, bfloat16, float16, got "
            f"{x.dtype} and {weight.dtype}"
        )
    check_rows(x=x, weight=weight)


def _wide(t: torch.Tensor) -> bool:
    return not t.is_cuda and t.dtype == torch.bfloat16


def linear_softmax_stats(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor | None,
    n_valid: torch.Tensor | None,
    *,
    pre: float = 1.0,
    post: float = 1.0,
    cap: bool = False,
    want_entropy: bool = False,
    want_sum: bool = False,
    class_weight: torch.Tensor | None = None,
    whole_row: bool = True,
    config: Config | None = None,
    splits: int | None = None,
) -> SoftmaxStats:
    """Softmax statistics of the rows of x W^T + bias.

    Args:
        x (N, D), weight (V, D): same dtype, last stride 1.
        bias (V,): any float dtype, contiguous.
        target (N,): integer labels; one outside [0, V) belongs to no column (zy = -inf): the
            caller marks it as an error, or another shard of the classes holds it.
        n_valid: one int32 or int64 on the device; rows from there on are ignored.
        class_weight (V,): float32, the w_j of `wz`; None: 1.
        whole_row: False for a shard of the classes, in which all logits may be -inf.
        config, splits: tiles, and number of parts of the vocabulary (None: by shape).

    Returns:
        SoftmaxStats. A row with +inf or NaN among its logits, or of -inf only, has rest = NaN.
    """
    _check_problem(x, weight)
    (n, d), v = x.shape, weight.shape[0]
    if v == 0:
        raise ValueError("weight has no rows")
    more = cap or want_entropy or want_sum
    c = config or choose_config("stats with more" if more else "stats", x.dtype, n)
    fields = 3 + want_entropy + want_sum
    out = torch.empty((fields, n), dtype=torch.float32, device=x.device)
    if n:
        row_tiles, col_tiles = cdiv(n, c.block_m), cdiv(v, c.block_n)
        splits = splits or max(16, cdiv(FULL_GRID, row_tiles))
        per_split = cdiv(col_tiles, splits)
        splits = cdiv(col_tiles, per_split)
        part = torch.empty((fields + want_sum, splits, n), dtype=torch.float32, device=x.device)
        with device_guard(x):
            linear_softmax_stats_kernel[(row_tiles * splits,)](
                x,
                weight,
                bias,
                target,
                class_weight,
                n_valid,
                part,
                n,
                v,
                d,
                x.stride(0),
                weight.stride(0),
                splits,
                per_split,
                pre,
                post,
                CAP=cap,
                WANT_ENTROPY=want_entropy,
                WANT_SUM=want_sum,
                EVEN_K=d % c.block_k == 0,
                WIDE=_wide(x),
                PRECISION=dot_precision(x.dtype),
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **_OPTIONS,
            )
            merge_softmax_stats_kernel[(cdiv(n, 128),)](
                part,
                n_valid,
                out,
                n,
                splits,
                WANT_ENTROPY=want_entropy,
                WANT_SUM=want_sum,
                WHOLE_ROW=whole_row,
                BLOCK_M=128,
                num_warps=4,
                **_OPTIONS,
            )
    return SoftmaxStats(
        out[0], out[1], out[2], out[3] if want_entropy else None, out[-1] if want_sum else None
    )


def linear_softmax_grad(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor | None,
    n_valid: torch.Tensor | None,
    coeffs: GradCoeffs,
    out: torch.Tensor | None = None,
    *,
    v0: int = 0,
    v1: int | None = None,
    pre: float = 1.0,
    post: float = 1.0,
    cap: bool = False,
    class_weight: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, TileMask | None]:
    """Gradient with respect to x W^T + bias for the classes v0 <= j < v1.

    Args:
        x, weight, bias, target, n_valid, class_weight: of the whole problem, as in
            linear_softmax_stats.
        coeffs: GradCoeffs; b and spread may be None (0).
        out: buffer of at least N rows and v1 - v0 columns, last stride 1, of any float dtype; a new
            one of x's dtype if None.
        threshold (N,): float32. A tile in which |dz_j| < threshold (or dz_j = 0) holds for every
            entry, and which holds no label, is marked 0 and not written.

    Returns:
        dz, a view (N, v1 - v0) of the buffer, zero in ignored rows; and with a threshold the
        TileMask to hand to the products below (None without: everything counts).
    """
    _check_problem(x, weight)
    n, d = x.shape
    v1 = weight.shape[0] if v1 is None else v1
    if not 0 <= v0 <= v1 <= weight.shape[0]:
        raise ValueError(f"columns {v0}:{v1} of {weight.shape[0]} classes")
    if out is None:
        out = torch.empty((n, v1 - v0), dtype=x.dtype, device=x.device)
    if out.shape[0] < n or out.shape[1] < v1 - v0:
        raise ValueError(f"out needs {n} rows, {v1 - v0} columns, got {tuple(out.shape)}")
    check_rows(out=out)
    dz = out[:n, : v1 - v0]
    w = weight[v0:v1]
    c = config or choose_config("grad", x.dtype, n)
    row_tiles, col_tiles = cdiv(n, c.block_m), cdiv(v1 - v0, c.block_n)
    mask = None
    if threshold is not None:
        tiles = torch.empty((row_tiles, col_tiles), dtype=torch.int8, device=x.device)
        mask = TileMask(tiles, c.block_m, c.block_n)
    if n and v1 > v0:
        with device_guard(x):
            linear_softmax_grad_kernel[(row_tiles * col_tiles,)](
                x,
                w,
                None if bias is None else bias[v0:v1],
                target,
                None if class_weight is None else class_weight[v0:v1],
                n_valid,
                coeffs.m,
                coeffs.a,
                coeffs.label_a,
                coeffs.label,
                coeffs.b,
                coeffs.spread,
                threshold,
                dz,
                dz if mask is None else mask.tiles,
                n,
                v1 - v0,
                d,
                v0,
                x.stride(0),
                w.stride(0),
                dz.stride(0),
                pre,
                post,
                CAP=cap,
                EVEN_K=d % c.block_k == 0,
                WIDE=_wide(x),
                PRECISION=dot_precision(x.dtype),
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **_OPTIONS,
            )
    return dz, mask


def active_tiles(mask: TileMask, by_rows: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of tiles (or column, not by_rows): the tiles marked 1 in order, their number."""
    tiles = mask.tiles if by_rows else mask.tiles.t()
    lists = torch.empty(tiles.shape, dtype=torch.int32, device=tiles.device)
    counts = torch.empty(tiles.shape[0], dtype=torch.int32, device=tiles.device)
    if tiles.shape[0]:
        with device_guard(tiles):
            active_tiles_kernel[(tiles.shape[0],)](
                mask.tiles,
                lists,
                counts,
                tiles.shape[1],
                tiles.stride(0),
                tiles.stride(1),
                BLOCK=1024,
                num_warps=4,
                **_OPTIONS,
            )
    return lists, counts


def _check_out(out: torch.Tensor, shape: tuple[int, ...], accumulate: bool) -> None:
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if accumulate and out.dtype != torch.float32:
        raise TypeError(f"accumulate needs a float32 out, got {out.dtype}")
    check_rows(out=out)


def _fit_mask(c: Config, block_m: int, tile: int) -> Config:
    """A masked product works on the mask's tiles: their height, steps that divide their width."""
    return c._replace(block_m=block_m, block_k=min(c.block_k, tile))


def masked_matmul_nn(
    dz: torch.Tensor,
    weight: torch.Tensor,
    mask: TileMask | None,
    n_valid: torch.Tensor | None,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    outer: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """out = dz W, or out += dz W: gradient of x from a block of classes.

    Args:
        dz (N, B), mask: of linear_softmax_grad; weight (B, D): the block's rows of W.
        out (N, D): float32, or any float dtype without accumulate. Ignored rows get 0 (+= 0).
        outer: float32 vectors (N,) and (D,) whose outer product is added to the float32 sum.
    """
    (n, b), d = dz.shape, weight.shape[1]
    if weight.shape[0] != b:
        raise ValueError(f"dz has {b} columns, weight {weight.shape[0]} rows")
    _check_out(out, (n, d), accumulate)
    check_rows(dz=dz, weight=weight)
    c = config or choose_config("matmul", dz.dtype, n if mask is None else mask.block_m)
    lists = counts = None
    if mask is not None:
        c = _fit_mask(c, mask.block_m, mask.block_n)
        lists, counts = active_tiles(mask, by_rows=True)
    if n and d:
        with device_guard(dz):
            masked_matmul_nn_kernel[(cdiv(n, c.block_m) * cdiv(d, c.block_n),)](
                dz,
                weight,
                out,
                *(outer or (None, None)),
                n_valid,
                lists,
                counts,
                n,
                d,
                b,
                dz.stride(0),
                weight.stride(0),
                out.stride(0),
                ACCUMULATE=accumulate,
                EVEN_N=d % c.block_n == 0,
                EVEN_K=b % c.block_k == 0,
                WIDE=_wide(dz),
                PRECISION=dot_precision(dz.dtype),
                TILE=c.block_k if mask is None else mask.block_n,
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **_OPTIONS,
            )
    return out


def masked_matmul_tn(
    dz: torch.Tensor,
    x: torch.Tensor,
    mask: TileMask | None,
    n_valid: torch.Tensor | None,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    outer: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """out = dz^T x, or out += dz^T x: gradient of a block of rows of W.

    Args:
        dz (N, B), mask: of linear_softmax_grad; x (N, D): ignored rows are not read.
        out (B, D), accumulate: as in masked_matmul_nn.
        outer: as there, (B,) and (D,).
    """
    (n, b), d = dz.shape, x.shape[1]
    if x.shape[0] != n:
        raise ValueError(f"dz has {n} rows, x {x.shape[0]}")
    _check_out(out, (b, d), accumulate)
    check_rows(dz=dz, x=x)
    c = config or choose_config("matmul", dz.dtype, b if mask is None else mask.block_n)
    lists = counts = None
    if mask is not None:
        c = _fit_mask(c, mask.block_n, mask.block_m)
        lists, counts = active_tiles(mask, by_rows=False)
    if b and d:
        with device_guard(dz):
            masked_matmul_tn_kernel[(cdiv(b, c.block_m) * cdiv(d, c.block_n),)](
                dz,
                x,
                out,
                *(outer or (None, None)),
                n_valid,
                lists,
                counts,
                b,
                d,
                n,
                dz.stride(0),
                x.stride(0),
                out.stride(0),
                ACCUMULATE=accumulate,
                WIDE=_wide(dz),
                PRECISION=dot_precision(dz.dtype),
                TILE=c.block_k if mask is None else mask.block_m,
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **_OPTIONS,
            )
    return out


def column_sums(
    dz: torch.Tensor,
    mask: TileMask | None,
    n_valid: torch.Tensor | None,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = sum of the rows of dz, or out += that: gradient of a block of the bias.

    Args:
        dz (N, B), mask: of linear_softmax_grad.
        out (B,), accumulate: as in masked_matmul_nn.
        factor (N,): float32, multiplies the rows.
    """
    n, b = dz.shape
    _check_out(out, (b,), accumulate)
    check_rows(dz=dz)
    block_m, block_n = (64, 128) if mask is None else (mask.block_m, mask.block_n)
    lists = counts = None
    if mask is not None:
        lists, counts = active_tiles(mask, by_rows=False)
    row_tiles, col_tiles = cdiv(n, block_m), cdiv(b, block_n)
    if b:
        splits = max(1, min(row_tiles, cdiv(FULL_GRID, col_tiles)))
        part = torch.empty((splits, b), dtype=torch.float32, device=dz.device)
        with device_guard(dz):
            column_sums_kernel[(col_tiles, splits)](
                dz,
                factor,
                part,
                n_valid,
                lists,
                counts,
                n,
                b,
                dz.stride(0),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=4,
                **_OPTIONS,
            )
            merge_column_sums_kernel[(cdiv(b, 256),)](
                part,
                out,
                b,
                splits,
                ACCUMULATE=accumulate,
                BLOCK_N=256,
                num_warps=4,
                **_OPTIONS,
            )
    return out


# --------------------------------------------------------------------------------- compile checks


def _case(kernel, config, pointers, integers, floats=(), absent=(), mma="big", **constexprs):
    """One entry of COMPILE_CASES; `divisible` names arguments that are usually multiples of 16.

    mma: the product instructions to look for, those of tall tiles ("big"), of low ones ("small"),
    or None. A problem of size 1 has "small" ones, and Triton makes its sizes constants.
    """
    signature = {name: f"*{kind}" for name, kind in pointers.items()}
    signature |= {name: "i64" if name.startswith("stride") else "i32" for name in integers}
    signature |= dict.fromkeys(floats, "fp32")
    if config is not None:
        constexprs |= {f"BLOCK_{k}": getattr(config, f"block_{k.lower()}") for k in "MNK"}
        constexprs["GROUP"] = config.group
    ptx = {80: "mma.sync", 90: "mma.sync", 100: "mma.sync"}
    if mma == "big":
        ptx |= {90: "wgmma.mma_async", 100: "tcgen05.mma"}
    if mma == "small":
        constexprs |= dict.fromkeys(integers, 1)
        signature = {k: v for k, v in signature.items() if k not in integers}
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs | dict.fromkeys(absent),
        "options": {
            "num_warps": config.num_warps if config else 4,
            "num_stages": config.num_stages if config else 3,
            **_OPTIONS,
        },
        "ptx_has": ptx if mma else {},
        "divisible": [n for n in signature if n in pointers or n.startswith(("stride", "n_"))],
    }


def _pick(name, dtype, precision, one):
    """Configuration, and the kind of product instruction to expect."""
    config = _TABLE[name, "half" if dtype != "fp32" else precision]
    if one:
        return _for_few_rows(config, 16), "small"
    return config, "big" if precision == "tf32" or dtype != "fp32" else None


def _stats_case(dtype, precision, full, one=False):
    c, mma = _pick("stats with more" if full else "stats", dtype, precision, one)
    optional = {"bias_ptr": dtype, "class_weight_ptr": "fp32", "n_valid_ptr": "i64"}
    return _case(
        linear_softmax_stats_kernel,
        c,
        {
            "x_ptr": dtype,
            "w_ptr": dtype,
            "target_ptr": "i64",
            "part_ptr": "fp32",
            **(optional if full else {}),
        },
        ("n_rows", "n_cols", "n_inner", "stride_x_row", "stride_w_row", "n_splits")
        + ("tiles_per_split",),
        ("pre", "post"),
        () if full else optional,
        mma=mma,
        CAP=full,
        WANT_ENTROPY=full,
        WANT_SUM=full,
        EVEN_K=not full,
        WIDE=False,
        PRECISION=precision,
    )


def _grad_case(dtype, precision, full, one=False):
    c, mma = _pick("grad", dtype, precision, one)
    optional = {
        "bias_ptr": dtype,
        "class_weight_ptr": "fp32",
        "n_valid_ptr": "i64",
        "b_ptr": "fp32",
        "spread_ptr": "fp32",
        "threshold_ptr": "fp32",
    }
    return _case(
        linear_softmax_grad_kernel,
        c,
        {
            "x_ptr": dtype,
            "w_ptr": dtype,
            "target_ptr": "i64",
            "m_ptr": "fp32",
            "a_ptr": "fp32",
            "label_a_ptr": "fp32",
            "label_ptr": "fp32",
            "dz_ptr": dtype,
            "mask_ptr": "i8",
            **(optional if full else {}),
        },
        ("n_rows", "n_cols", "n_inner", "first_class", "stride_x_row", "stride_w_row")
        + ("stride_dz_row",),
        ("pre", "post"),
        () if full else optional,
        mma=mma,
        CAP=full,
        EVEN_K=not full,
        WIDE=False,
        PRECISION=precision,
    )


def _matmul_case(kernel, dtype, precision, masked, out="fp32", one=False):
    c, mma = _pick("matmul", dtype, precision, one)
    other = "w" if kernel is masked_matmul_nn_kernel else "x"
    optional = {"n_valid_ptr": "i64", "list_ptr": "i32", "count_ptr": "i32"}
    optional |= {"left_ptr": "fp32", "right_ptr": "fp32"}
    even = {"EVEN_N": not masked, "EVEN_K": not masked} if other == "w" else {}
    return _case(
        kernel,
        _fit_mask(c, 128, 128) if masked else c,
        {
            "dz_ptr": dtype,
            f"{other}_ptr": dtype,
            "out_ptr": out,
            **(optional if masked else {}),
        },
        ("n_rows", "n_cols", "n_inner", "stride_dz_row", f"stride_{other}_row", "stride_out_row"),
        (),
        () if masked else optional,
        mma=mma,
        ACCUMULATE=out == "fp32",
        WIDE=False,
        PRECISION=precision,
        TILE=128 if masked else c.block_k,
        **even,
    )


COMPILE_CASES = [
    _stats_case("bf16", "ieee", full=True),
    _stats_case("fp16", "ieee", full=False),
    _stats_case("fp32", "tf32", full=True),
    _stats_case("fp32", "ieee", full=False),
    _stats_case("bf16", "ieee", full=True, one=True),
    _case(
        merge_softmax_stats_kernel,
        None,
        {"part_ptr": "fp32", "n_valid_ptr": "i64", "out_ptr": "fp32"},
        ("n_rows", "n_splits"),
        mma=None,
        WANT_ENTROPY=True,
        WANT_SUM=True,
        WHOLE_ROW=True,
        BLOCK_M=128,
    ),
    _grad_case("bf16", "ieee", full=True),
    _grad_case("fp16", "ieee", full=False),
    _grad_case("fp32", "tf32", full=True),
    _grad_case("fp32", "ieee", full=False),
    _grad_case("bf16", "ieee", full=True, one=True),
    _case(
        active_tiles_kernel,
        None,
        {"mask_ptr": "i8", "list_ptr": "i32", "count_ptr": "i32"},
        ("n_tiles", "stride_line", "stride_tile"),
        mma=None,
        BLOCK=1024,
    ),
    *(
        _matmul_case(kernel, dtype, precision, masked, out, one)
        for kernel in (masked_matmul_nn_kernel, masked_matmul_tn_kernel)
        for dtype, precision, masked, out, one in (
            ("bf16", "ieee", False, "bf16", False),
            ("bf16", "ieee", True, "fp32", False),
            ("bf16", "ieee", False, "fp32", True),
            ("fp32", "tf32", False, "fp32", False),
            ("fp32", "ieee", False, "fp32", False),
        )
    ),
    *(
        _case(
            column_sums_kernel,
            None,
            {"dz_ptr": "bf16", "part_ptr": "fp32", **lists},
            ("n_rows", "n_cols", "stride_dz_row"),
            absent=absent,
            mma=None,
            BLOCK_M=128,
            BLOCK_N=128,
        )
        for lists, absent in (
            ({"n_valid_ptr": "i64", "list_ptr": "i32", "count_ptr": "i32"}, ("factor_ptr",)),
            ({"factor_ptr": "fp32"}, ("n_valid_ptr", "list_ptr", "count_ptr")),
        )
    ),
    _case(
        merge_column_sums_kernel,
        None,
        {"part_ptr": "fp32", "out_ptr": "fp32"},
        ("n_cols", "n_splits"),
        mma=None,
        ACCUMULATE=True,
        BLOCK_N=256,
    ),
]
