"""The ops of low-rank tensor attention on the reference."""

from __future__ import annotations

import torch

from pyloss.ops.tensor_attention_lowrank import plan
from pyloss.ops.tensor_attention_lowrank.plan import Settings


def _keywords(key_masks, settings: Settings):
    return dict(
        coefficients=settings.coefficients,
        key_masks=key_masks,
        causal=settings.causal,
        windows=settings.windows,
        q_offset=settings.q_offset,
    )


def found(q, keys, values, key_masks, settings: Settings):
    """(out, lse, y, states) in torch operations."""
    from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank

    return tensor_attention_lowrank(
        q, keys, values, centre=settings.centre, **_keywords(key_masks, settings)
    )


def forward(q, keys, values, key_masks, *settings, checked=True):
    plan.check(q, keys, values, settings[0])
    out, lse, y, states = found(q, keys, values, key_masks, Settings(*settings))
    if checked and q.is_cpu:  # elsewhere it would wait for the device
        seen = y[lse != -torch.inf]
        plan.raise_for_sums(not (seen > 0).all(), not torch.isfinite(seen).all(), y)
    return out.contiguous(), lse.contiguous(), y.contiguous(), [s.contiguous() for s in states]


def backward(dout, dlse, q, keys, values, key_masks, out, y, states, *settings):
    from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank_backward

    dq, dkeys, dvalues = tensor_attention_lowrank_backward(
        dout, dlse, q, keys, values, out, y, states, **_keywords(key_masks, Settings(*settings))
    )
    return dq.contiguous(), [g.contiguous() for g in dkeys], [g.contiguous() for g in dvalues]


def part(order: int, key_masks, settings):
    """(out, lse) as a function of (rows, q, *keys, *values); all rows."""

    def of_rows(rows, q, *others):
        return found(q, others[:order], others[order:], key_masks, Settings(*settings))[:2]

    return of_rows
