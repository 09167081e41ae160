"""Reductions over the segments of x (N, W), CSR offsets (S + 1,), and what goes back to the values.

    segment_fold   (results, S, W) of each segment: sum, extreme, moments, softmax statistics, and
                   what gradients need. float32, float64 of float64; int64 for ARGMAX
    segment_map    (N, W), of the dtype of x, of each value and what is `given` (S, W) of its
                   segment: gradients, and the softmax itself

The kinds are in kinds.py, the formulas in csrc/common/segment.h. The kernels check the offsets
themselves: on the CPU that is a ValueError, on a GPU, which nobody waits for, NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._registry import define_op
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.segment import cpu, cuda, kinds, reference
from pyloss.ops.segment.calls import empty_fold, empty_map

define_op(
    "segment_fold(Tensor x, Tensor? other, Tensor offsets, Tensor[] given, int kind) -> Tensor",
    fake=lambda x, other, offsets, given, kind: empty_fold(x, offsets, kind),
    impls={"cpu": cpu.fold, "cuda": cuda.fold, "reference": reference.fold},
    shards="nW, nW, s, sW -> rsW",
)
define_op(
    "segment_map(Tensor x, Tensor? other, Tensor offsets, Tensor[] given, int kind) -> Tensor",
    fake=lambda x, other, offsets, given, kind: empty_map(x),
    impls={"cpu": cpu.map_, "cuda": cuda.map_, "reference": reference.map_},
    shards="nW, nW, s, sW -> nW",
)

_ops = torch.ops.pyloss


def _backward(g: Tensor, x: Tensor, offsets: Tensor, out: Tensor | None, kind: int) -> Tensor:
    """The gradient of a fold by the kernels; g and `out` (results, S, W), which sums lack."""
    rows = [t.contiguous() for t in g]
    if kind in (kinds.SUM, kinds.MEAN):
        how = kinds.SPREAD if kind == kinds.SUM else kinds.SPREAD_MEAN
    elif kind in (kinds.MIN, kinds.MAX):
        how = kinds.TO_TIES
        rows += [out[0], _ops.segment_fold(x, None, offsets, [out[0]], kinds.TIES)[0]]
    elif kind == kinds.PROD:
        how = kinds.TO_FACTORS
        rows += _ops.segment_fold(x, None, offsets, [], kinds.FACTORS).unbind()
    elif kind == kinds.LOGSUMEXP:
        how = kinds.EXP
        rows += [out[0]]
    elif kind == kinds.MOMENTS:
        how = kinds.TO_MOMENTS
        rows += [out[0]]
    else:
        how = kinds.TO_SOFTMAX
        rows += [*out, _ops.segment_fold(x, None, offsets, [out[0]], kinds.TIES)[0]]
    return _ops.segment_map(x, None, offsets, rows, how)


class _SegmentFold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, kind):
        out = _ops.segment_fold(x, None, offsets, [], kind)
        if kind in (kinds.SUM, kinds.MEAN):  # the gradient needs no value: nothing is kept
            ctx.save_for_backward(x.new_empty(()).expand_as(x), offsets, None)
        else:
            ctx.save_for_backward(x, offsets, out)
        ctx.kind = kind
        return out

    @staticmethod
    def backward(ctx, g):
        x, offsets, out = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(g):  # create_graph, is_grads_batched
            return reference.composed_gradient(g, x, offsets, ctx.kind), None, None
        # detach: the result is one of this very node.
        out = None if out is None else out.detach()
        return _backward(g, x, offsets, out, ctx.kind), None, None


class _SegmentSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets):
        y = _softmax(x, offsets)
        ctx.save_for_backward(x, offsets, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, offsets, y = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(g):
            return reference.composed_softmax_gradient(g, x, offsets), None
        y = y.detach()
        inner = _ops.segment_fold(g, y, offsets, [], kinds.INNER)[0]
        return _ops.segment_map(g, y, offsets, [inner], kinds.FROM_NORMALIZED), None


def _softmax(x: Tensor, offsets: Tensor) -> Tensor:
    stats = _ops.segment_fold(x, None, offsets, [], kinds.SOFTMAX)
    return _ops.segment_map(x, None, offsets, list(stats.unbind()), kinds.NORMALIZED)


def fold(x: Tensor, offsets: Tensor, kind: int) -> Tensor:
    """(results, S, W) of x (N, W), float32 or float64; differentiable."""
    if functorch_active() or forward_ad_active():
        return reference.composed(x, offsets, kind)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SegmentFold.apply(x, offsets, kind)
    return _ops.segment_fold(x, None, offsets, [], kind)


def argmax(x: Tensor, offsets: Tensor, most: Tensor) -> Tensor:
    """Where in x (N, W) the first value is that is the maximum (S, W); int64, -1 if empty."""
    x, most = x.detach(), most.detach()
    if functorch_active():
        return reference.argmax(x, offsets)
    return _ops.segment_fold(x, None, offsets, [most.contiguous()], kinds.ARGMAX)[0]


def softmax(x: Tensor, offsets: Tensor) -> Tensor:
    """Of each segment of x (N, W), in its dtype; differentiable."""
    if functorch_active() or forward_ad_active():
        return reference.composed_softmax(x, offsets)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SegmentSoftmax.apply(x, offsets)
    return _softmax(x, offsets)


def covariance(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (S, d) and covariance (S, d, d) of each segment of x (N, d); differentiable."""
    return reference.composed_covariance(x, offsets)
