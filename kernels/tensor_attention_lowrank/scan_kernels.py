"""The kernels of the scan; formulas and who owns what: scan.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .scan_steps import (
    add,
    advanced,
    chunk_of,
    load_states,
    product,
    scatter,
    stage_keys,
    stage_tokens,
    staged_key,
    store_states,
    zeros,
)


@triton.jit
def tensor_attention_lowrank_prefix_kernel(
    parts_ptr,  # [count, size] with rows apart by stride, in place
    first_ptr,  # [size] or None: zeros
    count,
    size,
    stride,
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
        ptrs = parts_ptr + tl.cast(row, tl.int64) * stride + at
        part = tl.load(ptrs, mask=at < size, other=0.0)
        tl.store(ptrs, total, mask=at < size)
        total += part


@triton.jit
def tensor_attention_lowrank_scan_kernel(
    b,  # Band
    sums_ptr,  # [share, batch * head, n, dv + 1]
    C: tl.constexpr,  # Constants
):
    t = chunk_of(b, C)
    sums_ptr += ((t.share * t.all_heads + t.head) * b.n + t.begin) * (b.dv + 1)
    c = tl.arange(0, C.BLOCK_C)
    local = tl.arange(0, C.BLOCK_F)
    for first in range(t.share * C.BLOCK_F, b.rank, b.shares * C.BLOCK_F):
        f = first + local
        weight = tl.load(b.weight + f, mask=f < b.rank, other=0.0)
        s, z = load_states(t.starts, t.states, f, c, b.rank, b.dv, C.AXES)
        new = first == t.share * C.BLOCK_F
        for block in range(0, t.count, C.BLOCK_T):
            some = tl.minimum(C.BLOCK_T, t.count - block)
            stage_tokens(t, block, some, weight, f, b, C)
            tl.debug_barrier()  # other threads read what was staged
            for step in range(some):
                s, z = advanced(s, z, t, block, step, local, c, b, C)
                u = tl.load(t.u0 + step * C.BLOCK_F + local)
                sums = tl.sum(u[:, None] * product(s, s[0], -1, C.AXES), 0)
                y = tl.sum(u * product(z, u, -1, C.AXES), 0)
                at = sums_ptr + (block + step) * (b.dv + 1)
                add(at + c, sums, c < b.dv, new)
                add(at + b.dv, y, step >= 0, new)
            tl.debug_barrier()  # the next block is staged over this one


@triton.jit
def tensor_attention_lowrank_scan_query_gradient_kernel(
    b,
    dsums_ptr,  # [batch * head, n, dv]
    dy_ptr,  # [batch * head, n]
    du_ptr,  # scratch [program, length, BLOCK_F]
    dq_ptr,  # [share, batch * head, n, d]
    totals_ptr,  # [chunk, AXES, batch * head, rank, dv + 1]: sums of dS times the other states
    C: tl.constexpr,
    R: tl.constexpr,  # Scatter
):
    AXES: tl.constexpr = C.AXES
    t = chunk_of(b, C)
    dsums_ptr += (t.head * b.n + t.begin) * b.dv
    dy_ptr += t.head * b.n + t.begin
    state = b.rank * (b.dv + 1)
    totals_ptr += (t.chunk * AXES * t.all_heads + t.head) * state
    du_ptr += t.program * b.length * C.BLOCK_F
    dq_ptr += ((t.share * t.all_heads + t.head) * b.n + t.begin) * b.d
    c = tl.arange(0, C.BLOCK_C)
    local = tl.arange(0, C.BLOCK_F)
    for first in range(t.share * C.BLOCK_F, b.rank, b.shares * C.BLOCK_F):
        f = first + local
        weight = tl.load(b.weight + f, mask=f < b.rank, other=0.0)
        s, z = load_states(t.starts, t.states, f, c, b.rank, b.dv, AXES)
        g, gz = zeros(f, c, AXES)
        new = first == t.share * C.BLOCK_F
        for block in range(0, t.count, C.BLOCK_T):
            some = tl.minimum(C.BLOCK_T, t.count - block)
            stage_tokens(t, block, some, weight, f, b, C)
            tl.debug_barrier()
            for step in range(some):
                s, z = advanced(s, z, t, block, step, local, c, b, C)
                dsums = tl.load(dsums_ptr + (block + step) * b.dv + c, mask=c < b.dv, other=0.0)
                dy = tl.load(dy_ptr + block + step)
                du = tl.sum(dsums[None, :] * product(s, s[0], -1, AXES), 1)
                du = weight * (du + dy * product(z, du, -1, AXES))
                tl.store(du_ptr + (block + step) * C.BLOCK_F + local, du)
                u = tl.load(t.u0 + step * C.BLOCK_F + local)
                more, more_z = (), ()
                for x in tl.static_range(AXES):
                    ds = u[:, None] * dsums[None, :]
                    more = more + (g[x] + ds * product(s, ds, x, AXES),)
                    more_z = more_z + (gz[x] + u * dy * product(z, u, x, AXES),)
                g, gz = more, more_z
            tl.debug_barrier()
        store_states(totals_ptr, t.all_heads * state, g, gz, f, c, b.rank, b.dv, AXES)
        scatter(dq_ptr, du_ptr, t.q, b.stride_q_row, t.count, new, f, b, C, R)
        tl.debug_barrier()


@triton.jit
def _key_gradients(g, gz, move, block, step, du_ptr, dv_ptr, local, c, new, t, b, C: tl.constexpr):
    """Stores those of a staged key, for dS = g of its axis; returns its features and values."""
    u, v = staged_key(t, move, block, step, local, c, b, C)
    du_ptr += (move * b.length + block + step) * C.BLOCK_F
    dv_ptr += (move * t.all_heads * b.n + block + step) * b.dv
    tl.store(du_ptr + local, tl.sum(g * v[None, :], 1) + gz)
    add(dv_ptr + c, tl.sum(u[:, None] * g, 0), c < b.dv, new)
    return u, v


@triton.jit
def tensor_attention_lowrank_scan_key_gradient_kernel(
    b,
    dsums_ptr,  # as above
    dy_ptr,
    ends_ptr,  # [chunk, AXES, batch * head, rank, dv + 1]: D after the chunk
    du_ptr,  # scratch [program, MOVES, length, BLOCK_F]
    anchors_ptr,  # scratch [program, length / BLOCK_T, AXES, BLOCK_F, dv + 1]
    dx_ptr,  # [share, MOVES, batch * head, n, d]
    dv_ptr,  # [share, MOVES, batch * head, n, dv]
    C: tl.constexpr,
    R: tl.constexpr,
):
    AXES: tl.constexpr = C.AXES
    MOVES: tl.constexpr = C.MOVES
    t = chunk_of(b, C)
    anchors = tl.cdiv(t.count, C.BLOCK_T)
    dsums_ptr += (t.head * b.n + t.begin) * b.dv
    dy_ptr += t.head * b.n + t.begin
    state = b.rank * (b.dv + 1)
    ends_ptr += (t.chunk * AXES * t.all_heads + t.head) * state
    du_ptr += t.program * MOVES * b.length * C.BLOCK_F
    anchor_stride = C.BLOCK_F * (b.dv + 1)
    anchors_ptr += t.program * tl.cdiv(b.length, C.BLOCK_T) * AXES * anchor_stride
    dx_ptr += ((t.share * MOVES * t.all_heads + t.head) * b.n + t.begin) * b.d
    dv_ptr += ((t.share * MOVES * t.all_heads + t.head) * b.n + t.begin) * b.dv
    c = tl.arange(0, C.BLOCK_C)
    local = tl.arange(0, C.BLOCK_F)
    for first in range(t.share * C.BLOCK_F, b.rank, b.shares * C.BLOCK_F):
        f = first + local
        weight = tl.load(b.weight + f, mask=f < b.rank, other=0.0)
        new = first == t.share * C.BLOCK_F
        s, z = load_states(t.starts, t.states, f, c, b.rank, b.dv, AXES)
        for anchor in range(anchors):
            block = anchor * C.BLOCK_T
            some = tl.minimum(C.BLOCK_T, t.count - block)
            stage_keys(t, block, some, f, b, C)
            tl.debug_barrier()
            for step in range(some):
                s, z = advanced(s, z, t, block, step, local, c, b, C)
            saved = anchors_ptr + anchor * AXES * anchor_stride
            store_states(saved, anchor_stride, s, z, local, c, C.BLOCK_F, b.dv, AXES)
            tl.debug_barrier()
        g, gz = load_states(ends_ptr, t.all_heads * state, f, c, b.rank, b.dv, AXES)
        for back in range(anchors):
            anchor = anchors - 1 - back
            block = anchor * C.BLOCK_T
            some = tl.minimum(C.BLOCK_T, t.count - block)
            saved = anchors_ptr + anchor * AXES * anchor_stride
            s, z = load_states(saved, anchor_stride, local, c, C.BLOCK_F, b.dv, AXES)
            stage_tokens(t, block, some, weight, f, b, C)
            tl.debug_barrier()
            for down in range(some):
                step = some - 1 - down
                dsums = tl.load(dsums_ptr + (block + step) * b.dv + c, mask=c < b.dv, other=0.0)
                dy = tl.load(dy_ptr + block + step)
                u0 = tl.load(t.u0 + step * C.BLOCK_F + local)
                sums, counts, after, after_z = (), (), (), ()
                for x in tl.static_range(AXES):
                    ds = u0[:, None] * dsums[None, :]
                    gx = g[x] + ds * product(s, ds, x, AXES)
                    gzx = gz[x] + u0 * dy * product(z, u0, x, AXES)
                    u, v = _key_gradients(
                        gx, gzx, x, block, step, du_ptr, dv_ptr, local, c, new, t, b, C
                    )
                    sx = s[x] - u[:, None] * v[None, :]
                    zx = z[x] - u
                    if MOVES > AXES:
                        u, v = _key_gradients(
                            gx, gzx, x + AXES, block, step, du_ptr, dv_ptr, local, c, new, t, b,
                            C,
                        )  # fmt: skip
                        sx += u[:, None] * v[None, :]
                        zx += u
                    after, after_z = after + (gx,), after_z + (gzx,)
                    sums, counts = sums + (sx,), counts + (zx,)
                s, z, g, gz = sums, counts, after, after_z
            tl.debug_barrier()
        for x in tl.static_range(MOVES):
            scatter(
                dx_ptr + x * t.all_heads * b.n * b.d, du_ptr + x * b.length * C.BLOCK_F,
                b.x + (x * t.pitch + t.key_row) * b.d, b.d, t.count, new, f, b, C, R,
            )  # fmt: skip
        tl.debug_barrier()
