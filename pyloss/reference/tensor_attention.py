"""Kronecker tensor attention of any order, written with one einsum per product.

This file is the specification in code: the whole cube of scores is stored. With m pairs of keys
and values, query i and keys j1, ..., jm::

    S[i, j1..jm] = cap(scale * sum_l q[i, l] prod_x k_x[jx, l]) + sum_x mask_x[i, jx]
    P = softmax of S over all (j1..jm) together
    out[i, c] = sum_{j1..jm} P[i, j1..jm] prod_x v_x[jx, c]

cap(x) is softcap tanh(x / softcap), or x. The bias of ``kv_bias`` is added to the last pair before
all of it. A row whose pairs are all masked gives out = 0 and lse = -inf. What a query does not see
does not reach it, NaN and infinity included; where anything is hidden, a query that does see one in
a key gets NaN, and in a value NaN in its feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.reference._hidden import band, cleared

# The cube of scores at its own precision; the softmax needs a second and third of that size.
_MOST_CUBE_BYTES = 2 << 30


def tensor_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    masks: Sequence[Tensor | None] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    windows: Sequence[int | None] | None = None,
    q_offset: int = 0,
    kv_bias: tuple[float, float] = (0.0, 0.0),
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; see ``pyloss.tensor_attention``.

    The arithmetic is float64 for float64 inputs and float32 for the rest.

    Args:
        q: ``(B, H, n, d)``.
        keys, values: m tensors ``(B, G, n_x, d)`` and m ``(B, G, n_x, dv)``, H a multiple of G.
        masks: one per axis, None, bool (True: keep) or added to the scores; broadcast to
            ``(B, H, n, n_x)``.
        mask: one over all axes, bool or added; broadcast to ``(B, H, n, n_1, ..., n_m)``.
        causal, windows, q_offset: query i stands at p = i + q_offset and sees j <= p (causal), and
            with a window w of the axis p - w < j (causal) or |p - j| < w.

    Raises:
        ValueError: a cube of scores above 2 GiB.
    """
    order = len(keys)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, n_q, d = q.shape
    sizes = [k.shape[2] for k in keys]
    cube = batch * heads * n_q * math.prod(sizes) * dtype.itemsize
    if cube > _MOST_CUBE_BYTES:
        raise ValueError(
            f"the reference would store {cube / 2**30:.1f} GiB of scores, more than 2 GiB; "
            'method="exact" of pyloss.tensor_attention stores none'
        )
    group = heads // max(keys[0].shape[1], 1)
    keys = [k.to(dtype).repeat_interleave(group, 1) for k in keys]
    values = [v.to(dtype).repeat_interleave(group, 1) for v in values]
    axes = "jkmnpqrstu"[:order]
    windows = [None] * order if windows is None else windows
    masks = [None] * order if masks is None else masks
    hidden, bias = _masks(q, sizes, masks, mask, causal, windows, q_offset, dtype)
    by_key = by_value = None
    if hidden is not None:
        by_key, by_value = _spoiled(keys, values, hidden.expand(batch, heads, n_q, *sizes), axes)
        keys, values = [cleared(k) for k in keys], [cleared(v) for v in values]
    keys[-1], values[-1] = keys[-1] + kv_bias[0], values[-1] + kv_bias[1]
    if scale is None:
        scale = d**-0.5

    key_names = ",".join(f"bh{a}l" for a in axes)
    scores = torch.einsum(f"bhil,{key_names}->bhi{axes}", q.to(dtype) * scale, *keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for part in bias:
        scores = scores + part
    if hidden is not None:
        # Last of all, so that nothing that is hidden counts, nor gets a gradient.
        scores = torch.where(by_key, math.nan, 1.0) * scores
        scores = torch.where(hidden, -math.inf, scores)
    lse, weights = _softmax(scores.flatten(3))
    weights = weights.view(scores.shape)
    value_names = ",".join(f"bh{a}c" for a in axes)
    out = torch.einsum(f"bhi{axes},{value_names}->bhic", weights, *values)
    if by_value is not None:
        out = torch.where(by_value, math.nan, 1.0) * out
    return out.to(q.dtype), lse


def _masks(q, sizes, masks, mask, causal, windows, q_offset, dtype):
    """What hides a tuple of keys from a query, all of it together, or None; and what is added."""
    order, n_q, hidden, bias = len(sizes), q.shape[2], None, []
    given = []
    for x, n in enumerate(sizes):
        near = band(n_q, n, causal, windows[x], q_offset, q.device)
        m = masks[x]
        if m is not None:
            m = m.expand(*m.shape[:-1], n)
        for t in (near, m):
            if t is not None:
                others = [n if y == x else 1 for y in range(order)]
                given.append(t.reshape(*t.shape[:-1], *others))
    if mask is not None:
        given.append(mask)
    for t in given:
        kept = t
        if t.dtype != torch.bool:
            kept = t != -math.inf
            bias.append(torch.where(kept, t.to(dtype), 0.0))
        hidden = ~kept if hidden is None else hidden | ~kept
    return hidden, bias


def _spoiled(keys, values, hidden, axes):
    """Which scores and which outputs are NaN because of NaN or infinity that is not hidden."""
    by_key, by_value = torch.zeros_like(hidden), 0.0
    for x, (k, v) in enumerate(zip(keys, values)):
        shape = [1] * len(axes)
        shape[x] = k.shape[2]
        bad = (~k.isfinite()).any(-1)
        by_key = by_key | bad.view(*bad.shape[:2], 1, *shape)
        seen = (~hidden).to(v.dtype)
        by_value = by_value + torch.einsum(
            f"bhi{axes},bh{axes[x]}c->bhic", seen, (~v.isfinite()).to(v.dtype)
        )
    return by_key & ~hidden, by_value > 0


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and softmax over the last dimension, where a row may be empty or all -inf."""
    if scores.shape[-1] == 0:
        return scores.sum(-1) - math.inf, scores
    empty = (scores == -math.inf).all(-1, keepdim=True)
    # A finite stand-in: the gradient of a softmax of nothing but -inf is NaN.
    lse = torch.logsumexp(torch.where(empty, 0.0, scores), -1, keepdim=True)
    weights = torch.where(empty, 0.0, torch.exp(torch.where(empty, 0.0, scores) - lse))
    return torch.where(empty, -math.inf, lse).squeeze(-1), weights
