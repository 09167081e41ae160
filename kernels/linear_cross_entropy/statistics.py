"""Forward: softmax statistics of the rows, tile by tile of the vocabulary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import FULL_GRID, cdiv, device_guard, dot_precision, widens
from . import launch
from .launch import OPTIONS, Config, check_problem
from .tiles import (
    LOG2E,
    NAN,
    NEG_INF,
    POS_INF,
    finite_floor,
    label_in_tile,
    live_rows,
    patch,
    tile_product,
    transform,
)


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
    row_tile, split = patch(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), n_splits, GROUP)
    row0 = row_tile.to(tl.int64) * BLOCK_M
    n_live = live_rows(n_valid_ptr, n_rows)
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
        t = tile_product(
            x_rows, w_rows, n_inner, EVEN_K, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if bias_ptr is not None:
            t += tl.load(bias_ptr + near_cols).to(tl.float32)[None, :]
        z, _ = transform(t, pre, post, CAP)
        z = tl.where(inside[None, :], z, NEG_INF)

        new_m = tl.maximum(m, tl.max(z, axis=1))
        floor = finite_floor(new_m)
        u = z - floor[:, None]
        e = tl.exp2(u * LOG2E)
        if target_ptr is not None:
            local = label_in_tile(tl.load(target_ptr + near), col0, BLOCK_N)
            is_label = offsets[None, :] == local[:, None]
            here = tl.sum(tl.where(is_label, z, 0.0), axis=1)
            zy = tl.where(local >= 0, here, zy)
            e = tl.where(is_label, 0.0, e)

        shift = finite_floor(m) - floor
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
    live = rows < live_rows(n_valid_ptr, n_rows)
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
        floor = finite_floor(new_m)
        shift, part_shift = finite_floor(m) - floor, finite_floor(part_m) - floor
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


class SoftmaxStats(NamedTuple):
    """float32 [rows] each; the last two are None unless asked for. All 0 for ignored rows."""

    m: torch.Tensor  # max_j z_j
    rest: torch.Tensor  # sum_{j != y} exp(z_j - m)
    zy: torch.Tensor  # z_y; -inf where the label is none of the classes of `weight`
    ez: torch.Tensor | None  # sum_{j != y} exp(z_j - m) (z_j - m)
    wz: torch.Tensor | None  # sum_j w_j (z_j - m)


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
    check_problem(x, weight)
    (n, d), v = x.shape, weight.shape[0]
    if v == 0:
        raise ValueError("weight has no rows")
    more = cap or want_entropy or want_sum or d % 64 != 0  # masked loads take registers too
    c = config or launch.choose_config("stats with more" if more else "stats", x.dtype, n, x.device)
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
                WIDE=widens(x.dtype),
                PRECISION=dot_precision(x.dtype),
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **OPTIONS,
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
                **OPTIONS,
            )
    return SoftmaxStats(
        out[0], out[1], out[2], out[3] if want_entropy else None, out[-1] if want_sum else None
    )
