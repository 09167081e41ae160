"""Contrastive losses of one or two tensors of rows, from the features to the mean, as one op.

    y = x / max(|x|, 1e-12) of both        loss = f sum_i (lse_i - positive_i)

Of views a row's positive is its other view (NT-Xent), else the key of its place (InfoNCE), with the
columns half of the loss each (CLIP); the sigmoid loss has terms of its own (SigLIP). With labels
the rows of one tensor are queries and keys, those of the same label being positives, and the terms
are lse_i - positive_i / positives_i of the rows that have any, and negatives (supervised). f is one
over the rows that count, or 1.

In a small batch a step of the operations that a loss otherwise is made of is mostly their calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss import _C, backends
from pyloss.ops import _gemm
from pyloss.ops._flops import count_by
from pyloss.ops._launch import DTYPE_CODES, address, scratch
from pyloss.ops._reference import gradients
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import forward_ad_active, functorch_active, is_batched
from pyloss.ops.similarity_softmax import records, reference
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    POSITIVE,
    WANT_BIAS,
    WANT_KEYS,
    WANT_QUERIES,
    WANT_SCALE,
    WANTS,
    WHOLE,
    Pairs,
    flops,
)
from pyloss.ops.similarity_softmax.call import SIGMOID as PAIR_SIGMOID

VIEWS, SUM, SIGMOID = 1, 2, 4  # bits of `flags`, with COLUMNS


class _Options(NamedTuple):
    """A number counts where there is no tensor, which is () and of the dtype of the features."""

    scale: float
    scales: Tensor | None
    bias: float  # with SIGMOID
    biases: Tensor | None
    labels: Tensor | None  # int64, (N,); then there is no second tensor
    flags: int


# --------------------------------------------------------------------------------------------------
# In torch operations


def composed(x1: Tensor, x2: Tensor | None, o: _Options) -> Tensor:
    if o.labels is not None:
        return _of_classes(x1, o)
    rows = x1.shape[0]
    at = torch.arange(rows, device=x1.device)
    if o.flags & VIEWS:
        z, target = F.normalize(torch.cat([x1, x2]), dim=1), torch.cat([at + rows, at])
        pairs = Pairs(z, None, o.scale, o.scales, target, None, None, 0, 0)
    else:
        of = (F.normalize(x, dim=1) for x in (x1, x2))
        pairs = Pairs(*of, o.scale, o.scales, at, None, None, -1, o.flags & COLUMNS)
    if o.flags & SIGMOID:
        (each,) = reference.sums(pairs, o.biases, (o.bias,), PAIR_SIGMOID)
    else:
        lse, positive, _, _, _, column_lse, column_positive, *_ = reference.stats(pairs)
        each = lse - positive
        if o.flags & COLUMNS:
            each = 0.5 * (each + (column_lse - column_positive))
        if rows <= 1:  # a positive alone is certain, whatever the roundings of its logit
            each = each * 0.0
    return each.sum() if o.flags & SUM else each.sum() / max(1, each.shape[0])


def _of_classes(x: Tensor, o: _Options) -> Tensor:
    z = F.normalize(x, dim=1)
    pairs = Pairs(z, None, o.scale, o.scales, None, o.labels, o.labels, 0, POSITIVE)
    lse, positive, count, positives, *_ = reference.stats(pairs)
    counted = (positives > 0) & (count > positives)
    total = torch.where(counted, lse - positive / positives.clamp(min=1), 0.0).sum()
    return total if o.flags & SUM else total / counted.sum().clamp(min=1)


def _differentiated(x1, x2, g, o: _Options, needed, create_graph=False):
    return gradients(
        lambda x1, x2, s, b: composed(x1, x2, o._replace(scales=s, biases=b)),
        (x1, x2, o.scales, o.biases), (g,), needed, create_graph=create_graph,
    )  # fmt: skip


def _forward_reference(x1, x2, *options):
    with torch.no_grad():
        unit, stats = _saved(x1, *options[-2:])
        return composed(x1, x2, _Options(*options)), unit.zero_(), stats.zero_()


def _backward_reference(x1, x2, unit, stats, g, *rest):
    *options, want = rest
    o = _Options(*options)
    of_views = o.flags & VIEWS and want & WANT_QUERIES
    if of_views:
        want |= WANT_KEYS
    found = _differentiated(x1, x2, g, o, [bool(want & bit) for bit in WANTS])
    if of_views:
        found[:2] = [torch.cat(found[:2])]
    return [t for t in found if t is not None]


# --------------------------------------------------------------------------------------------------
# On the CPU


def _saved(x1: Tensor, labels: Tensor | None, flags: int) -> tuple[Tensor, Tensor]:
    """For the backward: unit rows of both, and their norms and what lse there is; with labels the
    weight of a row's positives, too."""
    rows, d = x1.shape
    if labels is not None:
        return torch.empty_like(x1), x1.new_empty((3, rows))
    of_lse = 0 if flags & SIGMOID else 2 if flags & (VIEWS | COLUMNS) else 1
    return x1.new_empty((2 * rows, d)), x1.new_empty((2 + of_lse, rows))


def _record(unit: Tensor, stats: Tensor, options) -> records.Loss:
    scale, scales, bias, biases, labels, flags = options
    return records.Loss(
        stats.shape[1], unit.shape[1], DTYPE_CODES[unit.dtype], flags & VIEWS != 0,
        flags & COLUMNS != 0, flags & SIGMOID != 0, flags & SUM != 0, scale, address(scales), bias,
        address(biases), address(labels), unit.data_ptr(), stats.data_ptr(),
    )  # fmt: skip


def _forward(x1, x2, *options):
    loss, (unit, stats) = x1.new_empty(()), _saved(x1, *options[-2:])
    record, threads = _record(unit, stats, options), torch.get_num_threads()
    size = _C.similarity_loss_fwd_scratch_bytes(record, threads)
    buffer, start = scratch(x1, size)
    _C.similarity_loss_fwd(
        record, x1.data_ptr(), address(x2), loss.data_ptr(), start, size, threads
    )
    del buffer
    return loss, unit, stats


def _gradients(x1, unit, options, want):
    """Empty ones, None for those not wanted. Of views the first is of both."""
    _, scales, _, biases, _, flags = options
    of_views = flags & VIEWS
    return (
        torch.empty_like(unit if of_views else x1) if want & WANT_QUERIES else None,
        torch.empty_like(x1) if want & WANT_KEYS and not of_views else None,
        torch.empty_like(scales) if want & WANT_SCALE else None,
        torch.empty_like(biases) if want & WANT_BIAS else None,
    )


def _backward(x1, x2, unit, stats, g, *rest):
    *options, want = rest
    found = _gradients(x1, unit, options, want)
    record, threads = _record(unit, stats, options), torch.get_num_threads()
    wanted = (t is not None for t in found)
    size = _C.similarity_loss_bwd_scratch_bytes(record, *wanted, threads)
    buffer, start = scratch(unit, size)
    to = records.LossGradients(*map(address, (g, *found)))
    _C.similarity_loss_bwd(record, to, start, size, threads)
    del buffer
    return [t for t in found if t is not None]


# --------------------------------------------------------------------------------------------------
# The op


def _forward_fake(x1, x2, *options):
    return x1.new_empty(()), *_saved(x1, *options[-2:])


def _backward_fake(x1, x2, unit, stats, g, *rest):
    *options, want = rest
    return [t for t in _gradients(x1, unit, options, want) if t is not None]


_OPTIONS = "float scale, Tensor? scales, float bias, Tensor? biases, Tensor? labels, int flags"
define_op(
    f"similarity_loss_fwd(Tensor x1, Tensor? x2, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    impls={"cpu": _forward, "reference": _forward_reference},
    shards=WHOLE,
)
define_op(
    "similarity_loss_bwd(Tensor x1, Tensor? x2, Tensor unit, Tensor stats, Tensor g, "
    f"{_OPTIONS}, int want) -> Tensor[]",
    fake=_backward_fake,
    impls={"cpu": _backward, "reference": _backward_reference},
    shards=WHOLE,
)


def _flops(x1, x2, flags, want=None):
    if flags & VIEWS:
        return flops((2 * x1[0], x1[1]), None, want)
    return flops(x1, x2, want)  # x2 None: of x1 with itself


count_by("similarity_loss_fwd", lambda *args, out_shape=None: _flops(*args[:2], args[7]))
count_by("similarity_loss_bwd", lambda *args, out_shape=None: _flops(*args[:2], *args[10:12]))

_ops = torch.ops.pyloss


class _SimilarityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x1, x2, *options):
        loss, unit, stats = _ops.similarity_loss_fwd(x1, x2, *options)
        scale, scales, bias, biases, labels, flags = options
        ctx.save_for_backward(x1, x2, unit, stats, scales, biases, labels)
        ctx.numbers = scale, bias, flags
        return loss

    @staticmethod
    def backward(ctx, g):
        x1, x2, unit, stats, scales, biases, labels = ctx.saved_tensors
        scale, bias, flags = ctx.numbers
        options = scale, scales, bias, biases, labels, flags
        of_1, of_2, _, of_scale, _, of_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(g):
            needed = of_1, of_2, of_scale, of_bias
            create_graph = torch.is_grad_enabled()
            dx1, dx2, dscale, dbias = _differentiated(
                x1, x2, g, _Options(*options), needed, create_graph
            )
            return dx1, dx2, None, dscale, None, dbias, None, None
        if flags & VIEWS:
            of_1, of_2 = of_1 or of_2, False
        needed = of_1, of_2, of_scale, of_bias
        want = sum(bit for bit, yes in zip(WANTS, needed) if yes)
        found = iter(_ops.similarity_loss_bwd(x1, x2, unit, stats, g, *options, want))
        dx1, dx2, dscale, dbias = (next(found) if yes else None for yes in needed)
        if flags & VIEWS and of_1:
            rows = x1.shape[0]
            dx1, dx2 = dx1[:rows], dx1[rows:]
        return dx1, dx2, None, dscale, None, dbias, None, None


def serves(x1: Tensor, x2: Tensor | None) -> bool:
    """Whether the op is there for such features; torch.compile and the transforms must see the
    operations."""
    return (
        not torch.compiler.is_compiling()
        and not functorch_active()
        and not forward_ad_active()
        and x1.device.type == "cpu"
        and (x2 is None or x1.dtype == x2.dtype)
        and x1.dtype in (torch.float32, torch.float64)
        and backends.forced() in (None, "cpu")
        and not _gemm.by_torch()
    )


def similarity_loss(
    x1: Tensor,
    x2: Tensor | None,
    scale: float | Tensor,
    flags: int,
    bias: float | Tensor = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss, of features that `serves`; scale, bias: numbers, or tensors () of their dtype."""
    x1, x2, labels = (None if t is None else t.contiguous() for t in (x1, x2, labels))
    args = (x1, x2, *_split(scale, 1.0), *_split(bias, 0.0), labels, flags)
    if torch.is_grad_enabled() and any(
        args[at] is not None and args[at].requires_grad for at in (0, 1, 3, 5)
    ):
        return _SimilarityLoss.apply(*args)
    return _ops.similarity_loss_fwd(*args)[0]


def _split(value: float | Tensor, without: float) -> tuple[float, Tensor | None]:
    return (without, value) if isinstance(value, Tensor) else (float(value), None)
