"""The ops of linear_cross_entropy on the reference, and the loss in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients
from pyloss.ops.linear_cross_entropy.by_chunks import listed, result_buffers
from pyloss.ops.linear_cross_entropy.call import Tensors, wanted
from pyloss.ops.row_softmax import reference as rows
from pyloss.ops.row_softmax.calls import WANT_EXTRAS
from pyloss.ops.row_softmax.masses import ignored_rows
from pyloss.ops.row_softmax.records import Codes, unpacked


def all_logits(t: Tensors, codes: Codes) -> Tensor:
    """All logits at once, as torch operations; ignored rows are not looked at."""
    x = t.input
    ignored = ignored_rows(t[3:], codes)
    if ignored is not None:
        x = torch.where(ignored.unsqueeze(1), 0.0, x)
    bias = None if t.linear_bias is None else t.linear_bias.to(x.dtype)
    return F.linear(x, t.linear_weight.to(x.dtype), bias)


def composed(t: Tensors, options, codes, loss_dtype, wants):
    """(loss, extras, index) of the plain-PyTorch reference."""
    logits = all_logits(t, unpacked(options, codes)[1]).to(accumulator_dtype(t.input.dtype))
    return rows.composed(logits, t[3:], options, codes, loss_dtype, wants)


def gradients_of(function, t: Tensors, grad_loss, grad_extras, needed, create_graph=False):
    """Gradients of the layer's tensors through (loss, extras, ..) = function(t, wants)."""
    wants = WANT_EXTRAS if grad_extras is not None else 0

    def found(*layer):
        loss, extras, _ = function(Tensors(*layer, *t[3:]), wants)
        return rows.differentiable(loss, extras)

    cotangents = rows.differentiable(grad_loss, grad_extras)
    return gradients(found, t[:3], cotangents, needed, create_graph=create_graph)


def _composed_gradients(grad_loss, grad_extras, t: Tensors, options, codes, wants):
    acc = accumulator_dtype(t.input.dtype)

    def function(t, asked):
        return composed(t, options, codes, acc, asked)

    found = gradients_of(function, t, grad_loss, grad_extras, wanted(wants))
    return [g.contiguous() for g in found if g is not None]


def forward(*args):
    t = Tensors(*args[:8])
    options, codes, loss_dtype, wants, chunk, exact = args[8:]
    buffers = result_buffers(t.input, *unpacked(options, codes), loss_dtype, wants)
    loss, saved, extras, index = buffers
    with torch.no_grad():
        found = composed(t, options, codes, loss_dtype, wants)
    saved.zero_()  # the reference's backward starts from the input again
    for out, value in zip((loss, extras, index), found):
        if out is not None:
            out.copy_(value)
    grads = []
    if any(wanted(wants)):
        one = torch.ones((), dtype=saved.dtype, device=t.input.device)
        grads = _composed_gradients(one, None, t, options, codes, wants)
    return listed(*buffers, grads)


def backward(grad_loss, grad_extras, *args):
    saved, options, codes, wants, chunk, exact = args[8:]
    t = Tensors(*args[:8])
    return _composed_gradients(grad_loss, grad_extras, t, options, codes, wants)


def tiles_forward(results, t: Tensors, options, codes, loss_dtype, wants):
    """Into the empty results of the forward by tiles."""
    with torch.no_grad():
        loss, extras, _ = composed(t, options, codes, loss_dtype, wants)
    results[0].copy_(loss)
    results[1].zero_()
    if extras is not None:
        results[2].copy_(extras)
    return results


def tiles_backward(grad_loss, grad_extras, t: Tensors, options, codes, wants):
    return _composed_gradients(grad_loss, grad_extras, t, options, codes, wants)
