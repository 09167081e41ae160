"""Exact tensor attention of order m >= 3, one key of the first axis at a time.

For a fixed key j of the first axis the rest is attention of order m - 1 with queries q * k_j, whose
output is weighted by v_j; the logsumexps say with which share:

    out_i = sum_j exp(lse_ij - lse_i) v_j * o_ij,        lse_i = log sum_j exp(lse_ij)

The backward goes the same way with the final lse, so that the probabilities of the inner problem
are those of the whole. Memory is that of order 2 plus a few tensors like q; nothing of size n^2 is
stored. Half types are computed in float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active
from pyloss.ops.tensor_attention import hidden
from pyloss.ops.tensor_attention.first_order import FirstOrderOnly
from pyloss.ops.tensor_attention.plan import WANT

_ops = torch.ops.pyloss


class OrderSettings(NamedTuple):
    """As Settings of the op, with a window per axis; 0: none."""

    scale: float
    causal: bool
    windows: tuple[int, ...]
    q_offset: int


# Dynamo follows what comes now, in versions that neither take a NamedTuple through
# Function.apply nor know _replace: the settings go on as a plain tuple.
_Plain = tuple[float, bool, tuple[int, ...], int]


def _inner_settings(settings: _Plain, first_query: int) -> _Plain:
    """Without the first axis, for queries that start at `first_query`."""
    scale, causal, windows, q_offset = settings
    return scale, causal, windows[1:], q_offset + first_query


def _pair_settings(settings: _Plain) -> tuple[float, bool, int, int, int, float, float]:
    """Those of the op, for the last two axes."""
    scale, causal, (w1, w2), q_offset = settings
    return scale, causal, w1, w2, q_offset, 0.0, 0.0


def _queries(settings: _Plain, key: int, n_q: int) -> slice:
    """Those that see a key of the first axis."""
    _, causal, windows, q_offset = settings
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
    """(out, lse) of the queries `at` times key j of the first axis."""
    pairs = q[:, :, at] * k[:, :, j : j + 1]
    masks_inner = [m if m is None else _of_queries(m, at) for m in masks[1:]]
    out, lse = _forward(
        pairs, keys[1:], values[1:], masks_inner, _inner_settings(settings, at.start)
    )
    if masks[0] is not None:
        lse = lse + _of_queries(masks[0], at)[..., j]
    return out, lse


def _backward(dout, delta, lse, q, keys, values, masks, settings: _Plain):
    """(dq, [dk], [dv]); delta is <dout, out> - dlse, lse that of all the axes together."""
    if len(keys) == 2:
        # The op forms delta itself, as <dout, out> - dlse.
        found = _ops.tensor_attention_bwd(
            dout, -delta, q, *keys, *values, *masks, torch.zeros_like(dout), lse,
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
        out, lse_j = _inner(q, k, keys, values, masks, settings, j, at)
        whole = lse[:, :, at]
        share = torch.where(whole == -math.inf, 0.0, torch.exp(lse_j - whole))
        dv[:, :, j] = (dout[:, :, at] * out * share.unsqueeze(-1)).sum(2)
        if masks[0] is not None:
            whole = whole - _of_queries(masks[0], at)[..., j]
            whole = torch.where(lse_j == -math.inf, -math.inf, whole)  # not inf - inf
        masks_inner = [m if m is None else _of_queries(m, at) for m in masks[1:]]
        dpairs, dinner, dvinner = _backward(
            (dout[:, :, at] * value).contiguous(), delta[:, :, at], whole.contiguous(),
            q[:, :, at] * key, keys[1:], values[1:], masks_inner,
            _inner_settings(settings, at.start),
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
    def forward(ctx, scale, causal, windows, q_offset, q, *others):
        order, settings = len(windows), (scale, causal, windows, q_offset)
        keys, values, masks = others[:order], others[order : 2 * order], others[2 * order :]
        acc = accumulator_dtype(q.dtype)
        q, keys, values = q.to(acc), [t.to(acc) for t in keys], [t.to(acc) for t in values]
        given = (q, keys, values, masks, causal, windows, q_offset)
        # A look at the numbers waits for a GPU and does not trace; the loop over the keys is slow
        # enough to go without.
        blind = q.is_cuda or torch.compiler.is_compiling()
        unclean = hidden.hides(masks, causal, windows) and (blind or hidden.unclean(*given))
        if unclean:
            keys, values = hidden.cleared(*keys), hidden.cleared(*values)
        out, lse = _forward(q, keys, values, masks, settings)
        if unclean:
            hidden.spoil(out, lse, *given)
        ctx.save_for_backward(q, *keys, *values, *masks, out, lse)
        ctx.settings, ctx.order = settings, order
        ctx.dtypes = [t.dtype for t in others[: 2 * order]]
        ctx.set_materialize_grads(False)
        # Not the tensors that are saved: torch.compile of torch 2.11 gives those no gradient.
        return out.to(ctx.dtypes[0], copy=torch.compiler.is_compiling()), lse.clone()

    @staticmethod
    def backward(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * (5 + 3 * ctx.order)
        q, *others, out, lse = ctx.saved_tensors
        m = ctx.order
        keys, values, masks = others[:m], others[m : 2 * m], others[2 * m :]
        with torch.no_grad():
            cotangent = torch.zeros_like(out) if dout is None else dout.to(out.dtype)
            delta = (cotangent * out).sum(-1)
            if dlse is not None:
                delta = delta - dlse
            dq, dk, dv = _backward(cotangent, delta, lse, q, keys, values, masks, ctx.settings)
        found = [g.to(ctx.dtypes[0]) for g in (dq, *dk, *dv)]
        if torch.is_grad_enabled():
            found = FirstOrderOnly.apply(len(found), *found, cotangent, q, *keys, *values)
        return *(None,) * 4, *found, *(None,) * m


def tensor_attention_order(
    q: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    masks: tuple[Tensor | None, ...],
    settings: OrderSettings,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments; masks are additive and get no gradient."""
    if functorch_active() or forward_ad_active():  # transforms must see into the op
        from pyloss.reference.tensor_attention import tensor_attention  # with its first use

        return tensor_attention(
            q,
            keys,
            values,
            masks=masks,
            scale=settings.scale,
            causal=settings.causal,
            windows=[w or None for w in settings.windows],
            q_offset=settings.q_offset,
        )
    tensors = distinct((q, *keys, *values, *masks))
    return _TensorAttentionOrder.apply(*settings, *tensors)
