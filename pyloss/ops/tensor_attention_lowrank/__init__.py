"""Low-rank tensor attention of any order m as an op: near-linear, with a polynomial for exp.

    out[i] = sum_{j1..jm} p(S[i, j1..jm]) v_1[j1] * ... * v_m[jm] / y[i]
    y[i]   = sum_{j1..jm} p(S[i, j1..jm]),   lse = log y + centre

`coefficients` are p_t s^t, so that the scale is in them. Formulas, memory and cost:
docs/tensor_attention_lowrank.md. Kernels: csrc/cpu/tensor_attention_lowrank.h,
kernels/tensor_attention_lowrank. Tensors are float32 or float64; features of a half type would
lose what the polynomial gains, and are refused.

Paper: Alman, Song, arXiv 2310.04064.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyloss.ops._flops import count_by
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active
from pyloss.ops.tensor_attention import second_order
from pyloss.ops.tensor_attention_lowrank import cpu, plan, reference, triton
from pyloss.ops.tensor_attention_lowrank.plan import Settings

__all__ = ["Settings", "tensor_attention_lowrank"]

_TENSORS = "Tensor q, Tensor[] keys, Tensor[] values, Tensor?[] key_masks"
_SETTINGS = "float[] coefficients, float centre, bool causal, SymInt[] windows, SymInt q_offset"


def _forward_fake(q, keys, values, key_masks, *settings):
    plan.check_dtype(q)
    return plan.results(q, keys, values, Settings(*settings))


def _backward_fake(dout, dlse, q, keys, values, *rest):
    return plan.gradients(q, keys, values)


def _heads(q, keys) -> str:
    """The letter of the heads of keys: one that all queries share gets a gradient from each."""
    return "1" if keys[0].shape[1] == 1 < q.shape[1] else "H"


def _forward_shards(q, keys, *rest):
    h = _heads(q, keys)
    return f"BHnd, B{h}md, B{h}me, B{h}m -> BHne, BHn, BHn, B{h}re"


def _backward_shards(dout, dlse, q, keys, *rest):
    h = _heads(q, keys)
    return f"BHne, BHn, BHnd, B{h}md, B{h}me, B{h}m, BHne, BHn, B{h}re -> BHnd, B{h}md, B{h}me"


define_op(
    f"tensor_attention_lowrank_fwd({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor[])",
    fake=_forward_fake,
    impls={"cpu": cpu.forward, "triton": triton.forward, "reference": reference.forward},
    shards=_forward_shards,
    plain=functools.partial(reference.forward, checked=False),
)
define_op(
    f"tensor_attention_lowrank_bwd(Tensor dout, Tensor? dlse, {_TENSORS}, Tensor out, Tensor y, "
    f"Tensor[] states, {_SETTINGS}) -> (Tensor, Tensor[], Tensor[])",
    fake=_backward_fake,
    impls={"cpu": cpu.backward, "triton": triton.backward, "reference": reference.backward},
    shards=_backward_shards,
)


def _flops(q, keys, values, degree: int) -> int:
    """Of one product with the features of each token: 2 r (dv + 1)."""
    tokens = q[0] * (q[1] * q[2] + sum(k[1] * k[2] for k in keys))
    return 2 * tokens * plan.rank(q[3], degree) * (values[0][3] + 1)


def _forward_flops(q, keys, values, key_masks, coefficients, *rest, out_shape=None) -> int:
    return _flops(q, keys, values, len(coefficients) - 1)


def _backward_flops(
    dout, dlse, q, keys, values, key_masks, out, y, states, coefficients, *rest, out_shape=None
) -> int:
    """dv_x and dU_x of each token of keys, [E | e] and dU_0 of each query."""
    return 2 * _flops(q, keys, values, len(coefficients) - 1)


count_by("tensor_attention_lowrank_fwd", _forward_flops)
count_by("tensor_attention_lowrank_bwd", _backward_flops)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _TensorAttentionLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, order, coefficients, centre, causal, windows, q_offset, q, *others):
        keys, values, masks = others[:order], others[order : 2 * order], others[2 * order :]
        settings = (coefficients, centre, causal, windows, q_offset)
        out, lse, y, states = _ops.tensor_attention_lowrank_fwd(q, keys, values, masks, *settings)
        ctx.save_for_backward(q, *others, out, y, *states)
        ctx.settings, ctx.order = settings, order
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        m = ctx.order
        if dout is None and dlse is None:
            return (None,) * (7 + 3 * m)
        kept, inputs = ctx.saved_tensors, 1 + 2 * m
        sources, masks = kept[:inputs], kept[inputs : inputs + m]
        out, y, *states = kept[inputs + m :]
        part = reference.part(m, masks, ctx.settings)
        needed = ctx.needs_input_grad[6 : 6 + inputs]
        if second_order.batched(dout, dlse):
            grads = second_order.by_reference(part, sources, (dout, dlse), needed)
            return *(None,) * 6, *grads, *(None,) * m
        with torch.no_grad():
            dq, dkeys, dvalues = _ops.tensor_attention_lowrank_bwd(
                torch.zeros_like(out) if dout is None else dout, dlse, sources[0],
                sources[1 : 1 + m], sources[1 + m :], masks, out, y, states, *ctx.settings,
            )  # fmt: skip
        grads = [g if yes else None for g, yes in zip((dq, *dkeys, *dvalues), needed)]
        if torch.is_grad_enabled():
            # All queries at once: what comes before a block would be summed for each of them.
            grads = second_order.differentiable(grads, part, [slice(None)], sources, (dout, dlse))
        return *(None,) * 6, *grads, *(None,) * m


def tensor_attention_lowrank(
    q: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    key_masks: tuple[Tensor | None, ...],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments in float32 or float64; masks are bool, (B, G or 1, n)."""
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return reference.found(q, keys, values, key_masks, settings)[:2]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *keys, *values)):
        tensors = distinct((q, *keys, *values, *key_masks))
        return _TensorAttentionLowRank.apply(len(keys), *settings, *tensors)
    return _ops.tensor_attention_lowrank_fwd(q, keys, values, key_masks, *settings)[:2]
