"""The kernels without causality and windows: states, queries, gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _tensor_attention_lowrank_plan as plan
from .features import column_of, dot_with_exact, factor, features

SUMMED = tl.constexpr(plan.SUMMED)


@triton.jit
def _kept(mask_ptr, rows, n, stride_mask_batch, stride_mask_head, b, h):
    kept = rows < n
    if mask_ptr is not None:
        at = mask_ptr + b * stride_mask_batch + h * stride_mask_head + rows
        kept = kept & (tl.load(at, mask=kept, other=0) != 0)
    return kept


@triton.jit
def tensor_attention_lowrank_state_kernel(
    x_ptr,  # [batch, head, n, d]
    v_ptr,  # [batch, head, n, dv]
    extra_ptr,  # [batch, head, n] contiguous, the column beside v; None: ones
    mask_ptr,  # [batch, head, n] of bytes or None
    index_ptr,  # [rank, DEGREE]
    out_ptr,  # [split, batch, head, rank, dv + 1]
    n,
    d,
    dv,
    rank,
    heads,
    all_heads,
    per_split,
    stride_x_batch,
    stride_x_head,
    stride_x_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_mask_batch,
    stride_mask_head,
    DEGREE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_c = tl.cdiv(dv, BLOCK_C)
    tiles = tl.cdiv(rank, BLOCK_F) * tiles_c
    tile = tl.program_id(0) % tiles
    slab = tl.program_id(0) // tiles  # split all_heads + head
    tile_c = tile % tiles_c
    f = tile // tiles_c * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    split = slab // all_heads
    head = (slab % all_heads).to(tl.int64)
    b, h = head // heads, head % heads
    x_ptr += b * stride_x_batch + h * stride_x_head
    v_ptr += b * stride_v_batch + h * stride_v_head
    total = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    total_z = tl.zeros((BLOCK_F,), tl.float32)
    end = tl.minimum((split + 1) * per_split, n)
    for start in range(split * per_split, end, SUMMED):
        part = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
        part_z = tl.zeros((BLOCK_F,), tl.float32)
        for step in range(0, SUMMED, BLOCK_T):
            rows = (start + step + tl.arange(0, BLOCK_T)).to(tl.int64)
            kept = _kept(mask_ptr, rows, end, stride_mask_batch, stride_mask_head, b, h)
            u = features(x_ptr + rows * stride_x_row, kept, index_ptr, f, rank, d, DEGREE)
            at = v_ptr + rows[:, None] * stride_v_row + c[None, :]
            v = tl.load(at, mask=kept[:, None] & (c < dv)[None, :], other=0.0)
            part = tl.dot(tl.trans(u), v, part, input_precision=PRECISION)
            if extra_ptr is not None:
                extra = tl.load(extra_ptr + head * n + rows, mask=kept, other=0.0)
                part_z += tl.sum(u * extra[:, None], 0)
            else:
                part_z += tl.sum(u, 0)
        total += part
        total_z += part_z
    at = out_ptr + (slab.to(tl.int64) * rank + f) * (dv + 1)
    tl.store(at[:, None] + c[None, :], total, mask=(f < rank)[:, None] & (c < dv)[None, :])
    if tile_c == 0:
        tl.store(at + dv, total_z, mask=f < rank)


@triton.jit
def tensor_attention_lowrank_query_kernel(
    q_ptr,  # [batch, head, n, d]
    state_ptr,  # [batch, key head, rank, dv + 1]: C
    dead_ptr,  # [batch, key head] of bytes, whose queries see nothing; or None
    index_ptr,  # [rank, DEGREE]
    out_ptr,  # [batch, head, n, dv]
    lse_ptr,  # [batch, head, n]
    y_ptr,  # [batch, head, n]
    n,
    d,
    dv,
    rank,
    heads,
    group,
    centre,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    DEGREE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_c = tl.cdiv(dv, BLOCK_C)
    tiles = tl.cdiv(n, BLOCK_T) * tiles_c
    tile = tl.program_id(0) % tiles
    rows = (tile // tiles_c * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    tile_c = tile % tiles_c
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    kept = rows < n
    row_ptrs = q_ptr + b * stride_q_batch + h * stride_q_head + rows * stride_q_row
    key_head = b * (heads // group) + h // group
    state_ptr += key_head * rank * (dv + 1)
    sums = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    y = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, rank, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        u = features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE)
        s_ptrs = state_ptr + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        s = tl.load(s_ptrs[:, None] + c[None, :], mask=inside, other=0.0)
        sums = tl.dot(u, s, sums, input_precision=PRECISION)
        y += tl.sum(u * tl.load(s_ptrs + dv, mask=f < rank, other=0.0)[None, :], 1)
    if dead_ptr is not None:
        alive = kept & (tl.load(dead_ptr + key_head) == 0)
    else:
        alive = kept
    y = tl.where(alive, y, 0.0)
    divisor = tl.where(alive, y, 1.0)
    lse = tl.where(alive, tl.log(divisor) + centre, float("-inf"))
    out = tl.where(alive[:, None], sums / divisor[:, None], 0.0)
    at = out_ptr + (head * n + rows) * dv
    tl.store(at[:, None] + c[None, :], out, mask=kept[:, None] & (c < dv)[None, :])
    if tile_c == 0:
        tl.store(lse_ptr + head * n + rows, lse, mask=kept)
        tl.store(y_ptr + head * n + rows, y, mask=kept)


@triton.jit
def tensor_attention_lowrank_gradient_kernel(
    x_ptr,  # [batch, head, n, d]
    v_ptr,  # [batch, head, n, dv]
    extra_ptr,  # [batch, head, n] contiguous, the column beside v; None: ones
    mask_ptr,  # [batch, head, n] of bytes or None
    state_ptr,  # [batch, head / group, rank, dv + 1]
    index_ptr,  # [rank, DEGREE]
    dx_ptr,  # [batch, head, n, d] contiguous
    dv_ptr,  # [batch, head, n, dv] contiguous, or None
    n,
    d,
    dv,
    rank,
    heads,
    group,
    stride_x_batch,
    stride_x_head,
    stride_x_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_mask_batch,
    stride_mask_head,
    DEGREE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(n, BLOCK_T)
    rows = (tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    kept = _kept(mask_ptr, rows, n, stride_mask_batch, stride_mask_head, b, h)
    row_ptrs = x_ptr + b * stride_x_batch + h * stride_x_head + rows * stride_x_row
    v_ptr += b * stride_v_batch + h * stride_v_head
    state_ptr += (b * (heads // group) + h // group) * rank * (dv + 1)
    c = tl.arange(0, DV)
    at = v_ptr + rows[:, None] * stride_v_row + c[None, :]
    v = tl.load(at, mask=kept[:, None] & (c < dv)[None, :], other=0.0)
    if extra_ptr is not None:
        extra = tl.load(extra_ptr + head * n + rows, mask=kept, other=0.0)
    else:
        extra = tl.where(kept, 1.0, 0.0)
    dx = tl.zeros((BLOCK_T, D), tl.float32)
    dvalue = tl.zeros((BLOCK_T, DV), tl.float32)
    for first in range(0, rank, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        s_ptrs = state_ptr + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        s = tl.load(s_ptrs[:, None] + c[None, :], mask=inside, other=0.0)
        z = tl.load(s_ptrs + dv, mask=f < rank, other=0.0)
        du = tl.dot(v, tl.trans(s), extra[:, None] * z[None, :], input_precision=PRECISION)
        if dv_ptr is not None:
            u = features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE)
            dvalue = tl.dot(u, s, dvalue, input_precision=PRECISION)
        for t in tl.static_range(DEGREE):
            others = du
            for o in tl.static_range(DEGREE):
                if o != t:
                    others *= factor(row_ptrs, kept, column_of(index_ptr, f, rank, d, o, DEGREE), d)
            column = column_of(index_ptr, f, rank, d, t, DEGREE)
            hit = (column[:, None] == tl.arange(0, D)[None, :]).to(tl.float32)
            dx = dot_with_exact(others, hit, dx, PRECISION)
    l = tl.arange(0, D)
    at = dx_ptr + (head * n + rows) * d
    tl.store(at[:, None] + l[None, :], dx, mask=(rows < n)[:, None] & (l < d)[None, :])
    if dv_ptr is not None:
        at = dv_ptr + (head * n + rows) * dv
        tl.store(at[:, None] + c[None, :], dvalue, mask=(rows < n)[:, None] & (c < dv)[None, :])
