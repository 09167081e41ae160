"""The backward pass over the keys of axis 2: dk2 and dv2, by rows also the parts of dk1 and dv1."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    NEG_INF,
    POS_INF,
    dot,
    first_axis_span,
    key_tile,
    keys_of,
    load_row,
    load_rows,
    pair_keys,
    phase_bounds,
    split_range,
    store_rows,
    times,
    walk,
    width_of,
)


@triton.jit
def _query_walk(tile, x, p_lo, p_hi, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Over the queries at positions p_lo .. p_hi, FACTOR rows each; and where they end."""
    lo = p_lo - x.q_offset
    hi = p_hi - x.q_offset + 1
    full_lo = tl.maximum(tile.last - x.right2 - x.q_offset, lo)
    full_hi = tl.minimum(tile.k0 + x.left2 - x.q_offset + 1, hi)
    return walk(lo * FACTOR, hi * FACTOR, full_lo * FACTOR, full_hi * FACTOR, BLOCK), hi * FACTOR


@triton.jit
def _masked(s, x, tile, i, mask2_at, edge, ONE: tl.constexpr, C: tl.constexpr):
    """Scores [keys of the tile, rows] with mask2 and, at an edge, windows.

    i: the rows' queries, or with ONE that of all; mask2_at: of each row, or of all.
    """
    if x.mask2 is not None:
        if C.MASK2_ROWS:
            mask2_at += i.to(tl.int64) * x.stride_mask2_row
        if C.MASK2_ROWS and not ONE:
            s += tl.load(x.mask2 + mask2_at[None, :] + tile.near[:, None]) * LOG2E
        else:
            s += (tl.load(x.mask2 + mask2_at + tile.near) * LOG2E)[:, None]
    if C.LIMITED:
        if edge:
            # One comparison of an unsigned difference.
            first = i + x.q_offset - x.left2
            if ONE:
                ahead = (tile.near - first)[:, None]
            else:
                ahead = tile.near[:, None] - first[None, :]
            s = tl.where(ahead.to(tl.uint32) <= x.left2 + x.right2, s, NEG_INF)
    return s


@triton.jit
def _score_gradients(prob, dp, delta, common, C: tl.constexpr):
    """dS, with LIFT times `common`; delta: a row, or one number."""
    if C.LIFT > 0:
        return prob * (dp * common - delta * common)
    else:
        return prob * (dp - delta)


@triton.jit
def _common(up, key_head, C: tl.constexpr):
    """The factor that all queries share, and what takes it and 2^LIFT out of sums of dS."""
    if up.common is None:
        return 1.0, 1.0
    else:
        common = tl.load(up.common + key_head)
        return common, (2.0**-C.LIFT) / common


@triton.jit
def _query(x, up, at, C: tl.constexpr):
    """Rows of q and dout, shift and delta of one query."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    d_cols = tl.arange(0, D)
    dv_cols = tl.arange(0, DV)
    q = tl.load(x.q + at * x.d + d_cols, mask=d_cols < x.d, other=0.0)
    dout = tl.load(up.dout + at * x.dv + dv_cols, mask=dv_cols < x.dv, other=0.0)
    return q, dout, tl.load(up.shift + at), tl.load(up.delta + at)


@triton.jit
def tensor_attention_bwd_kv_rows_kernel(
    x,  # Inputs
    up,  # Upstream
    dk2_ptr,  # [splits, heads, n_2, d], used with WANT_K
    dv2_ptr,  # [splits, heads, n_2, dv], used with WANT_V
    part_k_ptr,  # float32 [heads of this launch, blocks, span, d]: parts of dk1
    part_v_ptr,  # float32 [heads of this launch, blocks, span, dv]: parts of dv1
    first_head,  # of this launch, among B H / GROUP
    result_head,  # the head that dk2 and dv2 begin with
    span,
    split_keys,  # from one split of dk2, dv2 to the next
    scale,
    C: tl.constexpr,  # Constants; BLOCK_M of axis 2, BLOCK_N rows: query GROUP + head of the group
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    BLOCK_N: tl.constexpr = C.BLOCK_N
    n_blocks = tl.cdiv(x.n_2, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    block = pid % n_blocks
    key_head = (pid // n_blocks + first_head).to(tl.int64)
    key_heads = x.n_heads // C.GROUP
    batch = key_head // key_heads
    head0 = key_head % key_heads * C.GROUP
    flat0 = (batch * x.n_heads + head0) * x.n_q
    keys = keys_of(x, key_head)
    tile = key_tile(x, keys, block, C)
    inside = tile.k < x.n_2

    p_lo, p_hi, j_lo, j_hi = first_axis_span(
        block, BLOCK_M, x.n_2, x.right2, x.left2, x.n_q, x.n_1, x.q_offset, x.left1, x.right1
    )
    common, lowering = _common(up, key_head, C)
    part_row = (pid.to(tl.int64) * span - j_lo).to(tl.int64)
    j_start, j_stop = split_range(j_lo, j_hi, split)
    d_cols = tl.arange(0, D)
    dv_cols = tl.arange(0, DV)

    if WANT_K:
        dk2 = tl.zeros((BLOCK_M, D), tl.float32)
    if WANT_V:
        dv2 = tl.zeros((BLOCK_M, DV), tl.float32)
    for j in range(j_start, j_stop):
        k1 = load_row(keys.k1 + j * x.d, x.d, D, C.EVEN_D)
        v1 = load_row(keys.v1 + j * x.dv, x.dv, DV, C.EVEN_DV)
        a = (tile.k2.to(tl.float32) * (k1 * x.logit_scale)[None, :]).to(tile.k2.dtype)
        if WANT_K:
            b = (tile.v2.to(tl.float32) * v1[None, :]).to(tile.v2.dtype)
            g = tl.zeros((BLOCK_M, D), tl.float32)
        if WANT_V:
            w = tl.zeros((BLOCK_M, DV), tl.float32)
        # Queries with j in their window: an exact range. Not so for the block's keys k.
        over, row_hi = _query_walk(
            tile, x, tl.maximum(p_lo, j - x.right1), tl.minimum(p_hi, j + x.left1), C.GROUP,
            BLOCK_N,
        )  # fmt: skip
        for phase in tl.static_range(3):
            # Rows beyond the end need no masked tile: their shift is +inf.
            if phase != 0 or C.LIMITED:
                start, stop = phase_bounds(over, phase)
                for t in range(start, stop):
                    rows = over.lo + t * BLOCK_N + tl.arange(0, BLOCK_N)
                    live = rows < row_hi
                    near = tl.minimum(rows, row_hi - 1)
                    i = near // C.GROUP
                    head = near % C.GROUP
                    flat = flat0 + head.to(tl.int64) * x.n_q + i
                    q = load_rows(x.q + flat * x.d, x.d, D, C.EVEN_D)
                    dout = load_rows(up.dout + flat * x.dv, x.dv, DV, C.EVEN_DV)
                    # +inf hides rows beyond the end.
                    shift = tl.load(up.shift + flat, mask=live, other=POS_INF) - C.LIFT
                    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    s = dot(a, tl.trans(q), s, C)
                    if x.mask1 is not None:
                        at = batch * x.stride_mask1_b + (head0 + head) * x.stride_mask1_h
                        at += i.to(tl.int64) * x.stride_mask1_row
                        shift -= tl.load(x.mask1 + at + j) * LOG2E
                    mask2_at = batch * x.stride_mask2_b + head0 * x.stride_mask2_h
                    if C.MASK2_ROWS:
                        mask2_at += head.to(tl.int64) * x.stride_mask2_h
                    s = _masked(s, x, tile, i, mask2_at, phase != 1, False, C)
                    prob = tl.exp2(s - shift[None, :])
                    if WANT_V:
                        w = dot(prob.to(dout.dtype), dout, w, C)
                    if WANT_K:
                        delta = tl.load(up.delta + flat, mask=live, other=0.0)
                        dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                        dp = dot(b, tl.trans(dout), dp, C)
                        ds = _score_gradients(prob, dp, delta[None, :], common, C)
                        g = dot(ds.to(q.dtype), q, g, C)
        # Repeated rows beyond the end must not enter the column sums.
        if WANT_K:
            if C.LIFT > 0:
                g *= lowering
            dk2 += g * k1[None, :]
            g *= tile.k2.to(tl.float32)
            if not C.EVEN_N:
                g = tl.where(inside[:, None], g, 0.0)
            ptrs = part_k_ptr + (part_row + j) * x.d + d_cols
            tl.store(ptrs, tl.sum(g, axis=0), mask=d_cols < x.d)
        if WANT_V:
            if C.LIFT > 0:
                w *= 2.0**-C.LIFT
            dv2 += w * v1[None, :]
            w *= tile.v2.to(tl.float32)
            if not C.EVEN_N:
                w = tl.where(inside[:, None], w, 0.0)
            ptrs = part_v_ptr + (part_row + j) * x.dv + dv_cols
            tl.store(ptrs, tl.sum(w, axis=0), mask=dv_cols < x.dv)

    flat_k = split.to(tl.int64) * split_keys + (key_head - result_head) * x.n_2 + tile.k
    if WANT_K:
        store_rows(dk2_ptr + flat_k * x.d, dk2 * scale, inside, x.d, D)
    if WANT_V:
        store_rows(dv2_ptr + flat_k * x.dv, dv2, inside, x.dv, DV)


@triton.jit
def tensor_attention_parts_kernel(
    part_ptr,  # float32 [heads of this launch HEADS, n_blocks, span, width]
    out_ptr,  # [key heads of all launches, n_1, width]
    first_head,  # the first key head of this launch
    n_blocks,
    span,
    n_axis,
    back,  # this and the next: first_axis_span
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
            _, _, j_lo, j_hi = first_axis_span(
                block, STEP, n_axis, back, ahead, n_q, n_1, q_offset, left1, right1
            )
            row = ((local * HEADS + head) * n_blocks + block) * span + (j - j_lo)
            here = ((j >= j_lo) & (j < j_hi))[:, None] & (cols < width)
            acc += tl.load(part_ptr + (row * width)[:, None] + cols, mask=here, other=0.0)
    rows = (local + first_head) * n_1 + j
    store_rows(out_ptr + rows * width, acc * factor, j < n_1, width, W)


@triton.jit
def tensor_attention_bwd_kv_pairs_kernel(
    x,
    up,
    dk2_ptr,  # [B, H / GROUP, n_2, d], used with WANT_K
    dv2_ptr,  # [B, H / GROUP, n_2, dv], used with WANT_V
    C: tl.constexpr,  # BLOCK_M of axis 2, BLOCK_N pairs (i, j)
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    BLOCK_J: tl.constexpr,  # holds every window of axis 1
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    BLOCK_N: tl.constexpr = C.BLOCK_N
    BLOCK_I: tl.constexpr = BLOCK_N // BLOCK_J
    n_blocks = tl.cdiv(x.n_2, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % n_blocks
    key_head = (pid // n_blocks).to(tl.int64)
    key_heads = x.n_heads // C.GROUP
    batch = key_head // key_heads
    keys = keys_of(x, key_head)
    tile = key_tile(x, keys, block, C)

    p_lo, p_hi, _, _ = first_axis_span(
        block, BLOCK_M, x.n_2, x.right2, x.left2, x.n_q, x.n_1, x.q_offset, x.left1, x.right1
    )
    common, lowering = _common(up, key_head, C)
    d = width_of(x.d, D, C.EVEN_D)
    dv = width_of(x.dv, DV, C.EVEN_DV)
    over, i_hi = _query_walk(tile, x, p_lo, p_hi, 1, BLOCK_I)
    if WANT_K:
        dk2 = tl.zeros((BLOCK_M, D), tl.float32)
    if WANT_V:
        dv2 = tl.zeros((BLOCK_M, DV), tl.float32)
    for member in range(C.GROUP):
        head = key_head % key_heads * C.GROUP + member
        flat0 = (batch * x.n_heads + head) * x.n_q
        if BLOCK_I == 1:
            i = tl.maximum(tl.minimum(over.lo, i_hi - 1), 0)
            q_row, dout_row, shift, delta = _query(x, up, flat0 + i, C)
        for t in range(over.end):
            i = over.lo + t * BLOCK_I
            if BLOCK_I > 1:
                i += tl.arange(0, BLOCK_N) // BLOCK_J
                live = i < i_hi
                i = tl.minimum(i, i_hi - 1)
            j, valid = pair_keys(x, i + x.q_offset, 0, BLOCK_J, BLOCK_N)
            k1 = load_rows(keys.k1 + j * d, x.d, D, C.EVEN_D)
            v1 = load_rows(keys.v1 + j * dv, x.dv, DV, C.EVEN_DV)
            if BLOCK_I > 1:
                q = load_rows(x.q + (flat0 + i) * d, x.d, D, C.EVEN_D).to(tl.float32)
                dout = load_rows(up.dout + (flat0 + i) * dv, x.dv, DV, C.EVEN_DV)
                shift = tl.load(up.shift + flat0 + i)
                deltas = tl.load(up.delta + flat0 + i)[None, :]
                valid = valid & live
            else:  # one query for all rows: numbers and one row, loaded while the last one was used
                q = q_row.to(tl.float32)[None, :]
                dout = dout_row[None, :]
                deltas = delta
            a = (k1.to(tl.float32) * (q * x.logit_scale)).to(k1.dtype)
            b = times(v1, dout, C)
            lse = shift - C.LIFT
            if x.mask1 is not None:
                at = batch * x.stride_mask1_b + head * x.stride_mask1_h
                at += i.to(tl.int64) * x.stride_mask1_row
                lse -= tl.load(x.mask1 + at + j) * LOG2E
            lse = tl.where(valid, lse, POS_INF)
            if BLOCK_I == 1:
                q_row, dout_row, shift, delta = _query(
                    x, up, flat0 + tl.minimum(i + 1, i_hi - 1), C
                )
            s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            s = dot(tile.k2, tl.trans(a), s, C)
            mask2_at = batch * x.stride_mask2_b + head * x.stride_mask2_h
            s = _masked(
                s, x, tile, i, mask2_at, (t < over.first) | (t >= over.last), BLOCK_I == 1, C
            )
            prob = tl.exp2(s - lse[None, :])
            if WANT_V:
                dv2 = dot(prob.to(b.dtype), b, dv2, C)
            if WANT_K:
                dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                dp = dot(tile.v2, tl.trans(b), dp, C)
                ds = _score_gradients(prob, dp, deltas, common, C)
                dk2 = dot(ds.to(a.dtype), a, dk2, C)

    flat_k = key_head * x.n_2 + tile.k
    inside = tile.k < x.n_2
    if C.LIFT > 0:
        if WANT_K:
            dk2 *= lowering
        if WANT_V:
            dv2 *= 2.0**-C.LIFT
    if WANT_K:  # a holds s log2(e)
        store_rows(dk2_ptr + flat_k * x.d, dk2 * LN2, inside, x.d, D)
    if WANT_V:
        store_rows(dv2_ptr + flat_k * x.dv, dv2, inside, x.dv, DV)
