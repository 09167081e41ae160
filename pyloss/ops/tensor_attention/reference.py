"""The ops of tensor attention on the reference."""

from __future__ import annotations

import torch

from pyloss.ops._reference import gradients
from pyloss.ops.tensor_attention.plan import Settings, wanted


def found(q, k1, k2, v1, v2, mask1, mask2, settings: Settings):
    """(out, lse) in torch operations."""
    from pyloss.reference.tensor_attention import tensor_attention  # with its first use

    return tensor_attention(
        q,
        (k1, k2),
        (v1, v2),
        masks=(mask1, mask2),
        scale=settings.scale,
        causal=settings.causal,
        windows=(settings.w1 or None, settings.w2 or None),
        q_offset=settings.q_offset,
        kv_bias=(settings.bk, settings.bv),
    )


def forward(*args):
    out, lse = found(*args[:7], Settings(*args[7:]))
    return out.contiguous(), lse.contiguous()


def backward(dout, dlse, *args):
    sources, settings, want = args[:7], Settings(*args[9:-1]), args[-1]

    def function(*sources):
        out, lse = found(*sources, settings)
        # A row without any valid pair has an lse without a gradient.
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    grads = gradients(function, sources, (dout, dlse), wanted(want))
    return [g.contiguous() for g in grads if g is not None]
