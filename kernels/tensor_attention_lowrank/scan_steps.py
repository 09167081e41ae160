"""What the kernels of the scan share: their arguments, where a program works, one token's step."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .features import column_of, dot_with_exact, factor, features

# -------------------------------------------------------------------------------------- arguments


class Band(NamedTuple):
    """The problem: tensors, then numbers."""

    q: Any  # [batch, head, n, d]
    x: Any  # [MOVES, batch * key head, n, d]: the key that enters, or leaves, with query t
    v: Any  # [MOVES, batch * key head, n, dv]
    kept: Any  # [MOVES, batch * key head, n] of bytes or None
    starts: Any  # [chunk, AXES, batch * key head, rank, dv + 1]
    weight: Any  # [rank]
    index: Any  # [rank, DEGREE]
    staged: Any  # scratch [program, MOVES + 1, BLOCK_T, BLOCK_F]
    n: Any
    d: Any
    dv: Any
    rank: Any
    heads: Any
    all_heads: Any  # of all batches
    group: Any  # query heads of a key head
    length: Any  # tokens of a chunk
    shares: Any  # programs that share the features of a chunk
    stride_q_batch: Any
    stride_q_head: Any
    stride_q_row: Any


class Constants(NamedTuple):
    AXES: int
    MOVES: int  # AXES keys that enter, then none or AXES that leave
    DEGREE: int
    BLOCK_F: int  # features that a program holds at a time
    BLOCK_C: int  # dv, padded
    BLOCK_T: int  # tokens that are staged


class Scatter(NamedTuple):
    """Constants of the products that scatter the gradients of features."""

    BLOCK_R: int  # rows at a time
    D: int  # d, padded
    PRECISION: str


class Chunk(NamedTuple):
    """Where a program works."""

    chunk: Any
    share: Any
    head: Any  # of all batches
    all_heads: Any
    program: Any
    begin: Any  # first token
    count: Any  # of tokens
    q: Any  # pointer to the first token's query
    key_row: Any  # index of the first token's key
    pitch: Any  # rows from one move to the next
    u: Any  # scratch of the keys' features, then of the queries'
    u0: Any
    starts: Any  # pointer to the states before the first token
    states: Any  # size of the states of an axis, all key heads


@triton.jit
def chunk_of(b, C: tl.constexpr):
    place = tl.program_id(0) // b.all_heads  # chunk and share
    chunk, share = place // b.shares, place % b.shares
    head = (tl.program_id(0) % b.all_heads).to(tl.int64)
    all_heads = tl.cast(b.all_heads, tl.int64)
    key_heads = tl.cast(b.all_heads // b.group, tl.int64)
    key_head = head // b.group  # group divides heads: the batch carries over
    begin = (chunk * b.length).to(tl.int64)
    count = tl.minimum(b.length, b.n - chunk * b.length)
    q = b.q + head // b.heads * b.stride_q_batch + head % b.heads * b.stride_q_head
    program = tl.program_id(0).to(tl.int64)
    u = b.staged + program * (C.MOVES + 1) * C.BLOCK_T * C.BLOCK_F
    state = b.rank * (b.dv + 1)
    return Chunk(
        chunk,
        share,
        head,
        all_heads,
        program,
        begin,
        count,
        q + begin * b.stride_q_row,
        key_head * b.n + begin,
        key_heads * b.n,
        u,
        u + C.MOVES * C.BLOCK_T * C.BLOCK_F,
        b.starts + (chunk * C.AXES * key_heads + key_head) * state,
        key_heads * state,
    )


# ---------------------------------------------------------------------------------------- staging


@triton.jit
def _stage(u_ptr, rows_ptr, stride, kept_ptr, count, weight, f, b, C: tl.constexpr):
    """Features of a block of tokens to scratch [BLOCK_T, BLOCK_F], times weight; 0 if padded.

    Read back token by token they come in a few wide loads; gathered there, every thread would
    load every factor.
    """
    rows = tl.arange(0, C.BLOCK_T)
    kept = rows < count
    if kept_ptr is not None:
        kept = kept & (tl.load(kept_ptr + rows, mask=kept, other=0) != 0)
    row_ptrs = rows_ptr + rows.to(tl.int64) * stride
    u = weight[None, :] * features(row_ptrs, kept, b.index, f, b.rank, b.d, C.DEGREE)
    tl.store(u_ptr + rows[:, None] * C.BLOCK_F + tl.arange(0, C.BLOCK_F)[None, :], u)


@triton.jit
def stage_keys(t, block, count, f, b, C: tl.constexpr):
    """Those of the keys from token `block` of the chunk on, per move."""
    MOVES: tl.constexpr = C.MOVES
    BLOCK_F: tl.constexpr = C.BLOCK_F
    ones = tl.full((BLOCK_F,), 1.0, tl.float32)
    for x in tl.static_range(MOVES):
        at = x * t.pitch + t.key_row + block
        kept_ptr = b.kept
        if b.kept is not None:
            kept_ptr = b.kept + at
        u_ptr = t.u + x * C.BLOCK_T * BLOCK_F
        _stage(u_ptr, b.x + at * b.d, b.d, kept_ptr, count, ones, f, b, C)


@triton.jit
def stage_tokens(t, block, count, weight, f, b, C: tl.constexpr):
    """Those of keys and, times weight, queries."""
    stage_keys(t, block, count, f, b, C)
    rows_ptr = t.q + block * b.stride_q_row
    _stage(t.u0, rows_ptr, b.stride_q_row, None, count, weight, f, b, C)


# ----------------------------------------------------------------------------------------- states


@triton.jit
def _key(u_ptr, v_ptr, pitch, move, local, c, b, C: tl.constexpr):
    """(features, values) of a key that has been staged; the pointers are to those of move 0."""
    u = tl.load(u_ptr + move * C.BLOCK_T * C.BLOCK_F + local)
    return u, tl.load(v_ptr + move * pitch * b.dv + c, mask=c < b.dv, other=0.0)


@triton.jit
def staged_key(t, move, block, step, local, c, b, C: tl.constexpr):
    u_ptr = t.u + step * C.BLOCK_F
    v_ptr = b.v + (t.key_row + block + step) * b.dv
    return _key(u_ptr, v_ptr, t.pitch, move, local, c, b, C)


@triton.jit
def advanced(s, z, t, block, step, local, c, b, C: tl.constexpr):
    """The states after the moves of a token."""
    AXES: tl.constexpr = C.AXES
    u_ptr = t.u + step * C.BLOCK_F
    v_ptr = b.v + (t.key_row + block + step) * b.dv
    sums, counts = (), ()
    for x in tl.static_range(AXES):
        u, v = _key(u_ptr, v_ptr, t.pitch, x, local, c, b, C)
        sx = s[x] + u[:, None] * v[None, :]
        zx = z[x] + u
        if C.MOVES > AXES:
            u, v = _key(u_ptr, v_ptr, t.pitch, x + AXES, local, c, b, C)
            sx -= u[:, None] * v[None, :]
            zx -= u
        sums, counts = sums + (sx,), counts + (zx,)
    return sums, counts


@triton.jit
def product(terms, like, without: tl.constexpr, AXES: tl.constexpr):
    """Of all terms but one."""
    found = tl.full(like.shape, 1.0, tl.float32)
    for x in tl.static_range(AXES):
        if x != without:
            found = found * terms[x]
    return found


@triton.jit
def load_states(ptr, stride, f, c, rank, dv, AXES: tl.constexpr):
    sums, counts = (), ()
    for x in tl.static_range(AXES):
        at = ptr + x * stride + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        sums = sums + (tl.load(at[:, None] + c[None, :], mask=inside, other=0.0),)
        counts = counts + (tl.load(at + dv, mask=f < rank, other=0.0),)
    return sums, counts


@triton.jit
def store_states(ptr, stride, s, z, f, c, rank, dv, AXES: tl.constexpr):
    for x in tl.static_range(AXES):
        at = ptr + x * stride + f * (dv + 1)
        inside = (f < rank)[:, None] & (c < dv)[None, :]
        tl.store(at[:, None] + c[None, :], s[x], mask=inside)
        tl.store(at + dv, z[x], mask=f < rank)


@triton.jit
def zeros(f, c, AXES: tl.constexpr):
    sums, counts = (), ()
    for _ in tl.static_range(AXES):
        sums = sums + (tl.zeros((f.shape[0], c.shape[0]), tl.float32),)
        counts = counts + (tl.zeros((f.shape[0],), tl.float32),)
    return sums, counts


# ---------------------------------------------------------------------------------------- results


@triton.jit
def add(ptr, value, inside, new):
    """Adds to rows that this program owns; `new`: they hold nothing yet."""
    if new:
        tl.store(ptr, value, mask=inside)
    else:
        tl.store(ptr, tl.load(ptr, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def scatter(dx_ptr, du_ptr, x_ptr, stride_x, count, new, f, b, C: tl.constexpr, R: tl.constexpr):
    """Adds the gradients of `count` rows x to dx [count, d], from those of their features."""
    DEGREE: tl.constexpr = C.DEGREE
    BLOCK_R: tl.constexpr = R.BLOCK_R
    D: tl.constexpr = R.D
    l = tl.arange(0, D)
    for first in range(0, count, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        kept = rows < count
        at = du_ptr + rows[:, None] * C.BLOCK_F + tl.arange(0, C.BLOCK_F)[None, :]
        du = tl.load(at, mask=kept[:, None], other=0.0)
        row_ptrs = x_ptr + rows.to(tl.int64) * stride_x
        dx = tl.zeros((BLOCK_R, D), tl.float32)
        for t in tl.static_range(DEGREE):
            others = du
            for o in tl.static_range(DEGREE):
                if o != t:
                    column = column_of(b.index, f, b.rank, b.d, o, DEGREE)
                    others *= factor(row_ptrs, kept, column, b.d)
            column = column_of(b.index, f, b.rank, b.d, t, DEGREE)
            hit = (column[:, None] == l[None, :]).to(tl.float32)
            dx = dot_with_exact(others, hit, dx, R.PRECISION)
        at = dx_ptr + rows.to(tl.int64)[:, None] * b.d + l[None, :]
        add(at, dx, kept[:, None] & (l < b.d)[None, :], new)
