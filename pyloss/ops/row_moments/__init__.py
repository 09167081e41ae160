"""Moments of rows of class scores: target entry, mean, centred variance. What a spherical loss is a
function of.

    row_moments_fwd    (4, *rows): target entry, target entry less mean, mean, variance
    row_moments_bwd    gradient of the scores from upstream gradients of the four

Formulas: csrc/common/row_moments.h, pyloss/reference/row_moments.py.

Paper: arXiv 1604.08859.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._registry import define_op
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.row_moments import cpu, cuda, reference
from pyloss.ops.row_moments.calls import empty_moments
from pyloss.ops.row_softmax.layout import gradient_like

define_op(
    "row_moments_fwd(Tensor input, Tensor target, int ignore_index) -> Tensor",
    fake=lambda input, target, ignore_index: empty_moments(input),
    impls={"cpu": cpu.forward, "cuda": cuda.forward, "reference": reference.forward},
    shards="Nc*, N* -> kN*",
    plain=reference.composed,
)
define_op(
    "row_moments_bwd(Tensor grad, Tensor input, Tensor target, Tensor moments, int ignore_index) "
    "-> Tensor",
    fake=lambda grad, input, target, moments, ignore_index: gradient_like(input),
    impls={"cpu": cpu.backward, "cuda": cuda.backward, "reference": reference.backward},
    shards="kN*, Nc*, N*, kN* -> Nc*",
)

_ops = torch.ops.pyloss


class _RowMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, ignore_index):
        moments = _ops.row_moments_fwd(input, target, ignore_index)
        ctx.save_for_backward(input, target, moments)
        ctx.ignore_index = ignore_index
        return moments

    @staticmethod
    def backward(ctx, grad):
        input, target, moments = ctx.saved_tensors
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph, is_grads_batched
            return reference.composed_gradient(grad, input, target, ctx.ignore_index), None, None
        # detach: the moments are a result of this very node.
        found = _ops.row_moments_bwd(grad, input, target, moments.detach(), ctx.ignore_index)
        return found, None, None


def row_moments(input: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """(4, *rows) of checked scores ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``: float32, float64
    for float64 scores; 0 for ignored rows."""
    if functorch_active() or forward_ad_active():
        return reference.composed(input, target, ignore_index)
    if torch.is_grad_enabled() and input.requires_grad:
        return _RowMoments.apply(input, target, ignore_index)
    return _ops.row_moments_fwd(input, target, ignore_index)
