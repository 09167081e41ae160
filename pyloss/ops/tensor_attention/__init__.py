"""Exact Kronecker tensor attention as an op: (out, lse) forward, up to seven gradients backward.

    S[i,j,k] = cap(scale sum_l q[i,l] k1[j,l] (k2[k,l] + bk)) + mask1[i,j] + mask2[i,k]
    out[i,c] = sum_jk softmax_jk(S)[i,j,k] v1[j,c] (v2[k,c] + bv)

with cap(x) = softcap tanh(x / softcap), or x where softcap is 0.

Formulas, memory and cost: docs/tensor_attention.md. Kernels: csrc/cpu/tensor_attention.h,
kernels/tensor_attention. Of more than two key axes: order.py.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._flops import count_by
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active
from pyloss.ops.tensor_attention import cost, cpu, reference, second_order, triton
from pyloss.ops.tensor_attention.cpu import scratch_bytes
from pyloss.ops.tensor_attention.plan import WANT, Settings, gradients, results

__all__ = ["Settings", "scratch_bytes", "tensor_attention"]

_TENSORS = "Tensor q, Tensor k1, Tensor k2, Tensor v1, Tensor v2, Tensor? mask1, Tensor? mask2"
_SETTINGS = (
    "float scale, bool causal, SymInt w1, SymInt w2, SymInt q_offset, float bk, float bv, "
    "float softcap"
)


def _forward_fake(q, k1, k2, v1, v2, mask1, mask2, *settings):
    return results(q, v1)


def _backward_fake(dout, dlse, *args):
    return [g for g in gradients(args[:7], args[-1]) if g is not None]


def _terms(q, k1, k2, v1, v2, mask1, mask2, scale, causal, w1, w2, *rest) -> list[str]:
    """Of the tensors. Queries may be split where none is told its keys by its place."""
    n = "n" if causal or w1 or w2 else "N"
    h = "1" if k1.shape[1] == 1 < q.shape[1] else "H"  # of the keys
    of_masks = [
        "".join("1" if size == 1 else letter for letter, size in zip(f"BH{n}{key}", m.shape))
        for m, key in ((mask1, "j"), (mask2, "k"))
        if m is not None
    ]
    masks = iter(of_masks)
    masks = ["-" if m is None else next(masks) for m in (mask1, mask2)]
    return [f"BH{n}d", f"B{h}jd", f"B{h}kd", f"B{h}je", f"B{h}ke", *masks]


def _forward_shards(*args):
    terms = _terms(*args)
    return f"{', '.join(terms)} -> {terms[0][:3]}e, {terms[0][:3]}"


def _backward_shards(dout, dlse, *args):
    terms, want = _terms(*args[:7], *args[9:]), args[-1]
    out, lse = f"{terms[0][:3]}e", terms[0][:3]
    grads = [term for term, bit in zip(terms, WANT) if want & bit]
    return f"{out}, {lse}, {', '.join(terms)}, {out}, {lse} -> {', '.join(grads)}"


define_op(
    f"tensor_attention_fwd({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    impls={"cpu": cpu.forward, "triton": triton.forward, "reference": reference.forward},
    shards=_forward_shards,
)
define_op(
    f"tensor_attention_bwd(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor lse, "
    f"{_SETTINGS}, int want) -> Tensor[]",
    fake=_backward_fake,
    impls={"cpu": cpu.backward, "triton": triton.backward, "reference": reference.backward},
    shards=_backward_shards,
)

count_by("tensor_attention_fwd", cost.forward_flops)
count_by("tensor_attention_bwd", cost.backward_flops)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _TensorAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        tensors, settings = args[:7], args[7:]
        out, lse = _ops.tensor_attention_fwd(*tensors, *settings)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        kept = ctx.saved_tensors
        tensors, out, lse = kept[:7], kept[7], kept[8]
        rest = (None,) * len(ctx.settings)
        needed = ctx.needs_input_grad[:7]
        if not any(needed) or (dout is None and dlse is None):
            return *(None for _ in tensors), *rest
        part = reference.part(2, *reference.of_settings(ctx.settings))
        if second_order.batched(dout, dlse):
            return *second_order.by_reference(part, tensors, (dout, dlse), needed), *rest
        with torch.no_grad():
            grads = _ops.tensor_attention_bwd(
                torch.zeros_like(out) if dout is None else dout, dlse, *tensors, out, lse,
                *ctx.settings, sum(bit for bit, yes in zip(WANT, needed) if yes),
            )  # fmt: skip
        grads = iter(grads)
        grads = [next(grads) if yes else None for yes in needed]
        if torch.is_grad_enabled():
            blocks = reference.blocks(tensors[0], tensors[1:3])
            grads = second_order.differentiable(grads, part, blocks, tensors, (dout, dlse))
        return *grads, *rest


def tensor_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    mask1: Tensor | None,
    mask2: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments; masks are additive and floating."""
    tensors = (q, k1, k2, v1, v2, mask1, mask2)
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return reference.found(*tensors, settings)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _TensorAttention.apply(*distinct(tensors), *settings)
    return _ops.tensor_attention_fwd(*tensors, *settings)
