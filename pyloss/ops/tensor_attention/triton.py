"""The Triton implementations of the ops of tensor attention, which also know what to leave to the
reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops.tensor_attention import reference
from pyloss.ops.tensor_attention.plan import Settings, finished, gradients, results, rows, wanted


def _kernels():
    from pyloss.kernels import tensor_attention  # with its first use

    return tensor_attention


def _why_not(q: Tensor, v1: Tensor, settings: Settings) -> str | None:
    """The reason, in words, where the Triton kernels leave a case to the reference."""
    if q.dtype == torch.float64:
        return "the Triton kernels have no float64"
    if max(q.shape[3], v1.shape[3]) > 256:
        return "the Triton kernels have at most 256 features"
    if settings.softcap:
        return "the Triton kernels have no softcap"
    return None


def _takes(op: str, q: Tensor, v1: Tensor, settings: Settings) -> bool:
    reason = _why_not(q, v1, settings)
    if reason is not None:
        backends.say_reference(op, q.device.type, reason)
    return reason is None


def _keywords(settings: Settings):
    """The keywords of kernels/tensor_attention."""
    return dict(
        scale=settings.scale,
        causal=settings.causal,
        w1=settings.w1 or None,
        w2=settings.w2 or None,
        q_offset=settings.q_offset,
        kv_bias=(settings.bk, settings.bv),
    )


def _masks(mask1, mask2, k1, k2):
    """Float32 with the keys' full length."""
    masks = []
    for mask, k in ((mask1, k1), (mask2, k2)):
        if mask is not None:
            mask = rows(mask.float().expand(*mask.shape[:-1], k.shape[2]))
        masks.append(mask)
    return masks


def forward(q, k1, k2, v1, v2, mask1, mask2, *settings):
    if not _takes("tensor_attention_fwd", q, v1, Settings(*settings)):
        return reference.forward(q, k1, k2, v1, v2, mask1, mask2, *settings)
    out, lse = results(q, v1)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    masks = _masks(mask1, mask2, k1, k2)
    return _kernels().tensor_attention_fwd(
        q, k1, k2, v1, v2, *masks, **_keywords(Settings(*settings))
    )


def backward(dout, dlse, *args):
    tensors, masks, (out, lse) = args[:5], args[5:7], args[7:9]
    settings, want = Settings(*args[9:-1]), args[-1]
    q, k1, k2, v1, _ = tensors
    if not _takes("tensor_attention_bwd", q, v1, settings):
        return reference.backward(dout, dlse, *args)
    if lse.numel() == 0 or k1.shape[2] == 0 or k2.shape[2] == 0:
        return [g.zero_() for g in gradients(args[:7], want) if g is not None]
    grads = _kernels().tensor_attention_bwd(
        dout, dlse, *tensors, *_masks(*masks, k1, k2), out, lse, **_keywords(settings),
        want=wanted(want),
    )  # fmt: skip
    return finished(list(grads), masks)
