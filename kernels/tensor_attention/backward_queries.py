"""The backward pass over queries: dq, and with pairs dk1 and dv1; and the gradients of masks."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    NEG_INF,
    POS_INF,
    dot,
    first_axis_span,
    head_queries,
    key_walk,
    keys_of,
    load_row,
    load_rows,
    pair_queries,
    phase_bounds,
    row_penalty,
    row_queries,
    scores,
    split_range,
    store_rows,
    times,
    width_of,
)


@triton.jit
def _power_below_inverse(bound):
    """The power of two in (1 / (2 bound), 1 / bound], between 2^-60 and 2^60.

    2^60 also where the bound is infinite or NaN: what such a query adds is lost anyway, and the
    factor that all queries share is not to follow it.
    """
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) & 255
    inverse = tl.where(exponent == 255, 187, 253 - exponent)
    inverse = tl.minimum(tl.maximum(inverse, 67), 187)
    return (inverse << 23).to(tl.float32, bitcast=True)


@triton.jit
def _differences(dp, delta, factor, LIFTED: tl.constexpr):
    """dP - delta, or with LIFTED factor dP - delta, of a delta that has the factor."""
    if LIFTED:
        return dp * factor[:, None] - delta[:, None]
    else:
        return dp - delta[:, None]


@triton.jit
def _lowered(up, flat, C: tl.constexpr):
    """(delta, factor) of queries, and what takes factor and 2^LIFT out of sums of dS.

    The last two mean nothing without LIFT.
    """
    delta = tl.load(up.delta + flat)
    if up.factor is None:
        return delta, delta, delta
    else:
        factor = tl.load(up.factor + flat)
        return delta * factor, factor, (2.0**-C.LIFT) / factor


@triton.jit
def tensor_attention_bwd_rows_stats_kernel(
    out_ptr,  # [rows, dv]
    dout_ptr,  # [rows, dv]
    lse_ptr,  # float32 [rows]
    dlse_ptr,  # float32 [rows] or None
    size_ptr,  # float32 [B H / GROUP], with factor_ptr: at least |v1_j v2_k|_2 of all keys
    shift_ptr,  # float32 [rows], this and the next two: Upstream
    delta_ptr,
    factor_ptr,
    total_rows,
    head_rows,  # of one key head
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
    bound = tl.zeros_like(delta)  # of |dP - delta|
    if factor_ptr is not None:  # out is a mean of v1_j v2_k, so <dout, out> is bounded as dP is
        size = tl.load(size_ptr + rows // head_rows, mask=inside, other=0.0)
        bound = 2.0 * size * tl.sqrt(tl.sum(dout * dout, axis=1))
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + rows, mask=inside, other=0.0)
        delta -= dlse
        bound += tl.abs(dlse)
    empty = lse == NEG_INF
    if factor_ptr is not None:
        tl.store(factor_ptr + rows, _power_below_inverse(bound), mask=inside)
    tl.store(shift_ptr + rows, tl.where(empty, POS_INF, lse * LOG2E), mask=inside)
    tl.store(delta_ptr + rows, tl.where(empty, 0.0, delta), mask=inside)


@triton.jit
def _block(
    a,  # [BLOCK_M, D] q * k1 with the scale
    b,  # [BLOCK_M, DV] dout * v1
    shift,  # [BLOCK_M] lse less the row's penalty
    delta,  # [BLOCK_M]
    factor,  # [BLOCK_M], with LIFTED
    x,
    queries,
    keys,
    k0,
    edge,
    LIFTED: tl.constexpr,
    C: tl.constexpr,
):
    """P, dS and the tiles of K2 and V2, of the block of keys from k0 on."""
    BLOCK_M: tl.constexpr = C.BLOCK_M
    BLOCK_N: tl.constexpr = C.BLOCK_N
    s, k2, near = scores(a, x, queries, keys, k0, edge, C)
    v2 = load_rows(keys.v2 + near * width_of(x.dv, C.DV, C.EVEN_DV), x.dv, C.DV, C.EVEN_DV)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dp = dot(b, tl.trans(v2), dp, C)
    prob = tl.exp2(s - shift[:, None])
    return prob, prob * _differences(dp, delta, factor, LIFTED), k2, v2


@triton.jit
def tensor_attention_bwd_q_rows_kernel(
    x,  # Inputs
    up,  # Upstream
    dq_ptr,  # [splits, B, H, n_q, d]
    total_rows,  # B H n_q
    scale,
    C: tl.constexpr,  # Constants
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    D: tl.constexpr = C.D
    n_tiles = tl.cdiv(x.n_q * C.PACK, BLOCK_M)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    tile = n_tiles - 1 - pid % n_tiles
    queries, inside = row_queries(x, tile, pid // n_tiles, C)
    keys = keys_of(x, queries.key_head)
    flat = queries.flat
    q = load_rows(x.q + flat * x.d, x.d, D, C.EVEN_D)
    dout = load_rows(up.dout + flat * x.dv, x.dv, C.DV, C.EVEN_DV)
    lse = tl.load(up.shift + flat) - C.LIFT
    delta, factor, lowering = _lowered(up, flat, C)
    j_lo = tl.maximum(queries.p0 - x.left1, 0)
    j_hi = tl.minimum(queries.p1 + x.right1 + 1, x.n_1)
    j_lo, j_hi = split_range(j_lo, j_hi, split)
    over = key_walk(x, queries.p0, queries.p1, C.BLOCK_N)

    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for j in range(j_lo, j_hi):
        k1 = load_row(keys.k1 + j * x.d, x.d, D, C.EVEN_D)
        v1 = load_row(keys.v1 + j * x.dv, x.dv, C.DV, C.EVEN_DV)
        a = (q.to(tl.float32) * (k1 * x.logit_scale)[None, :]).to(q.dtype)
        b = (dout.to(tl.float32) * v1[None, :]).to(dout.dtype)
        shift = lse - row_penalty(x, queries, j, C)
        dx = tl.zeros((BLOCK_M, D), tl.float32)
        # Not one loop with a branch, as with pairs: ptxas serialises its products (C7513).
        for phase in tl.static_range(3):
            if phase == 1 or (C.LIMITED or (phase == 2 and not C.EVEN_N)):
                start, stop = phase_bounds(over, phase)
                for t in range(start, stop):
                    k0 = over.lo + t * C.BLOCK_N
                    _, ds, k2, _ = _block(
                        a, b, shift, delta, factor, x, queries, keys, k0, phase != 1, C.LIFT > 0,
                        C,
                    )  # fmt: skip
                    dx = dot(ds.to(k2.dtype), k2, dx, C)
        dq += dx * k1[None, :]

    if C.LIFT > 0:
        dq *= lowering[:, None]
    flat += split.to(tl.int64) * total_rows
    store_rows(dq_ptr + flat * x.d, dq * scale, inside, x.d, D)


@triton.jit
def _slot_keys(x, p, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr):
    """As pair_keys, but key j of a query stands in row j % BLOCK_J of its rows.

    So that what a tile's queries give to one key stands in the same row of each.
    """
    lo = tl.maximum(p - x.left1, 0)
    j = lo + ((tl.arange(0, BLOCK_M) - lo) & (BLOCK_J - 1))
    valid = j <= tl.minimum(p + x.right1, x.n_1 - 1)
    return tl.minimum(j, x.n_1 - 1), valid


@triton.jit
def _store_part(
    part_ptr, place, z, j, j_lo, keys, width, W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """The sums of z over rows of one key j, at `place` the one of j_lo; rows that count have
    j >= j_lo, `keys` of them."""
    BLOCK_I: tl.constexpr = z.shape[0] // BLOCK_J
    if BLOCK_I <= BLOCK_J:
        # At most two keys in a slot.
        slots = tl.arange(0, BLOCK_J)
        first = (slots - j_lo) & (BLOCK_J - 1)
        for turn in tl.static_range(2):
            if turn == 0 or BLOCK_I > 1:
                at = first + turn * BLOCK_J
                own = (j >= j_lo + turn * BLOCK_J) & (j < j_lo + (turn + 1) * BLOCK_J)
                part = tl.where(own[:, None], z, 0.0)
                part = tl.sum(tl.reshape(part, (BLOCK_I, BLOCK_J, W)), axis=0)
                store_rows(part_ptr + (place + at) * width, part, at < keys, width, W)
    else:  # a product with zeros and ones
        sums = tl.arange(0, SUM_ROWS)
        pick = tl.where(sums[:, None] == (j - j_lo)[None, :], 1.0, 0.0)
        z = tl.dot(pick, z, input_precision=PRECISION)
        store_rows(part_ptr + (place + sums) * width, z, sums < keys, width, W)


@triton.jit
def _key_factor(x, tile, slab, C: tl.constexpr, BLOCK_J: tl.constexpr):
    """A: rows q_i k1_j of queries and their keys j, with the scale."""
    queries = pair_queries(x, tile, slab, C, BLOCK_J)
    j, _ = _slot_keys(x, queries.p, BLOCK_J, C.BLOCK_M)
    q = load_rows(x.q + queries.flat * x.d, x.d, C.D, C.EVEN_D)
    k1 = load_rows(keys_of(x, queries.key_head).k1 + j * x.d, x.d, C.D, C.EVEN_D)
    return (q.to(tl.float32) * k1.to(tl.float32) * x.logit_scale).to(q.dtype)


@triton.jit
def _value_factor(x, up, tile, slab, C: tl.constexpr, BLOCK_J: tl.constexpr):
    """B: rows dout_i v1_j of the same."""
    queries = pair_queries(x, tile, slab, C, BLOCK_J)
    j, _ = _slot_keys(x, queries.p, BLOCK_J, C.BLOCK_M)
    dout = load_rows(up.dout + queries.flat * x.dv, x.dv, C.DV, C.EVEN_DV)
    v1 = load_rows(keys_of(x, queries.key_head).v1 + j * x.dv, x.dv, C.DV, C.EVEN_DV)
    return times(dout, v1, C)


@triton.jit
def tensor_attention_bwd_q_pairs_kernel(
    x,
    up,
    dq_ptr,  # [B, H, n_q, d]
    part_k_ptr,  # float32 [heads of this launch, tiles, span, d]: parts of dk1
    part_v_ptr,  # float32 [heads of this launch, tiles, span, dv]: parts of dv1
    first_head,  # of this launch, among B H
    work,  # tiles of all heads of this launch
    span,
    scale,
    C: tl.constexpr,
    WANT_K: tl.constexpr,
    WANT_V: tl.constexpr,
    SUM_PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr,  # holds every window of axis 1
    SUM_ROWS: tl.constexpr,  # at least BLOCK_J + BLOCK_M / BLOCK_J - 1
):
    BLOCK_M: tl.constexpr = C.BLOCK_M
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    BLOCK_I: tl.constexpr = BLOCK_M // BLOCK_J
    n_tiles = tl.cdiv(x.n_q, BLOCK_I)
    step = tl.program_id(0)
    # What a loop carries is read from shared memory by the products, not from registers.
    a = _key_factor(x, step % n_tiles, step // n_tiles + first_head, C, BLOCK_J)
    while step < work:
        tile = step % n_tiles
        slab = step // n_tiles + first_head
        b = _value_factor(x, up, tile, slab, C, BLOCK_J)
        queries = pair_queries(x, tile, slab, C, BLOCK_J)
        keys = keys_of(x, queries.key_head)
        j, valid = _slot_keys(x, queries.p, BLOCK_J, BLOCK_M)
        # Repeated queries beyond the end count as invalid too.
        i0 = tile * BLOCK_I
        inside = i0 + tl.arange(0, BLOCK_M) // BLOCK_J < x.n_q
        shift = tl.load(up.shift + queries.flat) - C.LIFT
        if x.mask1 is not None:
            rows = x.mask1 + queries.mask1_at + queries.i.to(tl.int64) * x.stride_mask1_row
            shift -= tl.load(rows + j) * LOG2E
        shift = tl.where(valid & inside, shift, POS_INF)
        delta, factor, _ = _lowered(up, queries.flat, C)
        over = key_walk(x, queries.p0, queries.p1, C.BLOCK_N)

        dx = tl.zeros((BLOCK_M, D), tl.float32)
        if WANT_V:
            y = tl.zeros((BLOCK_M, DV), tl.float32)
        for t in range(over.end):
            edge = (t < over.first) | (t >= over.last)
            k0 = over.lo + t * C.BLOCK_N
            prob, ds, k2, v2 = _block(
                a, b, shift, delta, factor, x, queries, keys, k0, edge, C.LIFT > 0, C
            )
            dx = dot(ds.to(k2.dtype), k2, dx, C)
            if WANT_V:
                y = dot(prob.to(v2.dtype), v2, y, C)

        # The rows again, from what the compiler cannot know to be `tile`: it would keep all of them
        # in registers during the loop.
        again = tile + (tl.cast(x.n_q, tl.int32) < 0).to(tl.int32)
        queries = pair_queries(x, again, slab, C, BLOCK_J)
        j, valid = _slot_keys(x, queries.p, BLOCK_J, BLOCK_M)
        i0 = again * BLOCK_I
        valid = valid & (i0 + tl.arange(0, BLOCK_M) // BLOCK_J < x.n_q)
        if C.LIFT > 0:
            dx *= _lowered(up, queries.flat, C)[2][:, None]
            if WANT_V:
                y *= 2.0**-C.LIFT
        k1 = load_rows(keys.k1 + j * x.d, x.d, D, C.EVEN_D).to(tl.float32)
        dq = tl.sum(tl.reshape(dx * k1, (BLOCK_I, BLOCK_J, D)), axis=1) * scale
        own = i0 + tl.arange(0, BLOCK_I)
        flat = slab.to(tl.int64) * x.n_q + own
        store_rows(dq_ptr + flat * x.d, dq, own < x.n_q, x.d, D)
        _, _, j_lo, j_hi = first_axis_span(
            again, BLOCK_I, x.n_q, -x.q_offset, x.q_offset, x.n_q, x.n_1, x.q_offset, x.left1,
            x.right1,
        )  # fmt: skip
        place = step.to(tl.int64) * span
        j = tl.where(valid, j, -1)
        if WANT_K:
            z = dx * load_rows(x.q + queries.flat * x.d, x.d, D, C.EVEN_D).to(tl.float32)
            _store_part(
                part_k_ptr, place, z, j, j_lo, j_hi - j_lo, x.d, D, SUM_PRECISION, BLOCK_J,
                SUM_ROWS,
            )  # fmt: skip
        if WANT_V:
            z = y * load_rows(up.dout + queries.flat * x.dv, x.dv, DV, C.EVEN_DV).to(tl.float32)
            _store_part(
                part_v_ptr, place, z, j, j_lo, j_hi - j_lo, x.dv, DV, SUM_PRECISION, BLOCK_J,
                SUM_ROWS,
            )  # fmt: skip

        step += tl.num_programs(0)
        a = tl.zeros((BLOCK_M, D), x.q.dtype.element_ty)
        if step < work:
            a = _key_factor(x, step % n_tiles, step // n_tiles + first_head, C, BLOCK_J)


@triton.jit
def tensor_attention_bwd_mask_kernel(
    x,
    up,
    dmask_ptr,  # float32 [mask1's B, mask1's H, n_q, n_1], zeros on entry
    mask_heads,  # 1 or n_heads
    slabs,  # mask_heads times the masks of a batch
    batches,  # this and the next: how many of either share one mask
    heads,
    C: tl.constexpr,
    KEYS: tl.constexpr,  # of axis 1, per program
):
    """dmask1; called with the axes exchanged it gives dmask2.

    Heads and batches that share the mask are added up by the program that owns the result.
    """
    BLOCK_M: tl.constexpr = C.BLOCK_M
    n_tiles = tl.cdiv(x.n_q, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % n_tiles
    slab = pid // n_tiles % slabs
    j0 = pid // n_tiles // slabs * KEYS
    batch0 = slab // mask_heads
    head0 = slab % mask_heads
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i = tl.minimum(rows, x.n_q - 1)
    p0 = tile * BLOCK_M + x.q_offset
    p1 = tl.minimum(tile * BLOCK_M + BLOCK_M, x.n_q) - 1 + x.q_offset
    j_lo = tl.maximum(j0, p0 - x.left1)
    j_hi = tl.minimum(tl.minimum(j0 + KEYS, x.n_1), p1 + x.right1 + 1)
    over = key_walk(x, p0, p1, C.BLOCK_N)
    out = dmask_ptr + (slab.to(tl.int64) * x.n_q + i) * x.n_1
    for j in range(j_lo, j_hi):
        acc = tl.zeros((BLOCK_M,), tl.float32)
        for member in range(batches * heads):
            batch = batch0 + member // heads
            head = head0 + member % heads
            queries = head_queries(x, batch, head, i, p0, p1, C)
            keys = keys_of(x, queries.key_head)
            q = load_rows(x.q + queries.flat * x.d, x.d, C.D, C.EVEN_D)
            dout = load_rows(up.dout + queries.flat * x.dv, x.dv, C.DV, C.EVEN_DV)
            k1 = load_row(keys.k1 + j * x.d, x.d, C.D, C.EVEN_D)
            v1 = load_row(keys.v1 + j * x.dv, x.dv, C.DV, C.EVEN_DV)
            a = (q.to(tl.float32) * (k1 * x.logit_scale)[None, :]).to(q.dtype)
            b = (dout.to(tl.float32) * v1[None, :]).to(dout.dtype)
            shift = tl.load(up.shift + queries.flat) - row_penalty(x, queries, j, C)
            delta = tl.load(up.delta + queries.flat)
            for phase in tl.static_range(3):
                if phase == 1 or (C.LIMITED or (phase == 2 and not C.EVEN_N)):
                    start, stop = phase_bounds(over, phase)
                    for t in range(start, stop):
                        k0 = over.lo + t * C.BLOCK_N
                        _, ds, _, _ = _block(
                            a, b, shift, delta, delta, x, queries, keys, k0, phase != 1, False, C
                        )
                        acc += tl.sum(ds, axis=1)
        tl.store(out + j, acc, mask=rows < x.n_q)
