"""The ops of row_softmax on the reference, and gradients in torch operations."""

from __future__ import annotations

import math

import torch

from pyloss.ops import _empty
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients
from pyloss.ops.row_softmax.calls import (
    WANT_EXTRAS,
    WANT_GRAD,
    WANT_INDEX,
    listed,
    outputs,
)
from pyloss.ops.row_softmax.layout import row_count
from pyloss.ops.row_softmax.recorded import record
from pyloss.ops.row_softmax.records import (
    DENSE,
    FOCAL,
    LDR,
    MIX,
    POLY1,
    REDUCTIONS,
    RELAXED,
    unpacked,
    unpacked_saved,
)

_LABEL_STATS = ("logprob", "rank")  # statistics that probabilities do not have


def keywords(target, target2, mix, weight, token_weight, options, codes) -> dict:
    """The arguments of a call in the words of the reference."""
    o, c = unpacked(options, codes)
    return dict(
        target=(target, target2, mix) if c.kind == MIX else target,
        weight=weight,
        ignore_index=c.ignore_index,
        reduction=next(k for k, v in REDUCTIONS.items() if v == c.reduction),
        label_smoothing=o.smoothing,
        tau=o.tau,
        truncate=None if o.max_nll == math.inf else math.exp(-o.max_nll),
        gamma=o.gamma if c.loss == FOCAL else None,
        poly1=o.poly1 if c.loss == POLY1 else None,
        relaxation=o.relaxation if c.loss == RELAXED else None,
        affine=(o.temperature, o.offset) if c.loss == LDR else None,
        margin=o.margin,
        z_loss=o.z_loss,
        softcap=o.softcap or None,
        logit_scale=o.logit_scale,
        temperature=o.temperature,
        token_weight=token_weight,
        num_items=o.num_items or None,
        empty="zero" if c.zero_if_empty else "nan",
    )


def composed(input, tensors, options, codes, loss_dtype, wants):
    """(loss, extras, index) in torch operations; what was not asked for is None.

    Args:
        tensors: (target, target2, mix, weight, token_weight).
    """
    from pyloss.reference.row_softmax import row_softmax  # with its first use

    _, c = unpacked(None, codes)
    extra_names = ("lse", "logprob", "entropy", "z_loss") if wants & WANT_EXTRAS else ()
    index_names = ("argmax", "rank") if wants & WANT_INDEX else ()
    names = [n for n in (*extra_names, *index_names) if c.kind != DENSE or n not in _LABEL_STATS]
    found = row_softmax(
        input, **keywords(*tensors, options, codes), loss_dtype=loss_dtype, return_stats=names
    )
    if not names:  # then it returns the loss alone
        return found, None, None
    loss, stats = found

    def rows(wanted):
        if not wanted:
            return None
        zero = torch.zeros_like(stats[wanted[0]])
        return torch.stack([stats.get(n, zero).flatten() for n in wanted])

    return loss, rows(extra_names), rows(index_names)


def composed_gradient(
    grad_loss, grad_extras, input, target, target2, mix, weight, token_weight, options, codes,
    wrt=(True, False), create_graph=False,
):  # fmt: skip
    """Gradients of the reference with respect to (logits, probabilities), None where not wanted.

    With `create_graph` they are functions of the given tensors, to any order.
    """
    rest = (target2, mix, weight, token_weight)
    wants = WANT_EXTRAS if grad_extras is not None else 0

    def found(input, target):
        acc = accumulator_dtype(input.dtype)
        loss, extras, _ = composed(input, (target, *rest), options, codes, acc, wants)
        return differentiable(loss, extras)

    return gradients(
        found, (input, target), differentiable(grad_loss, grad_extras), wrt,
        create_graph=create_graph,
    )  # fmt: skip


def differentiable(loss, extras):
    """The outputs, or their cotangents, that a gradient depends on: not the z-loss."""
    return loss, None if extras is None else extras[:3]


def forward(
    input, target, target2, mix, weight, token_weight, options, codes, loss_dtype, wants,
    numbers=None, *, recorded=True,
):  # fmt: skip
    """Args:
    recorded: with what a backward of the kernels reads; that of this file needs none of it.
    """
    tensors = (target, target2, mix, weight, token_weight)
    options, codes = unpacked(options, codes, numbers)
    loss, statistics, index = outputs(input, options, codes, loss_dtype, wants)
    saved = statistics.saved
    with torch.no_grad():
        found = composed(input, tensors, options, codes, None, wants)
        loss.copy_(found[0])
        if recorded:
            record(statistics, input, tensors, options, codes)
        if found[1] is not None:
            statistics.extras.copy_(found[1])
        if index is not None:
            index.copy_(found[2])
    grad = None
    if wants & WANT_GRAD:
        one = torch.ones((), dtype=saved.dtype, device=input.device)
        grad = composed_gradient(one, None, input, *tensors, options, codes)[0]
    return listed(loss, saved, index, grad)


def backward(grad_loss, grad_extras, input, *rest):
    tensors, _, options, codes = unpacked_saved(rest)
    return composed_gradient(grad_loss, grad_extras, input, *tensors, options, codes)[0]


def backward_(grad_loss, grad_extras, input, *rest):
    input.copy_(backward(grad_loss, grad_extras, input, *rest))


def hvp(v, grad_loss, grad_extras, input, *rest):
    tensors, saved, options, codes = unpacked_saved(rest)
    rows, acc = row_count(input), saved.dtype
    with torch.enable_grad():
        x = input.detach().requires_grad_()
        g = grad_loss.detach().requires_grad_()
        c = None if grad_extras is None else grad_extras.detach().requires_grad_()
        dx = composed_gradient(g, c, x, *tensors, options, codes, create_graph=True)[0]
        found = torch.autograd.grad(dx, [x, g] if c is None else [x, g, c], v)
    grad_rows = found[1].to(acc).flatten()
    if codes.scalar:
        # The derivative of the one scalar, as if the first row had all of it.
        grad_rows = torch.cat([grad_rows, grad_rows.new_zeros(max(rows - 1, 0))])[:rows]
    return found[0], grad_rows, x.new_empty(0, dtype=acc) if c is None else found[2][:3].to(acc)


def scale_(data, factor):
    _empty.scale_(data, factor)
