"""The Triton implementations of the ops of low-rank tensor attention, which also know what to leave
to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyloss import backends
from pyloss.ops.tensor_attention_lowrank import plan, reference
from pyloss.ops.tensor_attention_lowrank.plan import Settings


def _kernels():
    from pyloss.kernels import tensor_attention_lowrank  # with its first use

    return tensor_attention_lowrank


def _takes(kernels, op: str, q: Tensor, values: Sequence[Tensor]) -> bool:
    taken = kernels.takes(q, values)
    if not taken:
        reason = "the Triton kernels have float32 and 1 to 128 features"
        backends.say_reference(op, q.device.type, reason)
    return taken


def forward(q, keys, values, key_masks, *settings):
    plan.check(q, keys, values, settings[0])
    kernels, found = _kernels(), Settings(*settings)
    if not _takes(kernels, "tensor_attention_lowrank_fwd", q, values):
        return reference.forward(q, keys, values, key_masks, *settings)
    masks = key_masks or [None] * len(keys)
    if found.banded:
        return *kernels.tensor_attention_lowrank_scan_fwd(q, keys, values, masks, *settings), []
    return kernels.tensor_attention_lowrank_fwd(
        q, keys, values, masks, found.coefficients, found.centre
    )


def backward(dout, dlse, q, keys, values, key_masks, out, y, states, *settings):
    kernels, found = _kernels(), Settings(*settings)
    if not _takes(kernels, "tensor_attention_lowrank_bwd", q, values):
        return reference.backward(dout, dlse, q, keys, values, key_masks, out, y, states, *settings)
    masks = key_masks or [None] * len(keys)
    if found.banded:
        _, _, *band = settings
        grads = kernels.tensor_attention_lowrank_scan_bwd(
            dout, dlse, q, keys, values, masks, out, y, found.coefficients, *band
        )
        plan.clear_unseen(*grads[1:], q.shape[2], settings)
        return grads
    return kernels.tensor_attention_lowrank_bwd(
        dout, dlse, q, keys, values, masks, out, y, states, found.coefficients
    )
