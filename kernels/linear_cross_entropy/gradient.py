"""Backward: the gradient of a block of logits, recomputed tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .._launch import cdiv, check_rows, device_guard, dot_precision, widens
from . import launch
from .launch import OPTIONS, Config, check_problem
from .tiles import LOG2E, label_in_tile, live_rows, patch, tile_product, transform


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
    row_tile, col_tile = patch(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), n_col_tiles, GROUP)
    row0 = row_tile.to(tl.int64) * BLOCK_M
    col0 = col_tile * BLOCK_N
    offsets = tl.arange(0, BLOCK_N)
    cols = col0 + offsets
    rows = row0 + tl.arange(0, BLOCK_M)
    dz_ptrs = dz_ptr + rows[:, None] * stride_dz_row + cols[None, :]
    inside = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    mask_ptr += row0 // BLOCK_M * n_col_tiles + col_tile

    n_live = live_rows(n_valid_ptr, n_rows)
    if row0 >= n_live:
        tl.store(dz_ptrs, tl.zeros((BLOCK_M, BLOCK_N), dz_ptr.dtype.element_ty), mask=inside)
        if threshold_ptr is not None:
            tl.store(mask_ptr, 0)
        return

    near = tl.minimum(rows, n_live - 1)
    near_cols = tl.minimum(cols, n_cols - 1)
    x_rows = x_ptr + near[:, None] * stride_x_row
    w_rows = w_ptr + near_cols.to(tl.int64)[:, None] * stride_w_row
    t = tile_product(x_rows, w_rows, n_inner, EVEN_K, WIDE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias_ptr is not None:
        t += tl.load(bias_ptr + near_cols).to(tl.float32)[None, :]
    z, th = transform(t, pre, post, CAP)
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
        local = label_in_tile(target, col0, BLOCK_N)
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
    check_problem(x, weight)
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
    c = config or launch.choose_config("grad", x.dtype, n, x.device)
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
    return dz, mask
