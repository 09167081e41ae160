"""Contrastive losses of two tensors of rows, from the features to the mean, as one op.

    y = x / max(|x|, 1e-12) of both        loss = f sum_i (lse_i - positive_i)

Of views a row's positive is its other view (NT-Xent), else the key of its place (InfoNCE), with the
columns half of the loss each (CLIP); f is one over the rows, or 1. In a small batch a step of the
operations that the loss otherwise is made of is mostly their calls.
"""

from __future__ import annotations

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
    WANT_KEYS,
    WANT_QUERIES,
    WANT_SCALE,
    Pairs,
    flops,
)

VIEWS, SUM = 1, 2  # bits of `flags`, with COLUMNS


# --------------------------------------------------------------------------------------------------
# In torch operations


def composed(x1: Tensor, x2: Tensor, scale: float, scales: Tensor | None, flags: int) -> Tensor:
    rows = x1.shape[0]
    at = torch.arange(rows, device=x1.device)
    if flags & VIEWS:
        z, target = F.normalize(torch.cat([x1, x2]), dim=1), torch.cat([at + rows, at])
        pairs = Pairs(z, None, scale, scales, target, None, None, 0, 0)
    else:
        of = (F.normalize(x, dim=1) for x in (x1, x2))
        pairs = Pairs(*of, scale, scales, at, None, None, -1, flags & COLUMNS)
    lse, positive, _, _, _, column_lse, column_positive, *_ = reference.stats(pairs)
    each = lse - positive
    if flags & COLUMNS:
        each = 0.5 * (each + (column_lse - column_positive))
    if rows <= 1:  # a positive alone is certain, whatever the roundings of its logit
        each = each * 0.0
    return each.sum() if flags & SUM else each.sum() / max(1, each.shape[0])


def _forward_reference(x1, x2, scale, scales, flags):
    with torch.no_grad():
        unit, stats = _saved(x1)
        return composed(x1, x2, scale, scales, flags), unit.zero_(), stats.zero_()


def _backward_reference(x1, x2, unit, stats, g, scale, scales, flags, want):
    found = _differentiated(x1, x2, g, scale, scales, flags, _needed(want))
    if flags & VIEWS and want & WANT_QUERIES:
        found[:2] = [torch.cat(found[:2])]
    return [t for t in found if t is not None]


def _differentiated(x1, x2, g, scale, scales, flags, needed, create_graph=False):
    return gradients(
        lambda x1, x2, scales: composed(x1, x2, scale, scales, flags),
        (x1, x2, scales), (g,), needed, create_graph=create_graph,
    )  # fmt: skip


def _needed(want: int) -> list[bool]:
    return [bool(want & bit) for bit in (WANT_QUERIES, WANT_KEYS, WANT_SCALE)]


# --------------------------------------------------------------------------------------------------
# On the CPU


def _saved(x1: Tensor) -> tuple[Tensor, Tensor]:
    """For the backward: unit rows of both, and of each its norm and the log of its sum."""
    rows, d = x1.shape
    return x1.new_empty((2 * rows, d)), x1.new_empty((4, rows))


def _record(unit: Tensor, stats: Tensor, scale, scales, flags) -> records.Loss:
    return records.Loss(
        stats.shape[1], unit.shape[1], DTYPE_CODES[unit.dtype], bool(flags & VIEWS),
        bool(flags & COLUMNS), bool(flags & SUM), scale, address(scales), unit.data_ptr(),
        stats.data_ptr(),
    )  # fmt: skip


def _forward(x1, x2, scale, scales, flags):
    loss, (unit, stats) = x1.new_empty(()), _saved(x1)
    record, threads = _record(unit, stats, scale, scales, flags), torch.get_num_threads()
    size = _C.similarity_loss_fwd_scratch_bytes(record, threads)
    buffer, start = scratch(x1, size)
    _C.similarity_loss_fwd(
        record, x1.data_ptr(), x2.data_ptr(), loss.data_ptr(), start, size, threads
    )
    del buffer
    return loss, unit, stats


def _gradients(x1, unit, scales, flags, want):
    """Empty ones, None for those not wanted. Of views the first is of both."""
    of_views = flags & VIEWS
    return (
        torch.empty_like(unit if of_views else x1) if want & WANT_QUERIES else None,
        torch.empty_like(x1) if want & WANT_KEYS and not of_views else None,
        torch.empty_like(scales) if want & WANT_SCALE else None,
    )


def _backward(x1, x2, unit, stats, g, scale, scales, flags, want):
    found = _gradients(x1, unit, scales, flags, want)
    dx1, dx2, dscale = map(address, found)
    record, threads = _record(unit, stats, scale, scales, flags), torch.get_num_threads()
    size = _C.similarity_loss_bwd_scratch_bytes(record, dx1 != 0, dx2 != 0, dscale != 0, threads)
    buffer, start = scratch(unit, size)
    _C.similarity_loss_bwd(record, g.data_ptr(), dx1, dx2, dscale, start, size, threads)
    del buffer
    return [t for t in found if t is not None]


# --------------------------------------------------------------------------------------------------
# The op


def _forward_fake(x1, *_):
    return x1.new_empty(()), *_saved(x1)


def _backward_fake(x1, x2, unit, stats, g, scale, scales, flags, want):
    return [t for t in _gradients(x1, unit, scales, flags, want) if t is not None]


_REST = "float scale, Tensor? scales, int flags"
define_op(
    f"similarity_loss_fwd(Tensor x1, Tensor x2, {_REST}) -> (Tensor, Tensor, Tensor)",
    fake=_forward_fake,
    impls={"cpu": _forward, "reference": _forward_reference},
)
define_op(
    "similarity_loss_bwd(Tensor x1, Tensor x2, Tensor unit, Tensor stats, Tensor g, "
    f"{_REST}, int want) -> Tensor[]",
    fake=_backward_fake,
    impls={"cpu": _backward, "reference": _backward_reference},
)


def _flops(x1, x2, flags, want=None):
    if flags & VIEWS:
        return flops((2 * x1[0], x1[1]), None, want)
    return flops(x1, x2, want)


count_by("similarity_loss_fwd", lambda *args, out_shape=None: _flops(*args[:2], args[4]))
count_by("similarity_loss_bwd", lambda *args, out_shape=None: _flops(*args[:2], *args[7:9]))

_ops = torch.ops.pyloss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x1, x2, scale, scales, flags):
        loss, unit, stats = _ops.similarity_loss_fwd(x1, x2, scale, scales, flags)
        ctx.save_for_backward(x1, x2, unit, stats, scales)
        ctx.numbers = scale, flags
        return loss

    @staticmethod
    def backward(ctx, g):
        x1, x2, unit, stats, scales = ctx.saved_tensors
        scale, flags = ctx.numbers
        of_1, of_2, _, of_scale, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_batched(g):
            dx1, dx2, dscale = _differentiated(
                x1, x2, g, scale, scales, flags, (of_1, of_2, of_scale), torch.is_grad_enabled()
            )
            return dx1, dx2, None, dscale, None
        if flags & VIEWS:
            of_views = of_1 or of_2
            want = WANT_QUERIES * of_views
        else:
            want = WANT_QUERIES * of_1 + WANT_KEYS * of_2
        want += WANT_SCALE * of_scale
        args = (x1, x2, unit, stats, g, scale, scales, flags, want)
        found = iter(_ops.similarity_loss_bwd(*args))
        if flags & VIEWS:
            dx1, dx2 = next(found).split(x1.shape[0]) if of_views else (None, None)
        else:
            dx1, dx2 = next(found) if of_1 else None, next(found) if of_2 else None
        return dx1, dx2, None, next(found) if of_scale else None, None


def serves(x1: Tensor, x2: Tensor) -> bool:
    """Whether the op is there for such features; torch.compile and the transforms must see the
    operations."""
    return (
        not torch.compiler.is_compiling()
        and not functorch_active()
        and not forward_ad_active()
        and x1.device.type == "cpu"
        and x1.dtype == x2.dtype
        and x1.dtype in (torch.float32, torch.float64)
        and backends.forced() in (None, "cpu")
        and not _gemm.by_torch()
    )


def similarity_loss(x1: Tensor, x2: Tensor, scale: float | Tensor, flags: int) -> Tensor:
    """The loss, of features that `serves`; scale: a number, or a tensor () of their dtype."""
    x1, x2, scales = x1.contiguous(), x2.contiguous(), None
    if isinstance(scale, Tensor):
        scale, scales = 1.0, scale
    args = (x1, x2, float(scale), scales, flags)
    if torch.is_grad_enabled() and (
        x1.requires_grad or x2.requires_grad or (scales is not None and scales.requires_grad)
    ):
        return _Loss.apply(*args)
    return _ops.similarity_loss_fwd(*args)[0]
