"""Causal near-linear tensor attention: query t sees the keys up to its own position.

With the features U of tensor_attention_lowrank.py the states of axis x are running sums,

  S_x[t] = S_x[t - 1] + U_x[t]^T [v_x[t] | 1]                     (r x (dv + 1) per head)
  [N | y][t] = sum_a w_a U0[t, a] prod_x S_x[t][a],   out = N / y,   lse = log y + c

and with dS[t] = w U0[t]^T [dN | dy][t] the gradients are

  dU0[t] = w <[dN | dy][t], prod_x S_x[t]>                        queries, first token to last
  D_x[t] = D_x[t + 1] + dS[t] * prod_{x' != x} S_x'[t]            keys, last token to first
  dv_x[t] = U_x[t] D_x[t],   dU_x[t] = <[v_x[t] | 1], D_x[t]>

The products over the axes are taken per token, so that none of this is a product of matrices: it
is multiply-adds on r x (dv + 1) numbers per token and axis.

Who owns what. Tokens are cut into chunks. The sums of a chunk are products of matrices (the state
kernel); the prefix kernel turns them, in place, into what each chunk starts with. Then a program
owns a chunk and a share of the features: BLOCK_F features times all value columns per axis stay in
registers while it walks the chunk's tokens; the next features start over. What sums over the
features ([N | y], dx, dv) is collected in rows that only this program writes, one copy per share;
the copies are added up in order. Every sum has a fixed order: the same inputs give the same bits.

Features of BLOCK_T tokens are made at a time and staged in scratch of the program, from which every
thread reads the BLOCK_F of a token in wide loads. dU goes through scratch of [chunk, BLOCK_F] to be
scattered to dx by a product with zeros and ones. The backward of the keys takes keys out of S as it
walks back past them; so that rounding does not pile up it starts each BLOCK_T tokens from a state
that a walk forward has left in scratch.

Operations per token, feature and value column, in multiply-adds or products, m axes: forward 2 m,
queries 3 m + 1, keys 5 m + 1. For m = g = 2, n = 65536, d = dv = 64: 9.1e9 of these numbers, 37 G
operations forward and 165 G backward per head.
Traffic: chunk states r (dv + 1) 4 bytes per axis, chunk and head, written once, scanned, read once
per walk; above STATE_BYTES of them chunks get longer. Rows of q, x, v once per feature tile, from
the first-level cache. Copies per share: n (dv + 1) 4 bytes forward, axes n (d + dv) 4 backward.

Numerics: float32. Chains of additions: a chunk's tokens, the chunks, 256 tokens in the state
kernel, whose products are three tf32 products.

Prediction (H200; no device was at hand, nothing here is measured). Compiled for sm_90 a token and
16 features take about 190 instructions of a warp forward, 135 such tiles for r = 2145: 1.7e9, 1.9
ms at one instruction per cycle and scheduler, so 2 to 3 ms; backward about 1700 per token and tile,
16 ms at the peak, 20 to 30 likely. The multiply-adds alone are 1.1 and 5 ms.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _tensor_attention_lowrank_plan as plan
from ._launch import cdiv, device_guard
from .tensor_attention_lowrank import (
    PRECISION,
    STATE,
    _column,
    _factor,
    _features,
    _rows,
    _table,
    _weights,
    gradient,
    gradients_of_sums,
    state,
    state_parts,
)

BLOCK_F = 16  # features that a program holds at a time
BLOCK_R = 16  # rows that are scattered at a time
_PROGRAMS = 2048  # of one to four warps: they fill every GPU at hand


class Config(NamedTuple):
    num_warps: int  # for at most 64 value columns; twice as many beyond
    block_t: int  # tokens that are staged, and between two saved states


# So that no register is spilled on sm_90 for m = g = 2 and aligned rows. Not tuned.
FORWARD = Config(1, 32)
QUERY = Config(2, 16)
KEY = Config(4, 16)

# --------------------------------------------------------------------------------------- kernels


@triton.jit
def _stage(
    u_ptr, rows_ptr, stride, kept_ptr, count, weight, index_ptr, f, rank, d,
    DEGREE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Features of a block of tokens to scratch [BLOCK_T, BLOCK_F], times weight; 0 if padded.

    Read back token by token they come in a few wide loads; gathered there, every thread would
    load every factor.
    """
    rows = tl.arange(0, BLOCK_T)
    kept = rows < count
    if kept_ptr is not None:
        kept = kept & (tl.load(kept_ptr + rows, mask=kept, other=0) != 0)
    row_ptrs = rows_ptr + rows.to(tl.int64) * stride
    u = weight[None, :] * _features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE)
    tl.store(u_ptr + rows[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :], u)


@triton.jit
def _stage_keys(
    u_ptr, x_ptr, kept_ptr, row, axis, count, index_ptr, f, rank, d,
    AXES: tl.constexpr, DEGREE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Those of the keys from `row` on, per axis; axis: rows from one axis to the next."""
    ones = tl.full((BLOCK_F,), 1.0, tl.float32)
    for x in tl.static_range(AXES):
        at = x * axis + row
        keys_kept = kept_ptr
        if kept_ptr is not None:
            keys_kept = kept_ptr + at
        _stage(
            u_ptr + x * BLOCK_T * BLOCK_F, x_ptr + at * d, d, keys_kept, count, ones, index_ptr, f,
            rank, d, DEGREE, BLOCK_F, BLOCK_T,
        )  # fmt: skip


@triton.jit
def _advanced(
    s, z, u_ptr, v_ptr, axis, local, c, dv,
    AXES: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The states with a key of every axis in them, whose features have been staged."""
    sums, counts = (), ()
    for x in tl.static_range(AXES):
        u = tl.load(u_ptr + x * BLOCK_T * BLOCK_F + local)
        v = tl.load(v_ptr + x * axis * dv + c, mask=c < dv, other=0.0)
        sums = sums + (s[x] + u[:, None] * v[None, :],)
        counts = counts + (z[x] + u,)
    return sums, counts


@triton.jit
def _product(terms, like, without: tl.constexpr, AXES: tl.constexpr):
    """Of all terms but one."""
    found = tl.full(like.shape, 1.0, tl.float32)
    for x in tl.static_range(AXES):
        if x != without:
            found = found * terms[x]
    return found


@triton.jit
def _load_states(ptr, stride, f, c, rank, dv, AXES: tl.constexpr):
    sums, counts = (), ()
    for x in tl.static_range(AXES):
        at = ptr + x * stride + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        sums = sums + (tl.load(at[:, None] + c[None, :], mask=inside, other=0.0),)
        counts = counts + (tl.load(at + dv, mask=f < rank, other=0.0),)
    return sums, counts


@triton.jit
def _store_states(ptr, stride, s, z, f, c, rank, dv, AXES: tl.constexpr):
    for x in tl.static_range(AXES):
        at = ptr + x * stride + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        tl.store(at[:, None] + c[None, :], s[x], mask=inside)
        tl.store(at + dv, z[x], mask=f < rank)


@triton.jit
def _zeros(f, c, AXES: tl.constexpr):
    sums, counts = (), ()
    for _ in tl.static_range(AXES):
        sums = sums + (tl.zeros((f.shape[0], c.shape[0]), tl.float32),)
        counts = counts + (tl.zeros((f.shape[0],), tl.float32),)
    return sums, counts


@triton.jit
def _add(ptr, value, inside, new):
    """Adds to rows that this program owns; `new`: they hold nothing yet."""
    if new:
        tl.store(ptr, value, mask=inside)
    else:
        tl.store(ptr, tl.load(ptr, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _scatter(
    dx_ptr, du_ptr, x_ptr, stride_x, count, new, index_ptr, f, rank, d,
    DEGREE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of `count` rows x to dx [count, d], from those of their features."""
    l = tl.arange(0, D)
    for first in range(0, count, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        kept = rows < count
        at = du_ptr + rows[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
        du = tl.load(at, mask=kept[:, None], other=0.0)
        row_ptrs = x_ptr + rows.to(tl.int64) * stride_x
        dx = tl.zeros((BLOCK_R, D), tl.float32)
        for t in tl.static_range(DEGREE):
            others = du
            for o in tl.static_range(DEGREE):
                if o != t:
                    others *= _factor(row_ptrs, kept, _column(index_ptr, f, rank, d, o, DEGREE), d)
            column = _column(index_ptr, f, rank, d, t, DEGREE)
            hit = (column[:, None] == l[None, :]).to(tl.float32)
            dx = tl.dot(others, hit, dx, input_precision=PRECISION)
        at = dx_ptr + rows.to(tl.int64)[:, None] * d + l[None, :]
        _add(at, dx, kept[:, None] & (l < d)[None, :], new)


@triton.jit
def tensor_attention_lowrank_prefix_kernel(
    parts_ptr,  # [count, size], in place
    first_ptr,  # [size] or None: zeros
    count,
    size,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Part i becomes first + the parts before it; with REVERSE those after it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if first_ptr is not None:
        total = tl.load(first_ptr + at, mask=at < size, other=0.0)
    for i in range(count):
        row = i
        if REVERSE:
            row = count - 1 - i
        ptrs = parts_ptr + tl.cast(row, tl.int64) * size + at
        part = tl.load(ptrs, mask=at < size, other=0.0)
        tl.store(ptrs, total, mask=at < size)
        total += part


@triton.jit
def tensor_attention_lowrank_causal_kernel(
    q_ptr,  # [batch, head, n, d]
    x_ptr,  # [AXES, batch * key head, n, d]: key t enters with query t
    v_ptr,  # [AXES, batch * key head, n, dv]
    kept_ptr,  # [AXES, batch * key head, n] of bytes or None
    starts_ptr,  # [chunk, AXES, batch * key head, rank, dv + 1]
    weight_ptr,  # [rank]
    index_ptr,  # [rank, DEGREE]
    staged_ptr,  # scratch [program, AXES + 1, BLOCK_T, BLOCK_F]
    sums_ptr,  # [share, batch * head, n, dv + 1]
    n,
    d,
    dv,
    rank,
    heads,
    group,
    length,
    shares,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    AXES: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    chunk, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    head = tl.program_id(1).to(tl.int64)
    key_heads = (tl.num_programs(1) // group).to(tl.int64)
    key_head = head // group  # group divides heads: the batch carries over
    begin = (chunk * length).to(tl.int64)
    count = tl.minimum(length, n - chunk * length)
    q_ptr += head // heads * stride_q_batch + head % heads * stride_q_head + begin * stride_q_row
    key_row, axis = key_head * n + begin, key_heads * n
    u_ptr = (
        staged_ptr + (tl.program_id(0) * tl.num_programs(1) + head) * (AXES + 1) * BLOCK_T * BLOCK_F
    )
    u0_ptr = u_ptr + AXES * BLOCK_T * BLOCK_F
    starts_ptr += (chunk * AXES * key_heads + key_head) * rank * (dv + 1)
    sums_ptr += ((share * tl.num_programs(1) + head) * n + begin) * (dv + 1)
    c = tl.arange(0, BLOCK_C)
    local = tl.arange(0, BLOCK_F)
    for first in range(share * BLOCK_F, rank, shares * BLOCK_F):
        f = first + local
        weight = tl.load(weight_ptr + f, mask=f < rank, other=0.0)
        s, z = _load_states(starts_ptr, key_heads * rank * (dv + 1), f, c, rank, dv, AXES)
        new = first == share * BLOCK_F
        for block in range(0, count, BLOCK_T):
            some = tl.minimum(BLOCK_T, count - block)
            row = key_row + block
            _stage_keys(
                u_ptr, x_ptr, kept_ptr, row, axis, some, index_ptr, f, rank, d,
                AXES, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            _stage(
                u0_ptr, q_ptr + block * stride_q_row, stride_q_row, None, some, weight, index_ptr,
                f, rank, d, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            tl.debug_barrier()  # other threads read what was staged
            for step in range(some):
                s, z = _advanced(
                    s, z, u_ptr + step * BLOCK_F, v_ptr + (row + step) * dv, axis, local, c, dv,
                    AXES, BLOCK_F, BLOCK_T,
                )  # fmt: skip
                u = tl.load(u0_ptr + step * BLOCK_F + local)
                sums = tl.sum(u[:, None] * _product(s, s[0], -1, AXES), 0)
                y = tl.sum(u * _product(z, u, -1, AXES), 0)
                at = sums_ptr + (block + step) * (dv + 1)
                _add(at + c, sums, c < dv, new)
                _add(at + dv, y, step >= 0, new)
            tl.debug_barrier()  # the next block is staged over this one


@triton.jit
def tensor_attention_lowrank_causal_query_gradient_kernel(
    q_ptr,  # as above
    x_ptr,
    v_ptr,
    kept_ptr,
    dsums_ptr,  # [batch * head, n, dv]
    dy_ptr,  # [batch * head, n]
    starts_ptr,
    weight_ptr,
    index_ptr,
    staged_ptr,  # scratch [program, AXES + 1, BLOCK_T, BLOCK_F]
    du_ptr,  # scratch [program, length, BLOCK_F]
    dq_ptr,  # [share, batch * head, n, d]
    totals_ptr,  # [chunk, AXES, batch * head, rank, dv + 1]: sums of dS times the other states
    n,
    d,
    dv,
    rank,
    heads,
    group,
    length,
    shares,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    AXES: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    head = tl.program_id(1).to(tl.int64)
    all_heads = tl.num_programs(1).to(tl.int64)
    key_heads = all_heads // group
    key_head = head // group
    begin = (chunk * length).to(tl.int64)
    count = tl.minimum(length, n - chunk * length)
    q_ptr += head // heads * stride_q_batch + head % heads * stride_q_head + begin * stride_q_row
    key_row, axis = key_head * n + begin, key_heads * n
    u_ptr = (
        staged_ptr + (tl.program_id(0) * tl.num_programs(1) + head) * (AXES + 1) * BLOCK_T * BLOCK_F
    )
    u0_ptr = u_ptr + AXES * BLOCK_T * BLOCK_F
    dsums_ptr += (head * n + begin) * dv
    dy_ptr += head * n + begin
    starts_ptr += (chunk * AXES * key_heads + key_head) * rank * (dv + 1)
    totals_ptr += (chunk * AXES * all_heads + head) * rank * (dv + 1)
    du_ptr += (tl.program_id(0) * all_heads + head) * length * BLOCK_F
    dq_ptr += ((share * all_heads + head) * n + begin) * d
    c = tl.arange(0, BLOCK_C)
    local = tl.arange(0, BLOCK_F)
    for first in range(share * BLOCK_F, rank, shares * BLOCK_F):
        f = first + local
        weight = tl.load(weight_ptr + f, mask=f < rank, other=0.0)
        s, z = _load_states(starts_ptr, key_heads * rank * (dv + 1), f, c, rank, dv, AXES)
        g, gz = _zeros(f, c, AXES)
        new = first == share * BLOCK_F
        for block in range(0, count, BLOCK_T):
            some = tl.minimum(BLOCK_T, count - block)
            row = key_row + block
            _stage_keys(
                u_ptr, x_ptr, kept_ptr, row, axis, some, index_ptr, f, rank, d,
                AXES, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            _stage(
                u0_ptr, q_ptr + block * stride_q_row, stride_q_row, None, some, weight, index_ptr,
                f, rank, d, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            tl.debug_barrier()
            for step in range(some):
                s, z = _advanced(
                    s, z, u_ptr + step * BLOCK_F, v_ptr + (row + step) * dv, axis, local, c, dv,
                    AXES, BLOCK_F, BLOCK_T,
                )  # fmt: skip
                dsums = tl.load(dsums_ptr + (block + step) * dv + c, mask=c < dv, other=0.0)
                dy = tl.load(dy_ptr + block + step)
                du = tl.sum(dsums[None, :] * _product(s, s[0], -1, AXES), 1)
                du = weight * (du + dy * _product(z, du, -1, AXES))
                tl.store(du_ptr + (block + step) * BLOCK_F + local, du)
                u = tl.load(u0_ptr + step * BLOCK_F + local)
                more, more_z = (), ()
                for x in tl.static_range(AXES):
                    ds = u[:, None] * dsums[None, :]
                    more = more + (g[x] + ds * _product(s, ds, x, AXES),)
                    more_z = more_z + (gz[x] + u * dy * _product(z, u, x, AXES),)
                g, gz = more, more_z
            tl.debug_barrier()
        _store_states(totals_ptr, all_heads * rank * (dv + 1), g, gz, f, c, rank, dv, AXES)
        _scatter(
            dq_ptr, du_ptr, q_ptr, stride_q_row, count, new,
            index_ptr, f, rank, d, DEGREE, BLOCK_F, BLOCK_R, D, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def tensor_attention_lowrank_causal_key_gradient_kernel(
    q_ptr,  # as above
    x_ptr,
    v_ptr,
    kept_ptr,
    dsums_ptr,
    dy_ptr,
    starts_ptr,
    ends_ptr,  # [chunk, AXES, batch * head, rank, dv + 1]: D after the chunk
    weight_ptr,
    index_ptr,
    staged_ptr,  # scratch [program, AXES + 1, BLOCK_T, BLOCK_F]
    du_ptr,  # scratch [program, AXES, length, BLOCK_F]
    anchors_ptr,  # scratch [program, length / BLOCK_T, AXES, BLOCK_F, dv + 1]
    dx_ptr,  # [share, AXES, batch * head, n, d]
    dv_ptr,  # [share, AXES, batch * head, n, dv]
    n,
    d,
    dv,
    rank,
    heads,
    group,
    length,
    shares,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    AXES: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    head = tl.program_id(1).to(tl.int64)
    all_heads = tl.num_programs(1).to(tl.int64)
    key_heads = all_heads // group
    key_head = head // group
    begin = (chunk * length).to(tl.int64)
    count = tl.minimum(length, n - chunk * length)
    anchors = tl.cdiv(count, BLOCK_T)
    q_ptr += head // heads * stride_q_batch + head % heads * stride_q_head + begin * stride_q_row
    key_row, axis = key_head * n + begin, key_heads * n
    u_ptr = (
        staged_ptr + (tl.program_id(0) * tl.num_programs(1) + head) * (AXES + 1) * BLOCK_T * BLOCK_F
    )
    u0_ptr = u_ptr + AXES * BLOCK_T * BLOCK_F
    dsums_ptr += (head * n + begin) * dv
    dy_ptr += head * n + begin
    starts_ptr += (chunk * AXES * key_heads + key_head) * rank * (dv + 1)
    ends_ptr += (chunk * AXES * all_heads + head) * rank * (dv + 1)
    program = tl.program_id(0) * all_heads + head
    du_ptr += program * AXES * length * BLOCK_F
    anchor_stride = BLOCK_F * (dv + 1)
    anchors_ptr += program * tl.cdiv(length, BLOCK_T) * AXES * anchor_stride
    dx_ptr += ((share * AXES * all_heads + head) * n + begin) * d
    dv_ptr += ((share * AXES * all_heads + head) * n + begin) * dv
    c = tl.arange(0, BLOCK_C)
    local = tl.arange(0, BLOCK_F)
    for first in range(share * BLOCK_F, rank, shares * BLOCK_F):
        f = first + local
        weight = tl.load(weight_ptr + f, mask=f < rank, other=0.0)
        new = first == share * BLOCK_F
        s, z = _load_states(starts_ptr, key_heads * rank * (dv + 1), f, c, rank, dv, AXES)
        for anchor in range(anchors):
            some = tl.minimum(BLOCK_T, count - anchor * BLOCK_T)
            row = key_row + anchor * BLOCK_T
            _stage_keys(
                u_ptr, x_ptr, kept_ptr, row, axis, some, index_ptr, f, rank, d,
                AXES, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            tl.debug_barrier()
            for step in range(some):
                s, z = _advanced(
                    s, z, u_ptr + step * BLOCK_F, v_ptr + (row + step) * dv, axis, local, c, dv,
                    AXES, BLOCK_F, BLOCK_T,
                )  # fmt: skip
            saved = anchors_ptr + anchor * AXES * anchor_stride
            _store_states(saved, anchor_stride, s, z, local, c, BLOCK_F, dv, AXES)
            tl.debug_barrier()
        g, gz = _load_states(ends_ptr, all_heads * rank * (dv + 1), f, c, rank, dv, AXES)
        for back in range(anchors):
            anchor = anchors - 1 - back
            block = anchor * BLOCK_T
            some = tl.minimum(BLOCK_T, count - block)
            row = key_row + block
            saved = anchors_ptr + anchor * AXES * anchor_stride
            s, z = _load_states(saved, anchor_stride, local, c, BLOCK_F, dv, AXES)
            _stage_keys(
                u_ptr, x_ptr, kept_ptr, row, axis, some, index_ptr, f, rank, d,
                AXES, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            _stage(
                u0_ptr, q_ptr + block * stride_q_row, stride_q_row, None, some, weight, index_ptr,
                f, rank, d, DEGREE, BLOCK_F, BLOCK_T,
            )  # fmt: skip
            tl.debug_barrier()
            for down in range(some):
                step = some - 1 - down
                dsums = tl.load(dsums_ptr + (block + step) * dv + c, mask=c < dv, other=0.0)
                dy = tl.load(dy_ptr + block + step)
                u0 = tl.load(u0_ptr + step * BLOCK_F + local)
                sums, counts, after, after_z = (), (), (), ()
                for x in tl.static_range(AXES):
                    ds = u0[:, None] * dsums[None, :]
                    gx = g[x] + ds * _product(s, ds, x, AXES)
                    gzx = gz[x] + u0 * dy * _product(z, u0, x, AXES)
                    u = tl.load(u_ptr + (x * BLOCK_T + step) * BLOCK_F + local)
                    v = tl.load(v_ptr + (x * axis + row + step) * dv + c, mask=c < dv, other=0.0)
                    du = tl.sum(gx * v[None, :], 1) + gzx
                    tl.store(du_ptr + (x * length + block + step) * BLOCK_F + local, du)
                    at = dv_ptr + (x * all_heads * n + block + step) * dv + c
                    _add(at, tl.sum(u[:, None] * gx, 0), c < dv, new)
                    after, after_z = after + (gx,), after_z + (gzx,)
                    sums = sums + (s[x] - u[:, None] * v[None, :],)
                    counts = counts + (z[x] - u,)
                s, z, g, gz = sums, counts, after, after_z
            tl.debug_barrier()
        for x in tl.static_range(AXES):
            _scatter(
                dx_ptr + x * all_heads * n * d, du_ptr + x * length * BLOCK_F,
                x_ptr + (x * axis + key_row) * d, d, count, new,
                index_ptr, f, rank, d, DEGREE, BLOCK_F, BLOCK_R, D, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()


# ------------------------------------------------------------------------------------- launchers


class _Scan(NamedTuple):
    """Keys that enter with a query, one per axis and query, and how the queries are cut up."""

    x: torch.Tensor  # [axes, batch, key heads, n, d], 0 where there is no key or it is padded
    v: torch.Tensor  # [axes, batch, key heads, n, dv]
    kept: torch.Tensor | None  # [axes, batch, key heads, n] of bytes; None: all
    starts: torch.Tensor  # [chunks, axes, batch, key heads, r, dv + 1]
    index: torch.Tensor
    weights: torch.Tensor
    length: int  # tokens of a chunk
    shares: int  # programs that share the features of a chunk

    @property
    def grid(self) -> int:
        return self.starts.shape[0] * self.shares


def _entering(keys, values, masks, offset: int, n: int):
    """(x, v, kept) of a _Scan: the keys from `offset` on."""
    like = keys[0]
    shape = (len(keys), *like.shape[:2], n)
    x = like.new_zeros((*shape, like.shape[3]))
    v = like.new_zeros((*shape, values[0].shape[3]))
    whole = all(k.shape[2] >= offset + n for k in keys) and all(m is None for m in masks)
    kept = None if whole else like.new_zeros(shape, dtype=torch.uint8)
    for a, tensors in enumerate(zip(keys, values, masks)):
        k, value, mask = (None if t is None else t[:, :, offset : offset + n] for t in tensors)
        rows = slice(0, k.shape[2])
        if mask is not None:  # what stands in padded rows may be NaN
            k, value = (torch.where(mask.unsqueeze(-1), t, 0.0) for t in (k, value))
        x[a, :, :, rows], v[a, :, :, rows] = k, value
        if kept is not None:
            kept[a, :, :, rows] = True if mask is None else mask
    return x, v, kept


def _prefix(parts: torch.Tensor, first: torch.Tensor | None, reverse: bool) -> None:
    size = parts[0].numel()
    with device_guard(parts):
        tensor_attention_lowrank_prefix_kernel[(cdiv(size, 1024),)](
            parts, first, parts.shape[0], size, REVERSE=reverse, BLOCK=1024, num_warps=4
        )


def _scan(q, keys, values, masks, coefficients, offset, state_config, precision) -> _Scan:
    """Of queries at positions from offset >= 0 on."""
    batch, heads, n, d = q.shape
    degree, dv = len(coefficients) - 1, values[0].shape[3]
    x, v, kept = _entering(keys, values, masks, offset, n)
    rank = math.comb(d + degree, degree)
    # The gradients have a state per query head.
    size = len(keys) * batch * heads * rank * (dv + 1) * 4
    length = plan.chunk_length(n, size)
    shares = _PROGRAMS // (cdiv(n, length) * batch * heads)
    shares = max(1, min(cdiv(rank, BLOCK_F), shares))
    starts = state_parts(
        x.flatten(0, 1), v.flatten(0, 1), None, None if kept is None else kept.flatten(0, 1),
        degree, cdiv(n, length), length, state_config, precision,
    ).unflatten(1, (len(keys), batch))  # fmt: skip
    first = None
    if offset > 0:
        first = torch.stack([
            state(k[:, :, :offset], v[:, :, :offset], None,
                  None if mask is None else mask[:, :, :offset], degree, state_config, precision)
            for k, v, mask in zip(keys, values, masks)
        ])  # fmt: skip
    _prefix(starts, first, False)
    index = _table(d, degree, q.device)[0]
    return _Scan(x, v, kept, starts, index, _weights(coefficients, d, q.device), length, shares)


def _sees_nothing(q, keys, masks, offset: int) -> torch.Tensor:
    """Which queries: bool, to broadcast with (B, H, n)."""
    position = torch.arange(offset, offset + q.shape[2], device=q.device)
    dead = position < 0
    for k, mask in zip(keys, masks):
        if mask is not None:
            places = torch.arange(k.shape[2], device=q.device)
            first = torch.where(mask, places, k.shape[2]).amin(-1, keepdim=True)
            none = (first > position) | (first == k.shape[2])
            group = q.shape[1] // k.shape[1] if none.shape[1] > 1 else 1
            dead = dead | (none if group == 1 else none.repeat_interleave(group, 1))
    return dead


def _numbers(q, scan: _Scan):
    """What every kernel is told after the tensors."""
    heads, (n, dv) = q.shape[1], scan.v.shape[3:]
    return (
        n, q.shape[3], dv, scan.weights.shape[0], heads, heads // scan.x.shape[2],
        scan.length, scan.shares, *q.stride()[:3],
    )  # fmt: skip


def _staged(q, scan: _Scan, config: Config) -> torch.Tensor:
    programs = scan.grid * q.shape[0] * q.shape[1]
    return q.new_empty((programs, scan.x.shape[0] + 1, config.block_t, BLOCK_F))


def _options(config: Config, dv: int) -> dict[str, Any]:
    warps = config.num_warps * (2 if dv > 64 else 1)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _constants(q, scan: _Scan, config: Config, precision: str | None) -> dict[str, Any]:
    """precision: None for the forward, which forms no products of matrices."""
    found = {
        "AXES": scan.x.shape[0],
        "DEGREE": scan.index.shape[1],
        "BLOCK_F": BLOCK_F,
        "BLOCK_T": config.block_t,
        "BLOCK_C": max(16, triton.next_power_of_2(scan.v.shape[4])),
        **_options(config, scan.v.shape[4]),
    }
    if precision is not None:
        width = max(16, triton.next_power_of_2(q.shape[3]))
        found |= {"BLOCK_R": BLOCK_R, "D": width, "PRECISION": precision}
    return found


def tensor_attention_lowrank_causal_fwd(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor | None],
    coefficients: Sequence[float],
    centre: float,
    q_offset: int,
    config: Config = FORWARD,
    state_config: Any = STATE,
    precision: str = PRECISION,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, y) of the op with causality and without windows, all float32."""
    batch, heads, n, d = q.shape
    dv = values[0].shape[3]
    unseen = min(max(-q_offset, 0), n)  # queries before the first key
    if batch * heads * (n - unseen) == 0 or any(k.shape[2] == 0 for k in keys):
        lse = q.new_full((batch, heads, n), -math.inf)
        return q.new_zeros((batch, heads, n, dv)), lse, torch.zeros_like(lse)
    seeing = _rows(q[:, :, unseen:])
    scan = _scan(
        seeing, keys, values, key_masks, coefficients, q_offset + unseen, state_config, precision,
    )  # fmt: skip
    parts = q.new_empty((scan.shares, batch, heads, n - unseen, dv + 1))
    with device_guard(q):
        tensor_attention_lowrank_causal_kernel[(scan.grid, batch * heads)](
            seeing, scan.x, scan.v, scan.kept, scan.starts, scan.weights, scan.index,
            _staged(q, scan, config), parts,
            *_numbers(seeing, scan), **_constants(seeing, scan, config, None),
        )  # fmt: skip
    sums = parts[0] if scan.shares == 1 else parts.sum(0)
    sums = torch.nn.functional.pad(sums, (0, 0, unseen, 0))
    dead = _sees_nothing(q, keys, key_masks, q_offset)
    y = torch.where(dead, 0.0, sums[..., -1])
    divisor = torch.where(dead, 1.0, y)
    out = torch.where(dead.unsqueeze(-1), 0.0, sums[..., :-1] / divisor.unsqueeze(-1))
    return out, torch.where(dead, -math.inf, divisor.log() + centre), y


def tensor_attention_lowrank_causal_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    y: torch.Tensor,
    coefficients: Sequence[float],
    q_offset: int,
    query_config: Config = QUERY,
    key_config: Config = KEY,
    state_config: Any = STATE,
    gradient_config: Any = None,
    precision: str = PRECISION,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(dq, dkeys, dvalues); all contiguous."""
    batch, heads, n, d = q.shape
    axes, groups, dv = len(keys), keys[0].shape[1], values[0].shape[3]
    dq, *rest = (
        torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, *keys, *values)
    )
    dkeys, dvalues = rest[:axes], rest[axes:]
    unseen = min(max(-q_offset, 0), n)
    if batch * heads * (n - unseen) == 0 or any(k.shape[2] == 0 for k in keys):
        return dq, dkeys, dvalues
    dsums, dy = (t[:, :, unseen:].contiguous() for t in gradients_of_sums(dout, dlse, out, y))
    seeing, offset = _rows(q[:, :, unseen:]), q_offset + unseen
    scan = _scan(seeing, keys, values, key_masks, coefficients, offset, state_config, precision)
    chunks, rank, degree = scan.starts.shape[0], scan.starts.shape[4], len(coefficients) - 1
    count = n - unseen
    totals = q.new_empty((chunks, axes, batch, heads, rank, dv + 1))
    programs = scan.grid * batch * heads
    du = q.new_empty((programs, axes, scan.length, BLOCK_F))
    dq_parts = q.new_empty((scan.shares, batch, heads, count, d))
    tensors = (seeing, scan.x, scan.v, scan.kept, dsums, dy, scan.starts)
    shared, numbers = (scan.weights, scan.index), _numbers(seeing, scan)
    grid = (scan.grid, batch * heads)
    with device_guard(q):
        tensor_attention_lowrank_causal_query_gradient_kernel[grid](
            *tensors, *shared, _staged(q, scan, query_config), du, dq_parts, totals, *numbers,
            **_constants(seeing, scan, query_config, precision),
        )  # fmt: skip
    dq[:, :, unseen:] = dq_parts.sum(0)
    del dq_parts
    if offset > 0:  # keys that every query sees
        total = totals.sum(0).unflatten(2, (groups, -1)).sum(3)
        for x, (k, v, mask) in enumerate(zip(keys, values, key_masks)):
            mask = None if mask is None else mask[:, :, :offset]
            dkeys[x][:, :, :offset], dvalues[x][:, :, :offset] = gradient(
                k[:, :, :offset], v[:, :, :offset], None, mask, total[x], degree, True,
                gradient_config, precision,
            )  # fmt: skip
    _prefix(totals, None, True)
    dx = q.new_empty((scan.shares, axes, batch, heads, count, d))
    dvalue = q.new_empty((scan.shares, axes, batch, heads, count, dv))
    anchors = q.new_empty((programs, cdiv(scan.length, key_config.block_t), axes, BLOCK_F, dv + 1))
    with device_guard(q):
        tensor_attention_lowrank_causal_key_gradient_kernel[grid](
            *tensors, totals, *shared, _staged(q, scan, key_config), du, anchors, dx, dvalue,
            *numbers,
            **_constants(seeing, scan, key_config, precision),
        )  # fmt: skip
    for parts, found in ((dx, dkeys), (dvalue, dvalues)):
        whole = parts.sum(0).unflatten(2, (groups, -1)).sum(3)
        if scan.kept is not None:
            whole.masked_fill_((scan.kept == 0).unsqueeze(-1), 0.0)
        for x, t in enumerate(found):
            rows = slice(offset, min(offset + count, t.shape[2]))
            t[:, :, rows] = whole[x, :, :, : max(0, rows.stop - rows.start)]
    return dq, dkeys, dvalues


# ---------------------------------------------------------------------------------- compile cases


def _case(kernel: Any, config: Config, axes: int, degree: int, d: int, plain: bool):
    """One entry of COMPILE_CASES; plain: no padded keys."""
    width = max(16, triton.next_power_of_2(d))
    constexprs: dict[str, Any] = {
        "AXES": axes,
        "DEGREE": degree,
        "BLOCK_F": BLOCK_F,
        "BLOCK_C": width,
        "BLOCK_T": config.block_t,
        "BLOCK_R": BLOCK_R,
        "D": width,
        "PRECISION": PRECISION,
        "REVERSE": True,
        "BLOCK": 1024,
    }
    if plain:
        constexprs |= {"kept_ptr": None, "first_ptr": None}
    constexprs = {k: v for k, v in constexprs.items() if k in kernel.arg_names}
    kinds = {"kept_ptr": "*u8", "index_ptr": "*i32"}
    signature = {
        a: kinds.get(a, "*fp32" if a.endswith("_ptr") else "i64" if "stride" in a else "i32")
        for a in kernel.arg_names
        if a not in constexprs
    }
    return {
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": _options(config, d),
    }


COMPILE_CASES = [
    _case(tensor_attention_lowrank_prefix_kernel, FORWARD, 2, 2, 64, False),
    _case(tensor_attention_lowrank_causal_kernel, FORWARD, 2, 2, 64, True),
    _case(tensor_attention_lowrank_causal_kernel, FORWARD, 3, 4, 16, False),
    _case(tensor_attention_lowrank_causal_query_gradient_kernel, QUERY, 2, 2, 64, True),
    _case(tensor_attention_lowrank_causal_query_gradient_kernel, QUERY, 1, 3, 128, False),
    _case(tensor_attention_lowrank_causal_key_gradient_kernel, KEY, 2, 2, 64, True),
    _case(tensor_attention_lowrank_causal_key_gradient_kernel, KEY, 3, 2, 128, False),
]
