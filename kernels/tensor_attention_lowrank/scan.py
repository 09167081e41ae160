"""Near-linear tensor attention with causality or windows: which keys a query sees moves with it.

With the features U of the package the states of axis x are running sums,

  S_x[t] = S_x[t - 1] + U(enters)^T [v | 1] - U(leaves)^T [v | 1]   (r x (dv + 1) per head)
  [N | y][t] = sum_a w_a U0[t, a] prod_x S_x[t][a],   out = N / y,   lse = log y + c

With a query one key at most comes into sight, and one goes out, per axis: the moves. With
dS[t] = w U0[t]^T [dN | dy][t] the gradients are

  dU0[t] = w <[dN | dy][t], prod_x S_x[t]>                        queries, first token to last
  D_x[t] = D_x[t + 1] + dS[t] * prod_{x' != x} S_x'[t]            keys, last token to first
  dv = U D_x[t],   dU = <[v | 1], D_x[t]>                         of the key that enters with t;
                                                                  minus that of the one that leaves

The products over the axes are taken per token, so that none of this is a product of matrices: it
is multiply-adds on r x (dv + 1) numbers per token and axis.

Who owns what. Tokens are cut into chunks. What a chunk starts with is a product of matrices (the
state kernel): of the keys in its first window, or of each chunk's keys, which the prefix kernel
adds up in place. Then a program owns a chunk and a share of the features: BLOCK_F features times
all value columns per axis stay in registers while it walks the chunk's tokens; the next features
start over. What sums over the features ([N | y], dx, dv) is collected in rows that only this
program writes, one copy per share; the copies are added up in order. Every sum has a fixed order:
the same inputs give the same bits.

Features of BLOCK_T tokens are made at a time and staged in scratch of the program, from which every
thread reads the BLOCK_F of a token in wide loads. dU goes through scratch of [chunk, BLOCK_F] to be
scattered to dx by a product with zeros and ones. The backward of the keys undoes the moves as it
walks back; so that rounding does not pile up it starts each BLOCK_T tokens from a state that a walk
forward has left in scratch. D of an axis with a window starts at 0 in every chunk, and the keys of
the chunk's first window get what is then missing as a product of matrices: differences of sums over
all later tokens would lose digits. A chunk is no shorter than a window.

Operations per token, feature and value column, in multiply-adds or products, m axes without
windows: forward 2 m, queries 3 m + 1, keys 5 m + 1; a window adds m, m and 4 m. For m = g = 2,
n = 65536, d = dv = 64: 9.1e9 of these numbers, causal 37 G operations forward and 165 G backward
per head.
Memory: heads are taken in groups whose scratch in the backward fits SCRATCH_BYTES, and the copies
per share are as many as keep that of a group below 4 times its inputs (or SMALL_SCRATCH, if that is
more); the copies of the forward are at most as large as its inputs.
Traffic: chunk states r (dv + 1) 4 bytes per axis, chunk and head, written once, scanned, read once
per walk; above STATE_BYTES of them chunks get longer. Rows of q, x, v once per feature tile, from
the first-level cache. Copies per share: n (dv + 1) 4 bytes forward, moves n (d + dv) 4 backward.

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

from .. import _tensor_attention_lowrank_plan as plan
from .._launch import cdiv, device_guard
from .features import dense_rows, feature_weights, monomials
from .scan_kernels import (
    tensor_attention_lowrank_prefix_kernel,
    tensor_attention_lowrank_scan_kernel,
    tensor_attention_lowrank_scan_key_gradient_kernel,
    tensor_attention_lowrank_scan_query_gradient_kernel,
)
from .scan_steps import Band, Constants, Scatter
from .whole import PRECISION, STATE, gradient, gradients_of_sums, state, state_parts

BLOCK_F = 16  # features that a program holds at a time
BLOCK_R = 16  # rows that are scattered at a time
_PROGRAMS = 2048  # of one to four warps: they fill every GPU at hand
SCRATCH_BYTES = 2 << 30  # of the backward of a group of heads, where more than one head fits
SMALL_SCRATCH = 256 << 20  # not worth saving


class Config(NamedTuple):
    num_warps: int  # for at most 64 value columns; twice as many beyond
    block_t: int  # tokens that are staged, and between two saved states


# So that no register is spilled on sm_90 for m = g = 2 and aligned rows. Not tuned.
FORWARD = Config(1, 32)
QUERY = Config(2, 16)
KEY = Config(4, 16)


class _Scan(NamedTuple):
    """The keys that move, one per move and query, and how the queries are cut up."""

    x: torch.Tensor  # [moves, batch, key heads, n, d], 0 where there is no key or it is padded
    v: torch.Tensor  # [moves, batch, key heads, n, dv]
    kept: torch.Tensor | None  # [moves, batch, key heads, n] of bytes; None: all
    starts: torch.Tensor  # [chunks, axes, batch, key heads, r, dv + 1]
    index: torch.Tensor
    weights: torch.Tensor
    length: int  # tokens of a chunk
    shares: int  # programs that share the features of a chunk

    @property
    def grid(self) -> int:
        return self.starts.shape[0] * self.shares


def _rows_from(k, v, mask, start: int, count: int):
    """(k, v, kept) of the keys start, ..., start + count - 1: zeros where there is none.

    kept is of bytes, or None if all are there.
    """
    low, high = (min(max(at, 0), k.shape[2]) for at in (start, start + count))
    if mask is None and high - low == count:
        return k[:, :, low:high], v[:, :, low:high], None
    inside, rows = slice(low, high), slice(low - start, high - start)
    kept = k.new_zeros((*k.shape[:2], count), dtype=torch.uint8)
    kept[:, :, rows] = True if mask is None else mask[:, :, inside]
    found = []
    for t in (k, v):
        part = t[:, :, inside]
        if mask is not None:  # what stands in padded rows may be NaN
            part = torch.where(mask[:, :, inside].unsqueeze(-1), part, 0.0)
        found.append(t.new_zeros((*t.shape[:2], count, t.shape[3])))
        found[-1][:, :, rows] = part
    return *found, kept


def _add_rows(target: torch.Tensor, gradients: torch.Tensor, start: int, sign: int) -> None:
    """Undoes _rows_from, for gradients."""
    n, count = target.shape[2], gradients.shape[2]
    low, high = (min(max(at, 0), n) for at in (start, start + count))
    target[:, :, low:high].add_(gradients[:, :, low - start : high - start], alpha=sign)


def _first_windows(k, v, mask, shift: plan.Shift, offset: int, chunks: int, length: int):
    """(k, v, kept) of the keys in sight before each chunk: (chunks * batch, heads, span, ..)."""

    def cut(t):
        return t.unflatten(2, (chunks, length))[:, :, :, : shift.span].movedim(2, 0).flatten(0, 1)

    k, v, kept = _rows_from(k, v, mask, offset - shift.leaves, chunks * length)
    return cut(k), cut(v), None if kept is None else cut(kept)


def _moves(keys, values, masks, shifts, offset: int, n: int):
    """(x, v, kept) of a _Scan."""
    starts = [None if s.enters is None else offset + s.enters for s in shifts]
    if any(s.leaves is not None for s in shifts):
        starts += [None if s.leaves is None else offset - s.leaves for s in shifts]
    found = []
    for at, start in enumerate(starts):
        x = at % len(keys)
        start = keys[x].shape[2] if start is None else start  # there is no key from there on
        found.append(_rows_from(keys[x], values[x], masks[x], start, n))
    x, v = (torch.stack([move[i] for move in found]) for i in (0, 1))
    if all(move[2] is None for move in found):
        return x, v, None
    ones = x.new_ones(x.shape[1:4], dtype=torch.uint8)
    return x, v, torch.stack([ones if move[2] is None else move[2] for move in found])


def _prefix(parts: torch.Tensor, first: torch.Tensor | None, reverse: bool) -> None:
    """In place; the parts' own dimensions are contiguous."""
    count, size = parts.shape[0], parts[0].numel()
    with device_guard(parts):
        tensor_attention_lowrank_prefix_kernel[(cdiv(size, 1024),)](
            parts, first, count, size, parts.stride(0), REVERSE=reverse, BLOCK=1024,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _scan(
    q, keys, values, masks, coefficients, shifts, offset, state_config, precision, most_shares,
    state_bytes=None,
) -> _Scan:  # fmt: skip
    batch, heads, n, d = q.shape
    degree, dv = len(coefficients) - 1, values[0].shape[3]
    rank = math.comb(d + degree, degree)
    # The gradients have a state per query head.
    size = len(keys) * batch * heads * rank * (dv + 1) * 4
    length = plan.chunk_length(n, size, max(s.span for s in shifts), state_bytes)
    chunks = cdiv(n, length)
    shares = min(cdiv(rank, BLOCK_F), _PROGRAMS // (chunks * batch * heads), most_shares)
    shares = max(1, shares)
    x, v, kept = _moves(keys, values, masks, shifts, offset, n)
    how = (degree, state_config, precision)
    starts = q.new_empty((chunks, len(keys), batch, keys[0].shape[1], rank, dv + 1))
    for a, (shift, key, value, mask) in enumerate(zip(shifts, keys, values, masks)):
        if shift.leaves is not None:
            key, value, mask = _first_windows(key, value, mask, shift, offset, chunks, length)
            starts[:, a] = state(key, value, None, mask, *how).unflatten(0, (chunks, batch))
        elif shift.enters is None:
            starts[:, a] = state(key, value, None, mask, *how)
        else:
            there = None if kept is None else kept[a]
            starts[:, a] = state_parts(
                x[a], v[a], None, there, degree, chunks, length, state_config, precision
            )
            first = None
            if offset > 0:
                first = state(*_before(offset, key, value), None, *_before(offset, mask), *how)
            _prefix(starts[:, a], first, False)
    index = monomials(d, degree, q.device)[0]
    weights = feature_weights(coefficients, d, q.device)
    return _Scan(x, v, kept, starts, index, weights, length, shares)


def _before(offset: int, *tensors: torch.Tensor | None):
    return [None if t is None else t[:, :, :offset] for t in tensors]


def _sees_nothing(q, keys, masks, shifts, offset: int) -> torch.Tensor:
    """Which queries: bool, to broadcast with (B, H, n)."""
    position = torch.arange(offset, offset + q.shape[2], device=q.device)
    dead = torch.zeros_like(position, dtype=torch.bool)
    for k, mask, shift in zip(keys, masks, shifts):
        n = k.shape[2]
        first, last = torch.zeros_like(position), torch.full_like(position, n)
        if shift.leaves is not None:
            first = (position - shift.leaves + 1).clamp(0, n)
        if shift.enters is not None:
            last = (position + shift.enters + 1).clamp(0, n)
        if mask is None:
            dead = dead | (last <= first)
        else:
            counts = torch.nn.functional.pad(mask.cumsum(-1), (1, 0))
            none = counts[..., last] <= counts[..., first]
            group = q.shape[1] // k.shape[1] if none.shape[1] > 1 else 1
            dead = dead | (none if group == 1 else none.repeat_interleave(group, 1))
    return dead


def _band(q, scan: _Scan, config: Config) -> Band:
    (batch, heads), (n, dv) = q.shape[:2], scan.v.shape[3:]
    programs = scan.grid * batch * heads
    staged = q.new_empty((programs, scan.x.shape[0] + 1, config.block_t, BLOCK_F))
    return Band(
        q, scan.x, scan.v, scan.kept, scan.starts, scan.weights, scan.index, staged, n, q.shape[3],
        dv, scan.weights.shape[0], heads, batch * heads, heads // scan.x.shape[2], scan.length,
        scan.shares, *q.stride()[:3],
    )  # fmt: skip


def options(config: Config, dv: int) -> dict[str, Any]:
    warps = config.num_warps * (2 if dv > 64 else 1)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}


def _constants(scan: _Scan, config: Config) -> dict[str, Any]:
    dv = scan.v.shape[4]
    constants = Constants(
        AXES=scan.starts.shape[1],
        MOVES=scan.x.shape[0],
        DEGREE=scan.index.shape[1],
        BLOCK_F=BLOCK_F,
        BLOCK_C=max(16, triton.next_power_of_2(dv)),
        BLOCK_T=config.block_t,
    )
    return {"C": constants, **options(config, dv)}


def _shifts(q, keys, causal: bool, windows: Sequence[int], q_offset: int) -> list[plan.Shift]:
    queries = q.shape[2]
    return [plan.shift(k.shape[2], queries, causal, w, q_offset) for k, w in zip(keys, windows)]


def tensor_attention_lowrank_scan_fwd(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor | None],
    coefficients: Sequence[float],
    centre: float,
    causal: bool,
    windows: Sequence[int],
    q_offset: int,
    config: Config = FORWARD,
    state_config: Any = STATE,
    precision: str = PRECISION,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, y) of the op with causality or windows, all float32."""
    batch, heads, n, d = q.shape
    dv = values[0].shape[3]
    if batch * heads * n == 0 or any(k.shape[2] == 0 for k in keys):
        lse = q.new_full((batch, heads, n), -math.inf)
        return q.new_zeros((batch, heads, n, dv)), lse, torch.zeros_like(lse)
    q = dense_rows(q)
    shifts = _shifts(q, keys, causal, windows, q_offset)
    copy = batch * heads * n * (dv + 1) * q.element_size()
    scan = _scan(
        q, keys, values, key_masks, coefficients, shifts, q_offset, state_config, precision,
        max(SMALL_SCRATCH, _bytes(q, *keys, *values)) // copy,
    )  # fmt: skip
    parts = q.new_empty((scan.shares, batch, heads, n, dv + 1))
    with device_guard(q):
        tensor_attention_lowrank_scan_kernel[(scan.grid * batch * heads,)](
            _band(q, scan, config), parts, **_constants(scan, config)
        )
    sums = _sum_shares(parts)
    dead = _sees_nothing(q, keys, key_masks, shifts, q_offset)
    y = torch.where(dead, 0.0, sums[..., -1])
    divisor = torch.where(dead, 1.0, y)
    out = torch.where(dead.unsqueeze(-1), 0.0, sums[..., :-1] / divisor.unsqueeze(-1))
    return out, torch.where(dead, -math.inf, divisor.log() + centre), y


def tensor_attention_lowrank_scan_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor | None],
    out: torch.Tensor,
    y: torch.Tensor,
    coefficients: Sequence[float],
    causal: bool,
    windows: Sequence[int],
    q_offset: int,
    query_config: Config = QUERY,
    key_config: Config = KEY,
    state_config: Any = STATE,
    gradient_config: Any = None,
    precision: str = PRECISION,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """(dq, dkeys, dvalues); all contiguous."""
    dkeys, dvalues = (
        [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in tensors]
        for tensors in (keys, values)
    )
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    if q.shape[0] * q.shape[1] * q.shape[2] == 0 or any(k.shape[2] == 0 for k in keys):
        return dq, dkeys, dvalues
    shifts = _shifts(q, keys, causal, windows, q_offset)
    moves = len(keys) * (2 if any(s.leaves is not None for s in shifts) else 1)
    for key_heads, query_heads in _groups(q, keys, values, moves, key_config):
        _group_gradients(
            *(t[query_heads] for t in (dout, q, out, y)),
            None if dlse is None else dlse[query_heads],
            [t[key_heads] for t in keys],
            [t[key_heads] for t in values],
            [None if m is None else _of_heads(m, key_heads) for m in key_masks],
            (dq[query_heads], [t[key_heads] for t in dkeys], [t[key_heads] for t in dvalues]),
            coefficients, shifts, moves, q_offset, query_config, key_config, state_config,
            gradient_config, precision,
        )  # fmt: skip
    return dq, dkeys, dvalues


def _of_heads(mask: torch.Tensor, key_heads: tuple[slice, slice]) -> torch.Tensor:
    batches, heads = key_heads
    return mask[batches, heads if mask.shape[1] > 1 else slice(None)]


class _Scratch(NamedTuple):
    """Bytes of the backward per query head."""

    fixed: int
    per_share: int


def _scratch(q, keys, values, moves: int, key_config: Config) -> _Scratch:
    (n, d), dv, axes = q.shape[2:], values[0].shape[3], len(keys)
    moved = moves * (d + dv)  # copies of keys and values; and their gradients
    anchors = axes * BLOCK_F * (dv + 1) // key_config.block_t
    return _Scratch(4 * n * moved, 4 * n * (moves * BLOCK_F + max(d, moved) + anchors))


def _groups(q, keys, values, moves: int, key_config: Config):
    """(slices of batch and key heads, of batch and query heads) whose scratch fits."""
    batch, heads = q.shape[:2]
    group = heads // keys[0].shape[1]
    head = sum(_scratch(q, keys, values, moves, key_config))
    at_once = max(1, (SCRATCH_BYTES - 2 * plan.STATE_BYTES) // (head * group))
    if at_once < keys[0].shape[1]:
        for b in range(batch):
            one = slice(b, b + 1)
            for h in range(0, keys[0].shape[1], at_once):
                some = slice(h, h + at_once)
                yield (one, some), (one, slice(h * group, (h + at_once) * group))
    else:
        step = at_once // keys[0].shape[1]
        for b in range(0, batch, step):
            yield ((slice(b, b + step), slice(None)),) * 2


def _group_gradients(
    dout, q, out, y, dlse, keys, values, key_masks, results, coefficients, shifts, moves, q_offset,
    query_config, key_config, state_config, gradient_config, precision,
) -> None:  # fmt: skip
    """Adds to `results`, zeros before: (dq, dkeys, dvalues) of a group of heads."""
    batch, heads, n, d = q.shape
    axes, groups, dv = len(keys), keys[0].shape[1], values[0].shape[3]
    dq, dkeys, dvalues = results
    dsums, dy = (t.contiguous() for t in gradients_of_sums(dout, dlse, out, y))
    q = dense_rows(q)
    inputs = _bytes(q, *keys, *values, dout, out)
    states = min(plan.STATE_BYTES, max(SMALL_SCRATCH // 4, inputs // 2))
    scratch = _scratch(q, keys, values, moves, key_config)
    room = max(SMALL_SCRATCH, min(SCRATCH_BYTES, 4 * inputs)) - 2 * states
    # With more than one share the sum over them is a copy of its own.
    most_shares = (room // (batch * heads) - 2 * scratch.fixed) // scratch.per_share
    scan = _scan(
        q, keys, values, key_masks, coefficients, shifts, q_offset, state_config, precision,
        most_shares, states,
    )  # fmt: skip
    chunks, rank = scan.starts.shape[0], scan.starts.shape[4]
    programs = scan.grid * batch * heads
    du = q.new_empty((programs, moves, scan.length, BLOCK_F))
    scatter = Scatter(BLOCK_R, max(16, triton.next_power_of_2(d)), precision)
    grid = (programs,)
    totals = q.new_empty((chunks, axes, batch, heads, rank, dv + 1))
    parts = q.new_empty((scan.shares, batch, heads, n, d))
    with device_guard(q):
        tensor_attention_lowrank_scan_query_gradient_kernel[grid](
            _band(q, scan, query_config), dsums, dy, du, parts, totals,
            R=scatter, **_constants(scan, query_config),
        )  # fmt: skip
    dq.copy_(_sum_shares(parts))
    del parts
    for x in range(axes):
        _standing_gradients(
            totals[:, x].unflatten(2, (groups, -1)).sum(3), shifts[x], q_offset, scan.length,
            (keys[x], values[x], key_masks[x]), (dkeys[x], dvalues[x]),
            len(coefficients) - 1, gradient_config, precision,
        )  # fmt: skip
        if shifts[x].leaves is None and shifts[x].enters is not None:
            _prefix(totals[:, x], None, True)
        else:
            totals[:, x] = 0.0
    dx = q.new_empty((scan.shares, moves, batch, heads, n, d))
    dvalue = q.new_empty((scan.shares, moves, batch, heads, n, dv))
    anchors = q.new_empty((programs, cdiv(scan.length, key_config.block_t), axes, BLOCK_F, dv + 1))
    with device_guard(q):
        tensor_attention_lowrank_scan_key_gradient_kernel[grid](
            _band(q, scan, key_config), dsums, dy, totals, du, anchors, dx, dvalue,
            R=scatter, **_constants(scan, key_config),
        )  # fmt: skip
    del anchors, du
    for parts, found in ((dx, dkeys), (dvalue, dvalues)):
        whole = _sum_shares(parts).unflatten(2, (groups, -1))
        whole = whole.squeeze(3) if heads == groups else whole.sum(3)
        if scan.kept is not None:
            whole.masked_fill_((scan.kept == 0).unsqueeze(-1), 0.0)
        for x, (target, shift) in enumerate(zip(found, shifts)):
            if shift.enters is not None:
                _add_rows(target, whole[x], q_offset + shift.enters, 1)
            if shift.leaves is not None:
                _add_rows(target, whole[x + axes], q_offset - shift.leaves, -1)


def _sum_shares(parts: torch.Tensor) -> torch.Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _standing_gradients(totals, shift, offset, length, tensors, found, degree, config, precision):
    """Adds those of the keys that were there before a chunk began, from totals [chunks, ..]."""
    k, v, mask = tensors
    chunks, batch = totals.shape[:2]
    if shift.leaves is not None:
        k, v, mask = _first_windows(k, v, mask, shift, offset, chunks, length)
        parts = gradient(k, v, None, mask, totals.flatten(0, 1), degree, True, config, precision)
        for target, part in zip(found, parts):
            part = part.unflatten(0, (chunks, batch)).movedim(0, 2)
            part = torch.nn.functional.pad(part, (0, 0, 0, length - shift.span))
            _add_rows(target, part.flatten(2, 3), offset - shift.leaves, 1)
        return
    last = k.shape[2] if shift.enters is None else min(max(offset, 0), k.shape[2])
    if last > 0:
        k, v, mask = _before(last, k, v, mask)
        parts = gradient(k, v, None, mask, totals.sum(0), degree, True, config, precision)
        for target, part in zip(found, parts):
            _add_rows(target, part, 0, 1)
