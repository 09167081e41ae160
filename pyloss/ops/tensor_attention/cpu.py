"""The CPU implementations of the ops of tensor attention: lay out the tensors, call the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import accumulator_dtype, address, scratch
from pyloss.ops.tensor_attention import hidden, records
from pyloss.ops.tensor_attention.plan import Settings, finished, gradients, results, rows


def _expanded(mask, q, n, dtype):
    """A mask of stride 1 along the keys, broadcast to (B, H, n_q, n)."""
    if mask is None:
        return None
    mask = mask.to(dtype)
    if n > 1 and mask.stride(-1) != 1 or mask.shape[-1] != n:
        mask = mask.expand(*mask.shape[:-1], n).contiguous()
    return mask.expand(*q.shape[:3], n)


def _laid_out(tensors, masks):
    """All tensors in the kernel's layout, and the masks; they must live on."""
    acc = accumulator_dtype(tensors[0].dtype)
    tensors = [rows(t) for t in tensors]
    q, k1, k2 = tensors[:3]
    return *tensors, *(_expanded(m, q, k.shape[2], acc) for m, k in zip(masks, (k1, k2)))


def forward(q, k1, k2, v1, v2, mask1, mask2, *settings):
    out, lse = results(q, v1)
    if lse.numel():
        given = (q, (k1, k2), (v1, v2), (mask1, mask2), *hidden.of_settings(settings))
        unclean = hidden.unclean(*given)
        if unclean:
            k1, k2, v1, v2 = hidden.cleared(k1, k2, v1, v2)
        kept = _laid_out((q, k1, k2, v1, v2), (mask1, mask2))
        problem = records.problem(*kept, settings)
        threads = torch.get_num_threads()
        size = _C.tensor_attention_scratch_bytes(problem, False, False, threads)
        buffer, start = scratch(q, size)
        _C.tensor_attention_fwd(problem, address(out), address(lse), start, size, threads)
        del kept, buffer
        if unclean:
            hidden.spoil(out, lse, *given)
    return out, lse


def backward(dout, dlse, *args):
    tensors, masks, (out, lse) = args[:5], args[5:7], args[7:9]
    settings, want = args[9:-1], args[-1]
    q, k1, k2 = tensors[:3]
    grads = gradients(args[:7], want)
    acc = accumulator_dtype(q.dtype)
    # The kernel writes a mask's gradient for every batch, head and query.
    for at, k in ((5, k1), (6, k2)):
        if grads[at] is not None:
            grads[at] = q.new_zeros((*q.shape[:3], k.shape[2]), dtype=acc)
    if lse.numel() == 0:
        for g in grads:
            if g is not None:
                g.zero_()
    else:
        dout = rows(dout)
        dlse = None if dlse is None else dlse.to(acc).contiguous()
        if hidden.unclean(q, tensors[1:3], tensors[3:], masks, *hidden.of_settings(settings)):
            tensors = (q, *hidden.cleared(*tensors[1:]))  # NaN that a query sees is in out or lse
        kept = _laid_out(tensors, masks)
        problem = records.problem(*kept, settings)
        threads = torch.get_num_threads()
        with_masks = grads[5] is not None or grads[6] is not None
        size = _C.tensor_attention_scratch_bytes(problem, True, with_masks, threads)
        buffer, start = scratch(q, size)
        found = records.backward(dout, dlse, out, lse, grads)
        _C.tensor_attention_bwd(problem, found, start, size, threads)
        del kept, buffer
    return finished(grads, masks)


def scratch_bytes(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor, settings: Settings, backward: bool
) -> int:
    """Bytes of scratch of the kernel at the present number of threads; on meta tensors too."""
    tensors = (t.new_empty(t.shape[-1:]).expand(t.shape) for t in (q, k1, k2, v1, v2))
    problem = records.problem(*tensors, None, None, settings)
    return _C.tensor_attention_scratch_bytes(problem, backward, False, torch.get_num_threads())
