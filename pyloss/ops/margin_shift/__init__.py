"""How far margins moved between two sets of logits (N, C, ...), as ops.

    margin_shift_fwd    of each row the norm, or its square, and the sum of what moved, which the
                        gradient needs, in no less than float32
    margin_shift_bwd    both gradients, or one, in one pass over both sets

Formulas: pyloss/reference/margin_shift.py. Kernels: csrc/common/margin_shift.h.

Paper: arXiv 2304.07288.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import distinct, forward_ad_active, functorch_active, is_batched
from pyloss.ops.margin_shift import cpu, cuda, reference
from pyloss.ops.row_softmax.layout import gradient_like


def _forward_fake(x, x_adv, target, squared, ignore_index):
    sums = accumulator_dtype(x.dtype)
    return tuple(x.new_empty(target.shape, dtype=sums) for _ in range(2))


def _backward_fake(g, shift, total, x, x_adv, target, squared, ignore_index, clean, adv):
    return tuple(
        gradient_like(t) if needed else t.new_empty((0,))
        for t, needed in ((x, clean), (x_adv, adv))
    )


define_op(
    "margin_shift_fwd(Tensor x, Tensor x_adv, Tensor target, bool squared, int ignore_index) "
    "-> (Tensor, Tensor)",
    fake=_forward_fake,
    impls={"cpu": cpu.forward, "cuda": cuda.forward, "reference": reference.forward},
    shards="Nc*, Nc*, N* -> N*, N*",
    plain=functools.partial(reference.forward, checked=False),
)
define_op(
    "margin_shift_bwd(Tensor g, Tensor shift, Tensor total, Tensor x, Tensor x_adv, Tensor target, "
    "bool squared, int ignore_index, bool clean, bool adv) -> (Tensor, Tensor)",
    fake=_backward_fake,
    impls={"cpu": cpu.backward, "cuda": cuda.backward, "reference": reference.backward},
    shards="N*, N*, N*, Nc*, Nc*, N* -> Nc*, Nc*",
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _MarginShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_adv, target, squared, ignore_index):
        shift, total = _ops.margin_shift_fwd(x, x_adv, target, squared, ignore_index)
        ctx.save_for_backward(x, x_adv, target, shift, total)
        ctx.options = (squared, ignore_index)
        return shift

    @staticmethod
    def backward(ctx, g):
        x, x_adv, target, shift, total = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled() or is_batched(g):  # create_graph, is_grads_batched
            found = reference.composed_gradients(g, x, x_adv, target, *ctx.options, needed)
        else:
            found = _ops.margin_shift_bwd(g, shift, total, x, x_adv, target, *ctx.options, *needed)
            found = [d if yes else None for d, yes in zip(found, needed)]
        return *found, None, None, None


def margin_shift(
    x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int
) -> Tensor:
    """The shift of each row, of the shape of `target`, of checked logits (N, C, ...) of one dtype
    and labels (N, ...)."""
    if functorch_active() or forward_ad_active():
        # Transforms see torch operations.
        return reference.composed(x, x_adv, target, squared, ignore_index)
    if torch.is_grad_enabled() and (x.requires_grad or x_adv.requires_grad):
        x, x_adv = distinct((x, x_adv))
        return _MarginShift.apply(x, x_adv, target, squared, ignore_index)
    return _ops.margin_shift_fwd(x, x_adv, target, squared, ignore_index)[0]
