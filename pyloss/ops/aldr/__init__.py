"""ALDR-KL as an op on rows (rows, classes), with labels in int64.

    aldr_fwd    [stats] and, with `factor`, [stats, grad]: the gradient of the rows' values times it
    aldr_bwd    the same gradient from the stats

Formulas and the rows of `stats`: csrc/common/aldr.h. Reference: pyloss/reference/aldr.py.

Paper: arXiv 2112.14869.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._registry import define_op
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)
from pyloss.ops.aldr import cpu, cuda, reference
from pyloss.ops.aldr.records import LAMBDA, VALUE, stats_of
from pyloss.ops.row_softmax import EARLY_DTYPES, known

_OPTIONS = "float lam0, float alpha, float margin, int ignore_index, bool l1"

define_op(
    f"aldr_fwd(Tensor x, Tensor target, Tensor? factor, Tensor? start, {_OPTIONS}) -> Tensor[]",
    fake=lambda x, target, factor, *rest: (
        [stats_of(x)] if factor is None else [stats_of(x), x.new_empty(x.shape)]
    ),
    impls={"cpu": cpu.forward, "cuda": cuda.forward, "reference": reference.forward},
    shards="Nc, N, N, N -> kN, Nc",
)
define_op(
    f"aldr_bwd(Tensor x, Tensor target, Tensor stats, Tensor factor, {_OPTIONS}) -> Tensor",
    fake=lambda x, *rest: x.new_empty(x.shape),
    impls={"cpu": cpu.backward, "cuda": cuda.backward, "reference": reference.backward},
    shards="Nc, N, kN, N -> Nc",
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


class _Aldr(torch.autograd.Function):
    """(sum of the rows' values times `factor`, or the values times it; lambda)."""

    @staticmethod
    def forward(ctx, x, target, factor, start, options, scalar):
        # An upstream scalar can be multiplied in later; a row's own upstream gradient cannot.
        early = (
            scalar
            and not torch.compiler.is_compiling()
            and x.dtype in EARLY_DTYPES
            and not saved_tensor_hooks_active()
        )
        stats, *grad = _ops.aldr_fwd(x, target, factor if early else None, start, *options)
        ctx.save_for_backward(x, target, stats, factor, start)
        ctx.options, ctx.scalar = options, scalar
        ctx.early_grad = grad[0] if early else None
        lam = stats[LAMBDA].clone()
        ctx.mark_non_differentiable(lam)
        ctx.set_materialize_grads(False)
        return _combined(stats[VALUE], factor, scalar), lam

    @staticmethod
    def backward(ctx, g, _):
        none = (None,) * 5
        early, ctx.early_grad = ctx.early_grad, None
        if g is None:
            return None, *none
        x, target, stats, factor, start = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if early is not None and not (create_graph or is_batched(g)):
            upstream = known(g)
            if upstream is None or math.isfinite(upstream):
                # Handed over, not kept: a second backward computes it anew.
                if upstream != 1.0:
                    _ops.scale_(early, g.float())
                return early, *none
        rows = g.to(stats.dtype) * factor
        if create_graph or is_batched(g):
            more = dict(create_graph=create_graph)
            return reference.composed_gradient(rows, x, target, start, ctx.options, **more), *none
        return _ops.aldr_bwd(x, target, stats, rows, *ctx.options), *none


def _combined(values: Tensor, factor: Tensor, scalar: bool) -> Tensor:
    product = values * factor
    return product.sum() if scalar else product


def aldr(
    x: Tensor,
    target: Tensor,
    factor: Tensor,
    start: Tensor | None,
    options: tuple[float, float, float, int, bool],
    scalar: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, lambda) of checked rows: the sum of the rows' values times `factor`, or, not
    `scalar`, these products; in the dtype of the sums.

    Args:
        options: lam0, alpha, margin, ignore_index, l1.
    """
    start = None if start is None else start.to(accumulator_dtype(x.dtype))
    if functorch_active() or forward_ad_active():
        values, lam = reference.composed(x, target, start, options)
        return _combined(values, factor, scalar), lam
    if torch.is_grad_enabled() and x.requires_grad:
        return _Aldr.apply(x, target, factor, start, options, scalar)
    stats = _ops.aldr_fwd(x, target, None, start, *options)[0]
    return _combined(stats[VALUE], factor, scalar), stats[LAMBDA]
