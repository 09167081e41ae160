"""Differentiable sorting networks: soft sort, P f and P^T f, P itself, the cross entropy of P.

    sorting_network_sort          y = P^T x, by the value recursion
    sorting_network_apply         P^T f or P f of features f, without P
    sorting_network_permutation   (y, P)
    sorting_network_loss          loss of each item and its gradient, without P in memory

x is (b, n), contiguous, float32 or float64. Every backward starts from x alone: nothing else is
saved. Second derivatives, forward mode and torch.func transforms go through the reference.

Papers: arXiv 2105.04019, 2203.09630, 2206.07290.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._empty import scale_, scaled
from pyloss.ops._reference import gradients
from pyloss.ops._registry import define_op
from pyloss.ops._shards import is_dtensor
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)
from pyloss.ops.sorting_network import cpu, cuda, reference
from pyloss.ops.sorting_network.records import (
    DISTRIBUTIONS,
    KINDS,
    NETWORKS,
    ORDERS,
    REDUCTIONS,
)


class Settings(NamedTuple):
    """Which network; the reference's arguments. `_packed`: those of the ops."""

    network: str = "auto"
    distribution: str = "cauchy"
    steepness: float | Tensor = 10.0  # a tensor broadcasts with (b, C), and takes the reference
    art_lambda: float = 0.25
    k: int = 0  # of splitter_selection: how many of the largest it selects


def _packed(settings: Settings) -> tuple[tuple[int, int, int], tuple[float, float]]:
    """(net, options) of the schemas."""
    network, distribution, steepness, art_lambda, k = settings
    net = (NETWORKS.index(network), DISTRIBUTIONS.index(distribution), k)
    return net, (steepness, art_lambda)


def inverse(order: Tensor) -> Tensor:
    """The inverse of permutations along the last dimension."""
    return reference.formulas().inverse(order)


def reduced(each: Tensor, reduction: str) -> Tensor:
    """The losses of the items as one."""
    return reference.formulas().reduced(each, reduction)


def target_ranks(target: Tensor, order: str, count: Tensor | None = None):
    """(first, count, which rows hold a NaN) of a loss's target."""
    return reference.formulas().target_ranks(target, order, count)


def _loss_fake(x, target, count, codes, net, options, need_grad):
    loss = x.new_empty(() if codes[2] else (x.shape[0],))
    return loss, torch.empty_like(x) if need_grad else x.new_empty((0,))


def _apply_bwd_shards(g, x, f, *rest):
    """Features that all items have in common get a gradient from each."""
    of_f = "BnD" if f.shape[0] == x.shape[0] else "1nD"
    return f"BnD, Bn, {of_f} -> Bn, {of_f}"


def _loss_shards(x, target, count, codes, *rest):
    if REDUCTIONS[codes[2]] == "mean":
        return "each process would divide by the number of its own items"
    return f"Bn, Bn, Bn -> {'' if codes[2] else 'B'}, Bn"


define_op(
    "sorting_network_sort(Tensor x, int[] net, float[] options) -> Tensor",
    fake=lambda x, net, options: torch.empty_like(x),
    impls={"cpu": cpu.sort, "cuda": cuda.sort, "reference": reference.sort},
    shards="Bn -> Bn",
)
define_op(
    "sorting_network_sort_bwd(Tensor gy, Tensor x, int[] net, float[] options) -> Tensor",
    fake=lambda gy, x, net, options: torch.empty_like(x),
    impls={"cpu": cpu.sort_bwd, "cuda": cuda.sort_bwd, "reference": reference.sort_bwd},
    shards="Bn, Bn -> Bn",
)
define_op(
    "sorting_network_apply(Tensor x, Tensor f, bool transpose, int[] net, float[] options) "
    "-> Tensor",
    fake=lambda x, f, transpose, net, options: x.new_empty((*x.shape, f.shape[2])),
    impls={"cpu": cpu.apply, "cuda": cuda.apply, "reference": reference.apply},
    shards="Bn, BnD -> BnD",
)
define_op(
    "sorting_network_apply_bwd(Tensor g, Tensor x, Tensor f, bool transpose, int[] net, "
    "float[] options, bool need_f) -> (Tensor, Tensor)",
    fake=lambda g, x, f, transpose, net, options, need_f: (
        torch.empty_like(x),
        torch.empty_like(f) if need_f else f.new_empty((0,)),
    ),
    impls={"cpu": cpu.apply_bwd, "cuda": cuda.apply_bwd, "reference": reference.apply_bwd},
    shards=_apply_bwd_shards,
)
define_op(
    "sorting_network_permutation(Tensor x, int[] net, float[] options) -> (Tensor, Tensor)",
    fake=lambda x, net, options: (torch.empty_like(x), x.new_empty((*x.shape, x.shape[1]))),
    impls={"cpu": cpu.permutation, "cuda": cuda.permutation, "reference": reference.permutation},
    shards="Bn -> Bn, Bnm",
)
define_op(
    "sorting_network_permutation_bwd(Tensor? gy, Tensor gp, Tensor x, int[] net, float[] options) "
    "-> Tensor",
    fake=lambda gy, gp, x, net, options: torch.empty_like(x),
    impls={
        "cpu": cpu.permutation_bwd,
        "cuda": cuda.permutation_bwd,
        "reference": reference.permutation_bwd,
    },
    shards="Bn, Bnm, Bn -> Bn",
)
define_op(
    # codes: order, kind, reduction
    "sorting_network_loss(Tensor x, Tensor target, Tensor? count, int[] codes, int[] net, "
    "float[] options, bool need_grad) -> (Tensor, Tensor)",
    fake=_loss_fake,
    impls={"cpu": cpu.loss, "cuda": cuda.loss, "reference": reference.loss},
    shards=_loss_shards,
)

# --------------------------------------------------------------------------------------------------
# Autograd. What goes through `apply` is tensors and plain tuples: Dynamo takes no other.

_ops = torch.ops.pyloss


def _reference_needed(settings: Settings) -> bool:
    """Transforms must see into the op; so must the gradient of a steepness."""
    return functorch_active() or forward_ad_active() or isinstance(settings.steepness, Tensor)


def _by_reference(*cotangents) -> bool:
    return torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in cotangents)


class _SortingNetworkSort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, net, options):
        ctx.save_for_backward(x)
        ctx.network = net, options
        return _ops.sorting_network_sort(x, net, options)

    @staticmethod
    def backward(ctx, gy):
        (x,) = ctx.saved_tensors
        if _by_reference(gy):
            named = reference.named(*ctx.network)
            (gx,) = gradients(
                lambda x: reference.formulas().sorting_network_sort(x, *named), [x], [gy],
                create_graph=True,
            )  # fmt: skip
            return gx, None, None
        return _ops.sorting_network_sort_bwd(gy.contiguous(), x, *ctx.network), None, None


class _SortingNetworkApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f, transpose, net, options):
        ctx.save_for_backward(x, f)
        ctx.transpose, ctx.network = transpose, (net, options)
        return _ops.sorting_network_apply(x, f, transpose, net, options)

    @staticmethod
    def backward(ctx, g):
        x, f = ctx.saved_tensors
        need_x, need_f = ctx.needs_input_grad[:2]
        if _by_reference(g):
            named = reference.named(*ctx.network)
            gx, gf = gradients(
                lambda x, f: reference.formulas().sorting_network_apply(
                    x, f, ctx.transpose, *named
                ),
                [x, f], [g], [need_x, need_f], create_graph=True,
            )  # fmt: skip
            return gx, gf, None, None, None
        gx, gf = _ops.sorting_network_apply_bwd(
            g.contiguous(), x, f, ctx.transpose, *ctx.network, need_f
        )
        return gx if need_x else None, gf if need_f else None, None, None, None


class _SortingNetworkPermutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, net, options):
        ctx.save_for_backward(x)
        ctx.network = net, options
        ctx.set_materialize_grads(False)
        return _ops.sorting_network_permutation(x, net, options)

    @staticmethod
    def backward(ctx, gy, gp):
        (x,) = ctx.saved_tensors
        if gy is None and gp is None:
            return None, None, None
        if _by_reference(gy, gp):
            named = reference.named(*ctx.network)
            (gx,) = gradients(
                lambda x: reference.formulas().sorting_network_permutation(x, *named), [x],
                [gy, gp], create_graph=True,
            )  # fmt: skip
        elif gp is None:
            gx = _ops.sorting_network_sort_bwd(gy.contiguous(), x, *ctx.network)
        else:
            gy = None if gy is None else gy.contiguous()
            gx = _ops.sorting_network_permutation_bwd(gy, gp.contiguous(), x, *ctx.network)
        return gx, None, None


class _SortingNetworkLoss(torch.autograd.Function):
    """The forward finds the gradient too, and the backward multiplies it."""

    @staticmethod
    def forward(ctx, x, target, count, codes, net, options):
        compiling = torch.compiler.is_compiling()
        # Checkpointing and offloading hook what is saved, and would not see this tensor.
        early = compiling or not saved_tensor_hooks_active()
        loss, gx = _ops.sorting_network_loss(x, target, count, codes, net, options, early)
        # Handed over, not kept: a second backward computes it anew. A compiled graph keeps of the
        # saved tensors what its backward needs.
        ctx.save_for_backward(x, target, count, gx if compiling else None)
        ctx.early = gx if early and not compiling else None
        ctx.codes, ctx.network = codes, (net, options)
        return loss

    @staticmethod
    def backward(ctx, g):
        x, target, count, gx = ctx.saved_tensors
        early, ctx.early = ctx.early, None
        if _by_reference(g):
            named = reference.named(*ctx.network)
            (gx,) = gradients(
                lambda x: reference.composed_loss(x, target, count, ctx.codes, *named), [x], [g],
                create_graph=True,
            )  # fmt: skip
            gx = torch.zeros_like(x) if gx is None else gx  # of rows of one element
        else:
            g = g.unsqueeze(1) if g.dim() else g
            if gx is not None:
                gx = scaled(gx, g)
            else:
                if early is None:
                    _, early = _ops.sorting_network_loss(
                        x, target, count, ctx.codes, *ctx.network, True
                    )
                gx = scale_(early, g)
        return gx, None, None, None, None, None


def sort(x: Tensor, settings: Settings) -> Tensor:
    """Soft sort of (b, n)."""
    if _reference_needed(settings):
        return reference.formulas().sorting_network_sort(x, *settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SortingNetworkSort.apply(x, *_packed(settings))
    return _ops.sorting_network_sort(x, *_packed(settings))


def apply(x: Tensor, f: Tensor, transpose: bool, settings: Settings) -> Tensor:
    """P^T f (transpose) or P f, (b, n, d), of features (b, n, d) or (1, n, d)."""
    if _reference_needed(settings):
        return reference.formulas().sorting_network_apply(x, f, transpose, *settings)
    if torch.is_grad_enabled() and (x.requires_grad or f.requires_grad):
        return _SortingNetworkApply.apply(x, f, transpose, *_packed(settings))
    return _ops.sorting_network_apply(x, f, transpose, *_packed(settings))


def permutation(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(soft sort (b, n), P (b, n, n))."""
    if _reference_needed(settings):
        return reference.formulas().sorting_network_permutation(x, *settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SortingNetworkPermutation.apply(x, *_packed(settings))
    return _ops.sorting_network_permutation(x, *_packed(settings))


def loss(
    x: Tensor,
    target: Tensor,
    count: Tensor | None,
    settings: Settings,
    *,
    order: str,
    kind: str,
    reduction: str,
) -> Tensor:
    """Cross entropy of P against the uniform distribution over the given ranks; (b,), or reduced.

    Args:
        target: (b, n): of ``order="ranks"`` int32; else values of float64, float32, int64, int32.
        count: int32 (b, n) with ranks, None: one rank each.
    """
    if reduction == "mean" and is_dtensor(x):  # the number of items is that of all processes
        one_by_one = dict(order=order, kind=kind, reduction="sum")
        return loss(x, target, count, settings, **one_by_one) / x.shape[0]
    codes = (ORDERS.index(order), KINDS.index(kind), REDUCTIONS.index(reduction))
    if _reference_needed(settings):
        return reference.composed_loss(x, target, count, codes, *settings)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SortingNetworkLoss.apply(x, target, count, codes, *_packed(settings))
    return _ops.sorting_network_loss(x, target, count, codes, *_packed(settings), False)[0]
