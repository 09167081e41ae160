"""The CPU implementations of the ops of low-rank tensor attention: lay out the tensors, call the
kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import scratch
from pyloss.ops.tensor_attention.plan import rows
from pyloss.ops.tensor_attention_lowrank import plan, records
from pyloss.ops.tensor_attention_lowrank.plan import Settings

NOT_POSITIVE, NOT_FINITE = 1, 2  # LowrankFlag


def _key_mask(mask: Tensor | None, k: Tensor) -> Tensor | None:
    """Expanded to (B, G, n), contiguous along the keys."""
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:-1], k.shape[2])
    mask = mask if mask.stride(-1) == 1 or k.shape[2] <= 1 else mask.contiguous()
    return mask.expand(k.shape[:3])


def _laid_out(q, keys, values, key_masks):
    """The tensors in the kernel's layout; they must live on."""
    masks = [_key_mask(m, k) for m, k in zip(key_masks or [None] * len(keys), keys)]
    return rows(q), [rows(k) for k in keys], [rows(v) for v in values], masks


def forward(q, keys, values, key_masks, *settings):
    """(out, lse, y, states); raises RuntimeError where y is not positive and finite."""
    settings = Settings(*settings)
    plan.check(q, keys, values, settings.coefficients)
    out, lse, y, states = plan.results(q, keys, values, settings)
    if lse.numel() == 0 and (settings.banded or q.shape[1] == 0):
        return out, lse, y, states
    kept = _laid_out(q, keys, values, key_masks)
    problem = records.problem(*kept, settings)
    threads = torch.get_num_threads()
    size = _C.tensor_attention_lowrank_scratch_bytes(problem, False, threads)
    buffer, start = scratch(q, size)
    found = records.forward(out, lse, y, states)
    flags = _C.tensor_attention_lowrank_fwd(problem, found, start, size, threads)
    del kept, buffer
    plan.raise_for_sums(flags & NOT_POSITIVE, flags & NOT_FINITE, y)
    return out, lse, y, states


def backward(dout, dlse, q, keys, values, key_masks, out, y, states, *settings):
    """(dq, dkeys, dvalues), all contiguous."""
    grads = plan.gradients(q, keys, values)
    if q.shape[1] == 0:
        return grads
    kept = _laid_out(q, keys, values, key_masks)
    problem = records.problem(*kept, settings)
    dout = rows(dout)
    dlse = None if dlse is None else dlse.contiguous()
    out, y, states = out.contiguous(), y.contiguous(), [s.contiguous() for s in states]
    threads = torch.get_num_threads()
    size = _C.tensor_attention_lowrank_scratch_bytes(problem, True, threads)
    buffer, start = scratch(q, size)
    found = records.backward(dout, dlse, out, y, states, *grads)
    _C.tensor_attention_lowrank_bwd(problem, found, start, size, threads)
    del kept, buffer
    plan.clear_unseen(*grads[1:], q.shape[2], settings)
    return grads
