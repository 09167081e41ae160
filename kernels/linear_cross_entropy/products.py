"""Backward: products with a block of the logits' gradient, and its column sums.

A mask of tiles becomes lists of those to look at.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import FULL_GRID, cdiv, check_rows, device_guard, dot_precision, widens
from . import launch
from .gradient import TileMask
from .launch import OPTIONS, Config
from .tiles import gradient_dot, live_rows, patch


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
    row_tile, col_tile = patch(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N), GROUP
    )
    row0 = row_tile.to(tl.int64) * BLOCK_M
    n_live = live_rows(n_valid_ptr, n_rows)
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
        acc = gradient_dot(dz, w, acc, False, WIDE, PRECISION)

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
    row_tile, col_tile = patch(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N), GROUP
    )
    n_live = live_rows(n_valid_ptr, n_inner)
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
        acc = gradient_dot(dz, x, acc, True, WIDE, PRECISION)

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
    n_live = live_rows(n_valid_ptr, n_rows)
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
                **OPTIONS,
            )
    return lists, counts


def _check_out(out: torch.Tensor, shape: tuple[int, ...], accumulate: bool) -> None:
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if accumulate and out.dtype != torch.float32:
        raise TypeError(f"accumulate needs a float32 out, got {out.dtype}")
    check_rows(out=out)


def _config(dz: torch.Tensor, other: torch.Tensor, rows: int) -> Config:
    kernel = "matmul" if dz.dtype == other.dtype else "matmul of parts"
    return launch.choose_config(kernel, other.dtype, rows, dz.device)


def fit_mask(c: Config, block_m: int, tile: int) -> Config:
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
    c = config or _config(dz, weight, n if mask is None else mask.block_m)
    lists = counts = None
    if mask is not None:
        c = fit_mask(c, mask.block_m, mask.block_n)
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
                WIDE=widens(weight.dtype),
                PRECISION=dot_precision(dz.dtype),
                TILE=c.block_k if mask is None else mask.block_n,
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **OPTIONS,
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
    c = config or _config(dz, x, b if mask is None else mask.block_n)
    lists = counts = None
    if mask is not None:
        c = fit_mask(c, mask.block_n, mask.block_m)
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
                WIDE=widens(x.dtype),
                PRECISION=dot_precision(dz.dtype),
                TILE=c.block_k if mask is None else mask.block_m,
                BLOCK_M=c.block_m,
                BLOCK_N=c.block_n,
                BLOCK_K=c.block_k,
                GROUP=c.group,
                num_warps=c.num_warps,
                num_stages=c.num_stages,
                **OPTIONS,
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
                **OPTIONS,
            )
            merge_column_sums_kernel[(cdiv(b, 256),)](
                part,
                out,
                b,
                splits,
                ACCUMULATE=accumulate,
                BLOCK_N=256,
                num_warps=4,
                **OPTIONS,
            )
    return out
