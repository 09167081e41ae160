"""The ops of tensor attention on the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients
from pyloss.ops.tensor_attention.plan import Settings, wanted

# Scores at a time, where the second derivative takes some queries after the others; all that it
# keeps of them is about ten times as much.
_BLOCK_BYTES = 1 << 25


def of_order(q, keys, values, masks, scale, causal, windows, q_offset, softcap, bk=0.0, bv=0.0):
    """(out, lse) of any order in torch operations."""
    from pyloss.reference.tensor_attention import tensor_attention  # with its first use

    return tensor_attention(
        q,
        keys,
        values,
        masks=masks,
        scale=scale,
        causal=causal,
        windows=[w or None for w in windows],
        q_offset=q_offset,
        kv_bias=(bk, bv),
        softcap=softcap or None,
    )


def of_settings(settings: Sequence) -> tuple:
    """What `of_order` takes after the masks, of the op's settings."""
    scale, causal, w1, w2, q_offset, bk, bv, softcap = settings
    return scale, causal, (w1, w2), q_offset, softcap, bk, bv


def found(q, k1, k2, v1, v2, mask1, mask2, settings: Sequence):
    """(out, lse) in torch operations."""
    return of_order(q, (k1, k2), (v1, v2), (mask1, mask2), *of_settings(settings))


def part(order: int, scale, causal, windows, q_offset, softcap, *bias) -> Callable:
    """(out, lse) of some queries, as a function of (rows, q, *keys, *values, *masks)."""

    def of_rows(rows: slice, q: Tensor, *others: Tensor | None):
        keys, values, masks = others[:order], others[order : 2 * order], others[2 * order :]
        masks = [m if m is None or m.shape[2] == 1 else m[:, :, rows] for m in masks]
        first = q_offset + (rows.start or 0)
        band = (causal, windows, first)
        return of_order(q[:, :, rows], keys, values, masks, scale, *band, softcap, *bias)

    return of_rows


def blocks(q: Tensor, keys: Sequence[Tensor]) -> list[slice]:
    """The queries, some at a time."""
    batch, heads, n_q, _ = q.shape
    row = batch * heads * math.prod(k.shape[2] for k in keys) * accumulator_dtype(q.dtype).itemsize
    step = max(1, _BLOCK_BYTES // max(row, 1))
    return [slice(i, min(i + step, n_q)) for i in range(0, n_q, step)]


def forward(*args):
    out, lse = found(*args[:7], args[7:])
    return out.contiguous(), lse.contiguous()


def backward(dout, dlse, *args):
    sources, settings, want = args[:7], Settings(*args[9:-1]), args[-1]

    def function(*sources):
        out, lse = found(*sources, settings)
        # A row without any valid pair has an lse without a gradient.
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    grads = gradients(function, sources, (dout, dlse), wanted(want))
    return [g.contiguous() for g in grads if g is not None]
