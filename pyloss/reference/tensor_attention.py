"""Kronecker tensor attention of any order, written with one einsum per product.

This file is the specification in code: the whole cube of scores is stored. With m pairs of keys
and values, query i and keys j1, ..., jm::

    S[i, j1..jm] = scale * sum_l q[i, l] prod_x k_x[jx, l] + sum_x mask_x[i, jx]
    P = softmax of S over all (j1..jm) together
    out[i, c] = sum_{j1..jm} P[i, j1..jm] prod_x v_x[jx, c]

The bias of ``kv_bias`` is added to the last pair before all of it. A row whose pairs are all masked
gives out = 0 and lse = -inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

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
    keys[-1], values[-1] = keys[-1] + kv_bias[0], values[-1] + kv_bias[1]
    if scale is None:
        scale = d**-0.5

    axes = "jkmnpqrstu"[:order]
    key_names = ",".join(f"bh{a}l" for a in axes)
    scores = torch.einsum(f"bhil,{key_names}->bhi{axes}", q.to(dtype) * scale, *keys)
    for x, n in enumerate(sizes):
        shape = [1] * (3 + order)
        shape[3 + x] = n
        band = _band(n_q, n, causal, None if windows is None else windows[x], q_offset, q.device)
        if band is not None:
            shape[2] = n_q
            scores = scores.masked_fill(~band.view(shape), -math.inf)
        m = None if masks is None else masks[x]
        if m is not None:
            m = m.expand(*m.shape[:-1], n)
            at = (*m.shape[:-1], *(n if y == x else 1 for y in range(order)))
            scores = _masked(scores, m.reshape(at), dtype)
    if mask is not None:
        scores = _masked(scores, mask, dtype)

    flat = scores.flatten(3)
    lse, weights = _softmax(flat)
    value_names = ",".join(f"bh{a}c" for a in axes)
    out = torch.einsum(f"bhi{axes},{value_names}->bhic", weights.view(scores.shape), *values)
    return out.to(q.dtype), lse


def _masked(scores: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    return scores + mask.to(dtype)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and softmax over the last dimension, where a row may be empty or all -inf."""
    if scores.shape[-1] == 0:
        return scores.sum(-1) - math.inf, scores
    empty = (scores == -math.inf).all(-1, keepdim=True)
    # A finite stand-in: the gradient of a softmax of nothing but -inf is NaN.
    lse = torch.logsumexp(torch.where(empty, 0.0, scores), -1, keepdim=True)
    weights = torch.where(empty, 0.0, torch.exp(torch.where(empty, 0.0, scores) - lse))
    return torch.where(empty, -math.inf, lse).squeeze(-1), weights


def _band(n_q, n, causal, window, q_offset, device) -> Tensor | None:
    """Which keys a query sees, ``(n_q, n)``; None: all."""
    if not causal and window is None:
        return None
    position = torch.arange(n_q, device=device).unsqueeze(1) + q_offset
    key = torch.arange(n, device=device)
    seen = key <= position if causal else torch.ones(n_q, n, dtype=torch.bool, device=device)
    if window is not None:
        near = position - key < window
        seen = seen & (near if causal else near & (key - position < window))
    return seen
