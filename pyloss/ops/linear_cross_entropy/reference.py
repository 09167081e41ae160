"""The ops of linear_cross_entropy on the reference, and the loss in torch operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients
from pyloss.ops.linear_cross_entropy.by_chunks import listed, result_buffers
from pyloss.ops.linear_cross_entropy.call import Call, Tensors, wanted
from pyloss.ops.linear_cross_entropy.chunks import Chunks
from pyloss.ops.row_softmax import reference as rows
from pyloss.ops.row_softmax.calls import WANT_EXTRAS
from pyloss.ops.row_softmax.epilogue import transform
from pyloss.ops.row_softmax.masses import ignored_rows
from pyloss.ops.row_softmax.recorded import record, softmax
from pyloss.ops.row_softmax.records import Codes, Options, unpacked


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


def _record(saved, extras, t: Tensors, options: Options, codes: Codes, chunk: int) -> None:
    """What the forward by chunks leaves for a backward of the kernels."""
    call = Call(t, options, codes)
    chunks = Chunks(t, call, chunk)
    logits = all_logits(t, codes)
    for part in chunks:
        found = chunks.statistics(saved, part, extras is not None)
        x, *labels = chunks.row_tensors(chunks.take(logits, part), part)
        record(found, x, tuple(labels), call.options, call.codes)
        if extras is not None:
            found.extras.copy_(chunks.take(extras.t(), part).t())


def _record_for_tiles(saved, t: Tensors, options: Options, codes: Codes) -> None:
    """The same of the forward by tiles."""
    z = transform(options).value(all_logits(t, codes).to(saved.dtype))
    bad = outside(t.target, z.shape[1])
    row = softmax(z, torch.where(bad, 0, wide(t.target)))
    rest = torch.where(bad & ~ignored_rows(t[3:], codes), torch.nan, row.rest)
    saved.copy_(torch.stack([row.m, rest, row.zy, row.ez])[: saved.shape[0]])


def forward(*args, recorded=True):
    """Args:
    recorded: with what a backward of the kernels reads; that of this file needs none of it.
    """
    t = Tensors(*args[:8])
    options, codes, loss_dtype, wants, chunk, exact, *numbers = args[8:]
    options, codes = unpacked(options, codes, *numbers)
    buffers = result_buffers(t.input, options, codes, loss_dtype, wants)
    loss, saved, extras, index = buffers
    with torch.no_grad():
        found = composed(t, options, codes, loss_dtype, wants)
        if recorded:
            _record(saved, found[1], t, options, codes, chunk)
    for out, value in zip((loss, extras, index), found):
        if out is not None:
            out.copy_(value)
    grads = []
    if any(wanted(wants)):
        one = torch.ones((), dtype=saved.dtype, device=t.input.device)
        grads = _composed_gradients(one, None, t, options, codes, wants)
    return listed(*buffers, grads)


def backward(grad_loss, grad_extras, *args):
    saved, options, codes, wants, chunk, exact, *numbers = args[8:]
    options, codes = unpacked(options, codes, *numbers)
    t = Tensors(*args[:8])
    return _composed_gradients(grad_loss, grad_extras, t, options, codes, wants)


def tiles_forward(results, t: Tensors, options, codes, loss_dtype, wants, numbers=None):
    """Into the empty results of the forward by tiles."""
    options, codes = unpacked(options, codes, numbers)
    with torch.no_grad():
        loss, extras, _ = composed(t, options, codes, loss_dtype, wants)
        _record_for_tiles(results[1], t, options, codes)
    results[0].copy_(loss)
    if extras is not None:
        results[2].copy_(extras)
    return results


def tiles_backward(grad_loss, grad_extras, t: Tensors, options, codes, wants, numbers=None):
    options, codes = unpacked(options, codes, numbers)
    return _composed_gradients(grad_loss, grad_extras, t, options, codes, wants)
