"""Near-linear tensor attention of any order, in plain PyTorch: a polynomial in place of exp.

With p(x) = sum_t p_t x^t near exp(x - centre) and c_t = p_t s^t, s the scale of the scores, the
multinomial theorem gives, over all exponent vectors a with |a| <= g, C(d + g, g) of them::

    p(S[i, j1..jm]) = sum_a U0[i, a] U1[j1, a] ... Um[jm, a]
    Ux[j, a] = prod_l k_x[j, l]^a_l,   U0 the same of q times w_a = c_|a| |a|! / prod_l a_l!

so that sums over tuples of keys are products of sums over single keys::

    A_x = Ux^T v_x,  z_x = Ux^T 1,   N = U0 (A_1 * ... * A_m),   y = U0 (z_1 * ... * z_m)
    out = N / y,     lse = log y + centre

This equals masked exact attention with p in place of exp, whatever the polynomial. Causal masks and
windows make A and z running sums, one value per query. The features U are built for a block of
tokens at a time and dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Features, or running states, alive at a time, per tensor.
_BLOCK_ELEMENTS = 1 << 20


class _Monomials(NamedTuple):
    """Exponent vectors by degree: monomial a is its parent times one variable, the last it has."""

    parents: tuple[tuple[int, ...], ...]  # per degree from 1, counted within the degree below
    variables: tuple[tuple[int, ...], ...]
    counts: tuple[tuple[float, ...], ...]  # |a|! / prod a_l!, per degree from 0

    @property
    def rank(self) -> int:
        return sum(map(len, self.counts))


@functools.lru_cache(maxsize=32)
def _monomials(d: int, degree: int) -> _Monomials:
    parents, variables, counts = [], [], [(1.0,)]
    level = [(0, 0, 1.0)]  # last variable, its exponent, count
    for t in range(1, degree + 1):
        parent, variable, following = [], [], []
        for at, (last, exponent, count) in enumerate(level):
            for v in range(last, d):
                more = exponent + 1 if v == last else 1
                parent.append(at)
                variable.append(v)
                following.append((v, more, count * t / more))
        level = following
        parents.append(tuple(parent))
        variables.append(tuple(variable))
        counts.append(tuple(c for _, _, c in level))
    return _Monomials(tuple(parents), tuple(variables), tuple(counts))


def _indices(lists, device) -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.int64, device=device) for x in lists]


def monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials of the last dimension up to a degree: ``(..., d)`` to ``(..., C(d+g, g))``."""
    table = _monomials(x.shape[-1], degree)
    return torch.cat(_levels(x, table, x.device), -1)


def _levels(x, table, device):
    levels = [x.new_ones((*x.shape[:-1], 1))]
    for parent, variable in zip(_indices(table.parents, device), _indices(table.variables, device)):
        levels.append(levels[-1][..., parent] * x[..., variable])
    return levels


def _monomials_backward(dmonomials: Tensor, x: Tensor, degree: int) -> Tensor:
    """The gradient of x from that of its monomials, from the highest degree down."""
    table = _monomials(x.shape[-1], degree)
    levels = _levels(x, table, x.device)
    parts = list(dmonomials.split([t.shape[-1] for t in levels], -1))
    dx = torch.zeros_like(x)
    parents, variables = (_indices(t, x.device) for t in (table.parents, table.variables))
    for t in range(degree, 0, -1):
        parent, variable = parents[t - 1], variables[t - 1]
        above = levels[t - 1][..., parent]
        dx.index_add_(-1, variable, parts[t] * above)
        parts[t - 1] = parts[t - 1].index_add(-1, parent, parts[t] * x[..., variable])
    return dx


def monomial_weights(coefficients: Sequence[float], d: int, like: Tensor) -> Tensor:
    """w_a for every monomial: the coefficient of its degree times a multinomial coefficient."""
    table = _monomials(d, len(coefficients) - 1)
    weights = [c * count for c, level in zip(coefficients, table.counts) for count in level]
    return torch.tensor(weights, dtype=like.dtype, device=like.device)


# --------------------------------------------------------------------------------------------------
# Without a band: one state per axis


def _kept(t: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    """Zero where padded: not a product, for what stands there may be infinite or NaN."""
    t = t[:, :, rows]
    return t if mask is None else torch.where(mask[:, :, rows].unsqueeze(-1), t, 0.0)


def _key_features(k: Tensor, mask: Tensor | None, rows: slice, degree: int) -> Tensor:
    u = monomials(_kept(k, mask, rows), degree)
    return _kept(u, None if mask is None else mask[:, :, rows], slice(None))


def _with_ones(v: Tensor, mask: Tensor | None, rows: slice) -> Tensor:
    v = _kept(v, mask, rows)
    return torch.cat([v, v.new_ones((*v.shape[:-1], 1))], -1)


def _blocks(start: int, stop: int, per_row: int, most: int = 0) -> list[slice]:
    step = max(1, _BLOCK_ELEMENTS // max(1, per_row))
    step = min(step, most) if most else step
    return [slice(a, min(a + step, stop)) for a in range(start, stop, step)]


def _state(k, v, mask, degree: int, start: int, stop: int) -> Tensor:
    """``[A | z]`` of the keys from `start` to `stop`: (B, G, r, dv + 1)."""
    batch, groups, _, d = k.shape
    rank = math.comb(d + degree, degree)
    total = v.new_zeros((batch, groups, rank, v.shape[3] + 1))
    for rows in _blocks(start, stop, batch * groups * rank):
        u = _key_features(k, mask, rows, degree)
        total = total + u.transpose(-1, -2) @ _with_ones(v, mask, rows)
    return total


def _repeated(t: Tensor, heads: int) -> Tensor:
    group = heads // max(t.shape[1], 1)
    return t if group == 1 else t.repeat_interleave(group, 1)


def _product(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.mul, tensors)


def _finished(sums: Tensor, empty: Tensor, centre: float) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, y) of [N | y], and of which queries see nothing."""
    y = torch.where(empty, 0.0, sums[..., -1])
    safe = torch.where(empty, 1.0, y)
    out = torch.where(empty.unsqueeze(-1), 0.0, sums[..., :-1] / safe.unsqueeze(-1))
    return out, torch.where(empty, -math.inf, torch.log(safe) + centre), y


def tensor_attention_lowrank(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    coefficients: Sequence[float],
    centre: float = 0.0,
    key_masks: Sequence[Tensor | None] | None = None,
    causal: bool = False,
    windows: Sequence[int | None] | None = None,
    q_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``(out, lse, y, states)``; see ``pyloss.tensor_attention``, ``method="lowrank"``.

    Differentiable any number of times; the arithmetic is in the dtype of ``q``.

    Args:
        q: ``(B, H, n, d)``, float32 or float64.
        keys, values: m tensors ``(B, G, n_x, d)`` and m ``(B, G, n_x, dv)``, H a multiple of G.
        coefficients: c_t = p_t s^t for t = 0, ..., g.
        centre: p stands for exp(x - centre).
        key_masks: per axis None or bool ``(B, G or 1, n_x)``, True: keep.
        causal, windows, q_offset: as in ``pyloss.reference.tensor_attention``.

    Returns:
        out ``(B, H, n, dv)``, lse and y ``(B, H, n)``, and per axis the state ``[A | z]``
        ``(B, G, r, dv + 1)``, or no state with causality or a window.
    """
    windows = [w or 0 for w in windows] if windows is not None else [0] * len(keys)
    masks = [None] * len(keys) if key_masks is None else list(key_masks)
    degree = len(coefficients) - 1
    weights = monomial_weights(coefficients, q.shape[3], q)
    bands = [_Band.of(q.shape[2], k.shape[2], causal, w, q_offset) for k, w in zip(keys, windows)]
    empty = _empty(q, masks, bands)
    states: list[Tensor] = []
    if causal or any(windows):
        sums = _scan(q, keys, values, masks, bands, weights, degree)
    else:
        states = [
            _state(k, v, mask, degree, 0, k.shape[2]) for k, v, mask in zip(keys, values, masks)
        ]
        state = _repeated(_product(states), q.shape[1]) * weights.unsqueeze(-1)
        rows = _blocks(0, q.shape[2], q.shape[0] * q.shape[1] * weights.numel())
        parts = [monomials(q[:, :, at], degree) @ state for at in rows]
        sums = torch.cat(parts, 2) if parts else q.new_zeros((*q.shape[:3], state.shape[-1]))
    return *_finished(sums, empty, centre), states


# --------------------------------------------------------------------------------------------------
# Causality and windows: running states


class _Band(NamedTuple):
    """Query i sees the keys first[i] <= j < last[i]; both never fall."""

    first: list[int]
    last: list[int]

    @classmethod
    def of(cls, n_q: int, n: int, causal: bool, window: int, q_offset: int) -> _Band:
        def clipped(j: int) -> int:
            return min(max(j, 0), n)

        p = range(q_offset, q_offset + n_q)
        first = [clipped(i - window + 1) if window else 0 for i in p]
        last = [clipped(i + 1 if causal else i + window) if causal or window else n for i in p]
        return cls(first, last)


def _empty(q, masks, bands) -> Tensor:
    """Which queries see no key on some axis: ``(B, H, n)``."""
    found = torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    for mask, band in zip(masks, bands):
        first, last = (torch.tensor(x, dtype=torch.int64, device=q.device) for x in band)
        if mask is None:
            found = found | (last <= first)
        else:
            counts = torch.nn.functional.pad(mask.cumsum(-1), (1, 0))
            seen = counts[..., last] - counts[..., first]
            found = found | (_repeated(seen, q.shape[1]) <= 0 if seen.shape[1] > 1 else seen <= 0)
    return found


def _moved(k, v, mask, degree, source: list[int], moves: list[bool]):
    """U (x) [V | 1] of key source[i] where moves[i], else 0: (B, G, rows, r, dv + 1)."""
    low, high = min(source), max(source) + 1
    local = torch.tensor([j - low for j in source], device=k.device)
    u = _key_features(k, mask, slice(low, high), degree)[:, :, local]
    u = u * torch.tensor(moves, device=k.device).to(u.dtype).view(-1, 1)
    return u.unsqueeze(-1) * _with_ones(v, mask, slice(low, high))[:, :, local].unsqueeze(-2)


def _running(k, v, mask, before, band: _Band, rows: slice, degree: int, rebuild: bool):
    """States of the queries `rows` of one axis: (B, G, rows, r, dv + 1).

    `before` is that of the query before them, formed anew where there is none or with `rebuild`:
    what leaves a window is subtracted, and rounding errors would add up.
    """
    start = max(rows.start - 1, 0)
    if before is None or rebuild:
        before = _state(k, v, mask, degree, band.first[start], band.last[start])
    steps = range(rows.start, rows.stop)
    total = before.unsqueeze(2).expand(-1, -1, len(steps), -1, -1)
    for ends, sign in ((band.last, 1), (band.first, -1)):
        earlier = [ends[max(i - 1, 0)] for i in steps]
        moves = [ends[i] > e for i, e in zip(steps, earlier)]
        if any(moves):
            # A key enters, or leaves, per query at most: the ends move by one.
            source = [min(e, k.shape[2] - 1) for e in earlier]
            total = total + sign * _moved(k, v, mask, degree, source, moves).cumsum(2)
    return total


def _steps(q, keys, values, bands, rank: int):
    """(rows, whether each axis is formed anew) for all queries.

    An axis whose keys leave is formed anew once per window, and a block is no longer than the
    shortest window, 16 at least: so long does what has left leave its rounding error behind.
    """
    per_row = q.shape[0] * q.shape[1] * rank * (values[0].shape[3] + 1)
    windows = [
        max(b - a for a, b in zip(*band)) if band.first and band.first[-1] > 0 else 0
        for band in bands
    ]
    short = min((max(w, 16) for w in windows if w), default=0)
    steps = []
    for rows in _blocks(0, q.shape[2], per_row, short):
        size, start = rows.stop - rows.start, rows.start
        steps.append((rows, [w > 0 and start // w != (start - size) // w for w in windows]))
    return steps


def _scan_rows(q_rows, keys, values, masks, bands, weights, degree, before, rows, anew):
    """([N | y] of the queries `rows`, the state of the last one per axis)."""
    states = [
        _running(k, v, mask, b, band, rows, degree, new)
        for k, v, mask, b, band, new in zip(keys, values, masks, before, bands, anew)
    ]
    u = monomials(q_rows, degree) * weights
    sums = torch.einsum("bhtr,bhtrc->bhtc", u, _repeated(_product(states), q_rows.shape[1]))
    return sums, [s[:, :, -1] for s in states]


def _scan(q, keys, values, masks, bands, weights, degree):
    before, parts = [None] * len(keys), []
    for rows, anew in _steps(q, keys, values, bands, weights.numel()):
        sums, before = _scan_rows(
            q[:, :, rows], keys, values, masks, bands, weights, degree, before, rows, anew
        )
        parts.append(sums)
    return torch.cat(parts, 2) if parts else q.new_zeros((*q.shape[:3], values[0].shape[3] + 1))


# --------------------------------------------------------------------------------------------------
# Backward


def tensor_attention_lowrank_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    out: Tensor,
    y: Tensor,
    states: Sequence[Tensor],
    *,
    coefficients: Sequence[float],
    key_masks: Sequence[Tensor | None] | None = None,
    causal: bool = False,
    windows: Sequence[int | None] | None = None,
    q_offset: int = 0,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``(dq, dkeys, dvalues)`` at the cost and in the memory of the forward::

    dN = dout / y,   dy = (dlse - <dout, out>) / y,   [E | e] = U0^T [dN | dy]
    dU0 = dN (A_1 * ... * A_m)^T + dy (z_1 * ... * z_m)^T
    dA_x = E * prod_{x' != x} A_x',   dz_x likewise of e
    dv_x = Ux dA_x,   dUx = v_x dA_x^T + 1 dz_x^T
    """
    windows = [w or 0 for w in windows] if windows is not None else [0] * len(keys)
    masks = [None] * len(keys) if key_masks is None else list(key_masks)
    degree = len(coefficients) - 1
    weights = monomial_weights(coefficients, q.shape[3], q)
    safe = torch.where(y == 0, 1.0, y)
    dy = -(dout * out).sum(-1)
    if dlse is not None:
        dy = dy + torch.where(y == 0, 0.0, dlse)
    dsums = torch.cat([dout, dy.unsqueeze(-1)], -1) / safe.unsqueeze(-1)
    dsums = torch.where((y == 0).unsqueeze(-1), 0.0, dsums)
    if causal or any(windows):
        bands = [
            _Band.of(q.shape[2], k.shape[2], causal, w, q_offset) for k, w in zip(keys, windows)
        ]
        return _scan_backward(dsums, q, keys, values, masks, bands, weights, degree)

    heads, groups = q.shape[1], keys[0].shape[1]
    state = _repeated(_product(states), heads) * weights.unsqueeze(-1)
    dq, collected = torch.empty_like(q), torch.zeros_like(state)
    for rows in _blocks(0, q.shape[2], q.shape[0] * heads * weights.numel()):
        part = q[:, :, rows]
        collected += monomials(part, degree).transpose(-1, -2) @ dsums[:, :, rows]
        du = dsums[:, :, rows] @ state.transpose(-1, -2)
        dq[:, :, rows] = _monomials_backward(du, part, degree)
    collected *= weights.unsqueeze(-1)
    if heads != groups:
        collected = collected.unflatten(1, (groups, -1)).sum(2)
    dkeys, dvalues = [], []
    for x, (k, v, mask) in enumerate(zip(keys, values, masks)):
        others = [s for at, s in enumerate(states) if at != x]
        dstate = _product([collected, *others])
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for rows in _blocks(0, k.shape[2], q.shape[0] * groups * weights.numel()):
            u = _key_features(k, mask, rows, degree)
            dv[:, :, rows] = u @ dstate[..., :-1]  # u is 0 where padded
            du = _with_ones(v, mask, rows) @ dstate.transpose(-1, -2)
            at = None if mask is None else mask[:, :, rows]
            dpart = _monomials_backward(du, _kept(k, mask, rows), degree)
            dk[:, :, rows] = _kept(dpart, at, slice(None))
        dkeys.append(dk)
        dvalues.append(dv)
    return dq, dkeys, dvalues


def _scan_backward(dsums, q, keys, values, masks, bands, weights, degree):
    """Some queries at a time from the last on, each block with the states it began with.

    Those are kept for every c-th block, c the root of their number, and computed again between.
    """
    steps = _steps(q, keys, values, bands, weights.numel())
    every = max(1, math.isqrt(len(steps)))
    shared = (keys, values, masks, bands, weights, degree)

    def forward(before, at):
        return _scan_rows(q[:, :, steps[at][0]], *shared, before, *steps[at])[1]

    kept, before = [], [None] * len(keys)
    for at in range(len(steps)):
        if at % every == 0:
            kept.append(before)
        before = forward(before, at)
    grads = torch.zeros_like(q), *([torch.zeros_like(t) for t in ts] for ts in (keys, values))
    dafter = [None] * len(keys)
    for block in reversed(range(len(kept))):
        starts = [kept[block]]
        for at in range(block * every, min((block + 1) * every, len(steps)) - 1):
            starts.append(forward(starts[-1], at))
        for at in reversed(range(len(starts))):
            rows, anew = steps[block * every + at]
            dafter = _step_backward(dsums, dafter, q, *shared, starts[at], rows, anew, grads)
    return grads


def _step_backward(
    dsums, dafter, q, keys, values, masks, bands, weights, degree, before, rows, anew, grads
):
    """Adds one block's gradients to `grads`; returns those of the states before it, per axis."""
    dq, dkeys, dvalues = grads
    heads, groups = q.shape[1], keys[0].shape[1]
    states = [
        _running(k, v, mask, b, band, rows, degree, new)
        for k, v, mask, b, band, new in zip(keys, values, masks, before, bands, anew)
    ]
    part, dpart = q[:, :, rows], dsums[:, :, rows]
    du = torch.einsum("bhtc,bhtrc->bhtr", dpart, _repeated(_product(states), heads)) * weights
    dq[:, :, rows] = _monomials_backward(du, part, degree)
    u = monomials(part, degree) * weights
    dproduct = u.unsqueeze(-1) * dpart.unsqueeze(-2)
    if heads != groups:
        dproduct = dproduct.unflatten(1, (groups, -1)).sum(2)
    dbefore = []
    start = max(rows.start - 1, 0)
    for x, (k, v, mask, band) in enumerate(zip(keys, values, masks, bands)):
        dstate = _product([dproduct, *(s for at, s in enumerate(states) if at != x)])
        # A key is in the states from the query on with which it enters.
        dlater = dstate.flip(2).cumsum(2).flip(2)
        if dafter[x] is not None:
            dlater = dlater + dafter[x].unsqueeze(2)
        for ends, sign in ((band.last, 1), (band.first, -1)):
            moved = [i for i in range(max(rows.start, 1), rows.stop) if ends[i] > ends[i - 1]]
            if moved:
                low = ends[moved[0] - 1]  # a key per query: they follow each other
                at = torch.tensor([i - rows.start for i in moved], device=k.device)
                _add_key_gradients(
                    sign * dlater[:, :, at], k, v, mask, slice(low, low + len(moved)), degree,
                    dkeys[x], dvalues[x],
                )  # fmt: skip
        first = dlater[:, :, 0]
        if before[x] is None or anew[x]:
            span = band.first[start], max(band.first[start], band.last[start])
            for some in _blocks(*span, weights.numel() * groups * q.shape[0]):
                whole = first.unsqueeze(2).expand(-1, -1, some.stop - some.start, -1, -1)
                _add_key_gradients(whole, k, v, mask, some, degree, dkeys[x], dvalues[x])
            first = None
        dbefore.append(first)
    return dbefore


def _add_key_gradients(dstates, k, v, mask, rows, degree, dk, dv):
    """Of U (x) [V | 1] per key: dstates (B, G, rows, r, dv + 1)."""
    local = None if mask is None else mask[:, :, rows]
    u = _key_features(k, mask, rows, degree)
    dvalue = torch.einsum("bgtr,bgtrc->bgtc", u, dstates[..., :-1])
    du = torch.einsum("bgtrc,bgtc->bgtr", dstates, _with_ones(v, mask, rows))
    dkey = _monomials_backward(du, _kept(k, mask, rows), degree)
    dv[:, :, rows] += _kept(dvalue, local, slice(None))
    dk[:, :, rows] += _kept(dkey, local, slice(None))
