"""Exact tensor attention of order m >= 3, one key of the first axis at a time.

For a fixed key j of the first axis the rest is attention of order m - 1 with queries q * k_j, whose
output is weighted by v_j; the logsumexps say with which share:

    out_i = sum_j exp(lse_ij - lse_i) v_j * o_ij,        lse_i = log sum_j exp(lse_ij)

The backward goes the same way: the inner problem gets its share of the cotangents. Memory is that
of order 2 plus a few tensors like q; nothing of size n^2 is stored. Half types are computed in
float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active
from pyloss.ops.tensor_attention import hidden, reference, second_order
from pyloss.ops.tensor_attention.plan import WANT

_ops = torch.ops.pyloss


class OrderSettings(NamedTuple):
    """As Settings of the op, with a window per axis; 0: none."""

    scale: float
    causal: bool
    windows: tuple[int, ...]
    q_offset: int
    softcap: float


# Dynamo follows what comes now, in versions that neither take a NamedTuple through
# Function.apply nor know _replace: the settings go on as a plain tuple.
_Plain = tuple[float, bool, tuple[int, ...], int, float]


def _inner_settings(settings: _Plain, first_query: int) -> _Plain:
    """Without the first axis, for queries that start at `first_query`."""
    scale, causal, windows, q_offset, softcap = settings
    return scale, causal, windows[1:], q_offset + first_query, softcap


def _pair_settings(settings: _Plain) -> tuple:
    """Those of the op, for the last two axes."""
    scale, causal, (w1, w2), q_offset, softcap = settings
    return scale, causal, w1, w2, q_offset, 0.0, 0.0, softcap


def _queries(settings: _Plain, key: int, n_q: int) -> slice:
    """Those that see a key of the first axis."""
    _, causal, windows, q_offset, _ = settings
    window, position = windows[0], key - q_offset
    first = position if causal else (position - window + 1 if window else 0)
    last = position + window if window else n_q
    first = min(max(first, 0), n_q)
    return slice(first, max(first, min(last, n_q)))


def _repeated(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[1], 1)


def _of_queries(mask: Tensor, at: slice) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, at]


def _forward(q, keys, values, masks, settings: _Plain):
    """(out, lse) in the dtype of q, which is float32 or float64."""
    if len(keys) == 2:
        return _ops.tensor_attention_fwd(q, *keys, *values, *masks, *_pair_settings(settings))
    batch, heads, n_q, _ = q.shape
    acc = q.new_zeros((batch, heads, n_q, values[0].shape[3]))
    most = q.new_full((batch, heads, n_q), -math.inf)
    total = torch.zeros_like(most)
    k, v = _repeated(keys[0], heads), _repeated(values[0], heads)
    for j in range(k.shape[2]):
        at = _queries(settings, j, n_q)
        out, lse = _inner(q, k, keys, values, masks, settings, j, at)
        lse = _with_mask(lse, masks[0], j, at)
        new = torch.maximum(most[:, :, at], lse)
        shift = torch.where(new == -math.inf, 0.0, new)
        kept, weight = torch.exp(most[:, :, at] - shift), torch.exp(lse - shift)
        acc[:, :, at].mul_(kept.unsqueeze(-1))
        acc[:, :, at].add_(out * v[:, :, j : j + 1] * weight.unsqueeze(-1))
        total[:, :, at] = total[:, :, at] * kept + weight
        most[:, :, at] = new
    lse = most + total.log()
    return acc / torch.where(total == 0, 1.0, total).unsqueeze(-1), lse


def _inner(q, k, keys, values, masks, settings, j, at):
    """(out, lse) of the queries `at` times key j of the first axis, its mask left out."""
    pairs = q[:, :, at] * k[:, :, j : j + 1]
    masks_inner = [m if m is None else _of_queries(m, at) for m in masks[1:]]
    inner = _inner_settings(settings, at.start)
    return _forward(pairs, keys[1:], values[1:], masks_inner, inner)


def _with_mask(lse, mask, j, at):
    return lse if mask is None else lse + _of_queries(mask, at)[..., j]


def _backward(dout, delta, out, lse, q, keys, values, masks, settings: _Plain):
    """(dq, [dk], [dv]); delta is <dout, out> - dlse."""
    if len(keys) == 2:
        found = _ops.tensor_attention_bwd(
            dout, (dout * out).sum(-1) - delta, q, *keys, *values, *masks, out, lse,
            *_pair_settings(settings), sum(WANT[:5]),
        )  # fmt: skip
        return found[0], list(found[1:3]), list(found[3:5])
    heads, n_q = q.shape[1:3]
    k, v = _repeated(keys[0], heads), _repeated(values[0], heads)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dkeys = [dk, *(torch.zeros_like(t) for t in keys[1:])]
    dvalues = [dv, *(torch.zeros_like(t) for t in values[1:])]
    for j in range(k.shape[2]):
        at = _queries(settings, j, n_q)
        key, value = k[:, :, j : j + 1], v[:, :, j : j + 1]
        out_j, lse_j = _inner(q, k, keys, values, masks, settings, j, at)
        whole = lse[:, :, at]
        share = torch.exp(_with_mask(lse_j, masks[0], j, at) - whole)
        share = torch.where(whole == -math.inf, 0.0, share)
        dout_j = dout[:, :, at] * share.unsqueeze(-1)
        dv[:, :, j] = (dout_j * out_j).sum(2)
        masks_inner = [m if m is None else _of_queries(m, at) for m in masks[1:]]
        dpairs, dinner, dvinner = _backward(
            dout_j * value, delta[:, :, at] * share, out_j, lse_j, q[:, :, at] * key, keys[1:],
            values[1:], masks_inner, _inner_settings(settings, at.start),
        )  # fmt: skip
        dq[:, :, at] += dpairs * key
        dk[:, :, j] = (dpairs * q[:, :, at]).sum(2)
        for total, part in zip((*dkeys[1:], *dvalues[1:]), (*dinner, *dvinner)):
            total += part
    groups = (keys[0].shape[0], keys[0].shape[1], -1)
    dkeys[0] = dk.view(*groups, *dk.shape[2:]).sum(2)
    dvalues[0] = dv.view(*groups, *dv.shape[2:]).sum(2)
    return dq, dkeys, dvalues


class _TensorAttentionOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, causal, windows, q_offset, softcap, *tensors):
        order, settings = len(windows), (scale, causal, windows, q_offset, softcap)
        q, keys, values, masks = _accumulated(tensors, order)
        given = (q, keys, values, masks, causal, windows, q_offset)
        # A look at the numbers waits for a device and does not trace; the loop over keys is slow
        # enough to go without.
        blind = not q.is_cpu or torch.compiler.is_compiling()
        unclean = hidden.hides(masks, causal, windows) and (blind or hidden.unclean(*given))
        if unclean:
            keys, values = hidden.cleared(*keys), hidden.cleared(*values)
        out, lse = _forward(q, keys, values, masks, settings)
        if unclean:
            hidden.spoil(out, lse, *given)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.settings, ctx.order, ctx.unclean = settings, order, unclean
        ctx.set_materialize_grads(False)
        # Not the tensors that are saved: torch.compile of torch 2.11 gives those no gradient.
        return out.to(tensors[0].dtype, copy=torch.compiler.is_compiling()), lse.clone()

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * (6 + 3 * ctx.order)
        *tensors, out, lse = ctx.saved_tensors
        m, inputs = ctx.order, 1 + 2 * ctx.order
        part = reference.part(m, *ctx.settings)
        needed = (*ctx.needs_input_grad[5 : 5 + inputs], *(False,) * m)
        if second_order.batched(dout, dlse):
            grads = second_order.by_reference(part, tensors, (dout, dlse), needed)
            return *(None,) * 5, *grads
        with torch.no_grad():
            q, keys, values, masks = _accumulated(tensors, m)
            if ctx.unclean:
                keys, values = hidden.cleared(*keys), hidden.cleared(*values)
            cotangent = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
            delta = (cotangent * out).sum(-1)
            if dlse is not None:
                delta = delta - dlse
            dq, dk, dv = _backward(cotangent, delta, out, lse, q, keys, values, masks, ctx.settings)
        grads = [g.to(tensors[0].dtype) if yes else None for g, yes in zip((dq, *dk, *dv), needed)]
        grads += [None] * m
        if torch.is_grad_enabled():
            blocks = reference.blocks(tensors[0], tensors[1 : 1 + m])
            grads = second_order.differentiable(grads, part, blocks, tensors, (dout, dlse))
        return *(None,) * 5, *grads


def _accumulated(tensors, order):
    """(q, keys, values, masks), the first three in the accumulator's dtype."""
    acc = accumulator_dtype(tensors[0].dtype)
    q, *others = [t.to(acc) for t in tensors[: 1 + 2 * order]]
    return q, others[:order], others[order:], tensors[1 + 2 * order :]


def tensor_attention_order(
    q: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    masks: tuple[Tensor | None, ...],
    settings: OrderSettings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments; masks are additive and get no gradient."""
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        return reference.of_order(q, keys, values, masks, *settings)
    tensors = distinct((q, *keys, *values, *masks))
    return _TensorAttentionOrder.apply(*settings, *tensors)
