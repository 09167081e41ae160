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

from pyloss.ops import _sorting_network_cpu as cpu
from pyloss.ops import _sorting_network_cuda as cuda
from pyloss.ops._registry import define_op
from pyloss.ops._sorting_network_cpu import DISTRIBUTIONS, KINDS, NETWORKS, ORDERS, REDUCTIONS
from pyloss.ops._transforms import (
    forward_ad_active,
    functorch_active,
    is_batched,
    saved_tensor_hooks_active,
)


def _reference():
    """The reference, imported with its first use."""
    from pyloss.reference import sorting_network

    return sorting_network


class Settings(NamedTuple):
    """Which network. The names' places in NETWORKS and DISTRIBUTIONS are the codes of the op."""

    network: str = "auto"
    distribution: str = "cauchy"
    steepness: float | Tensor = 10.0  # a tensor broadcasts with (b, C), and takes the reference
    art_lambda: float = 0.25
    k: int = 0  # of splitter_selection: how many of the largest it selects

    @property
    def packed(self) -> tuple[list[int], list[float]]:
        """(net, options) of the schemas."""
        net = [NETWORKS.index(self.network), DISTRIBUTIONS.index(self.distribution), self.k]
        return net, [self.steepness, self.art_lambda]

    @property
    def for_reference(self) -> tuple:
        return self.network, self.distribution, self.steepness, self.art_lambda, self.k


def _named(net, options) -> tuple:
    """The reference's arguments of an op's."""
    return NETWORKS[net[0]], DISTRIBUTIONS[net[1]], options[0], options[1], net[2]


def inverse(order: Tensor) -> Tensor:
    """The inverse of permutations along the last dimension."""
    return _reference().inverse(order)


def reduced(each: Tensor, reduction: str) -> Tensor:
    """The losses of the items as one."""
    return _reference().reduced(each, reduction)


def target_ranks(target: Tensor, order: str, count: Tensor | None = None):
    """(first, count, which rows hold a NaN) of a loss's target."""
    return _reference().target_ranks(target, order, count)


def _gradients(function, sources, cotangents):
    """Gradients of a function's outputs, 0 where one does not depend on a source."""
    with torch.enable_grad():
        sources = [s.detach().requires_grad_() for s in sources]
        outputs = function(*sources)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, cotangents) if g is not None and o.requires_grad]
        if not pairs:
            return [torch.zeros_like(s) for s in sources]
        outputs, cotangents = zip(*pairs)
        found = torch.autograd.grad(outputs, sources, cotangents, allow_unused=True)
    return [torch.zeros_like(s) if g is None else g.contiguous() for s, g in zip(sources, found)]


def _rowwise(gx: Tensor, x: Tensor) -> Tensor:
    """NaN in all of a row that holds one, also where no comparator has spread it."""
    return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, gx).contiguous()


# --------------------------------------------------------------------------------------------------
# Values


def _sort_reference(x, net, options):
    return _reference().sorting_network_sort(x, *_named(net, options)).contiguous()


def _sort_bwd_reference(gy, x, net, options):
    def function(x):
        return _reference().sorting_network_sort(x, *_named(net, options))

    return _rowwise(_gradients(function, [x], [gy])[0], x)


define_op(
    "sorting_network_sort(Tensor x, int[] net, float[] options) -> Tensor",
    fake=lambda x, net, options: torch.empty_like(x),
    impls={"cpu": cpu.sort, "cuda": cuda.sort, "reference": _sort_reference},
)
define_op(
    "sorting_network_sort_bwd(Tensor gy, Tensor x, int[] net, float[] options) -> Tensor",
    fake=lambda gy, x, net, options: torch.empty_like(x),
    impls={"cpu": cpu.sort_bwd, "cuda": cuda.sort_bwd, "reference": _sort_bwd_reference},
)

# --------------------------------------------------------------------------------------------------
# Features


def _apply_reference(x, f, transpose, net, options):
    found = _reference().sorting_network_apply(x, f, transpose, *_named(net, options))
    return found.contiguous()


def _apply_bwd_reference(g, x, f, transpose, net, options, need_f):
    def function(x, f):
        return _reference().sorting_network_apply(x, f, transpose, *_named(net, options))

    gx, gf = _gradients(function, [x, f], [g])
    return _rowwise(gx, x), gf if need_f else f.new_empty((0,))


define_op(
    "sorting_network_apply(Tensor x, Tensor f, bool transpose, int[] net, float[] options) "
    "-> Tensor",
    fake=lambda x, f, transpose, net, options: x.new_empty((*x.shape, f.shape[2])),
    impls={"cpu": cpu.apply, "cuda": cuda.apply, "reference": _apply_reference},
)
define_op(
    "sorting_network_apply_bwd(Tensor g, Tensor x, Tensor f, bool transpose, int[] net, "
    "float[] options, bool need_f) -> (Tensor, Tensor)",
    fake=lambda g, x, f, transpose, net, options, need_f: (
        torch.empty_like(x),
        torch.empty_like(f) if need_f else f.new_empty((0,)),
    ),
    impls={"cpu": cpu.apply_bwd, "cuda": cuda.apply_bwd, "reference": _apply_bwd_reference},
)

# --------------------------------------------------------------------------------------------------
# Permutation


def _permutation_reference(x, net, options):
    y, p = _reference().sorting_network_permutation(x, *_named(net, options))
    return y.contiguous(), p.contiguous()


def _permutation_bwd_reference(gy, gp, x, net, options):
    def function(x):
        return _reference().sorting_network_permutation(x, *_named(net, options))

    return _rowwise(_gradients(function, [x], [gy, gp])[0], x)


define_op(
    "sorting_network_permutation(Tensor x, int[] net, float[] options) -> (Tensor, Tensor)",
    fake=lambda x, net, options: (torch.empty_like(x), x.new_empty((*x.shape, x.shape[1]))),
    impls={"cpu": cpu.permutation, "cuda": cuda.permutation, "reference": _permutation_reference},
)
define_op(
    "sorting_network_permutation_bwd(Tensor? gy, Tensor gp, Tensor x, int[] net, float[] options) "
    "-> Tensor",
    fake=lambda gy, gp, x, net, options: torch.empty_like(x),
    impls={
        "cpu": cpu.permutation_bwd,
        "cuda": cuda.permutation_bwd,
        "reference": _permutation_bwd_reference,
    },
)

# --------------------------------------------------------------------------------------------------
# Loss


def _loss_fake(x, target, count, codes, net, options, need_grad):
    loss = x.new_empty(() if codes[2] else (x.shape[0],))
    return loss, torch.empty_like(x) if need_grad else x.new_empty((0,))


def _loss_by_reference(x, target, count, codes, *network_args):
    order, kind, reduction = codes
    each = _reference().sorting_network_loss(
        x, target, count, ORDERS[order], KINDS[kind], *network_args
    )
    return reduced(each, REDUCTIONS[reduction])


def _loss_reference(x, target, count, codes, net, options, need_grad):
    def function(x):
        return _loss_by_reference(x, target, count, codes, *_named(net, options))

    loss = function(x).contiguous()
    if not need_grad:
        return loss, x.new_empty((0,))
    return loss, _rowwise(_gradients(function, [x], [torch.ones_like(loss)])[0], x)


define_op(
    # codes: order, kind, reduction
    "sorting_network_loss(Tensor x, Tensor target, Tensor? count, int[] codes, int[] net, "
    "float[] options, bool need_grad) -> (Tensor, Tensor)",
    fake=_loss_fake,
    impls={"cpu": cpu.loss, "cuda": cuda.loss, "reference": _loss_reference},
)

# --------------------------------------------------------------------------------------------------
# Autograd

_ops = torch.ops.pyloss


def _reference_needed(settings: Settings) -> bool:
    """Transforms must see into the op; so must the gradient of a steepness."""
    return functorch_active() or forward_ad_active() or isinstance(settings.steepness, Tensor)


def _differentiable(function, sources, needed, cotangents):
    """Gradients as a function of the sources and the cotangents, for a second derivative."""
    with torch.enable_grad():
        outputs = function(*sources)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, cotangents) if g is not None and o.requires_grad]
    asked = [s for s, yes in zip(sources, needed) if yes]
    if not pairs or not asked:
        return [None] * len(needed)
    outputs, cotangents = zip(*pairs)
    found = torch.autograd.grad(outputs, asked, cotangents, create_graph=True, allow_unused=True)
    found = iter(found)
    return [next(found) if yes else None for yes in needed]


def _by_reference(*cotangents) -> bool:
    return torch.is_grad_enabled() or any(g is not None and is_batched(g) for g in cotangents)


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, settings):
        ctx.save_for_backward(x)
        ctx.settings = settings
        return _ops.sorting_network_sort(x, *settings.packed)

    @staticmethod
    def backward(ctx, gy):
        (x,) = ctx.saved_tensors
        if _by_reference(gy):
            named = ctx.settings.for_reference
            gx = _differentiable(
                lambda x: _reference().sorting_network_sort(x, *named), [x], [True], [gy]
            )[0]
            return gx, None
        return _ops.sorting_network_sort_bwd(gy.contiguous(), x, *ctx.settings.packed), None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f, transpose, settings):
        ctx.save_for_backward(x, f)
        ctx.transpose, ctx.settings = transpose, settings
        return _ops.sorting_network_apply(x, f, transpose, *settings.packed)

    @staticmethod
    def backward(ctx, g):
        x, f = ctx.saved_tensors
        need_x, need_f = ctx.needs_input_grad[:2]
        if _by_reference(g):
            named = ctx.settings.for_reference
            found = _differentiable(
                lambda x, f: _reference().sorting_network_apply(x, f, ctx.transpose, *named),
                [x, f], [need_x, need_f], [g],
            )  # fmt: skip
            return *found, None, None
        gx, gf = _ops.sorting_network_apply_bwd(
            g.contiguous(), x, f, ctx.transpose, *ctx.settings.packed, need_f
        )
        return gx if need_x else None, gf if need_f else None, None, None


class _Permutation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, settings):
        ctx.save_for_backward(x)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _ops.sorting_network_permutation(x, *settings.packed)

    @staticmethod
    def backward(ctx, gy, gp):
        (x,) = ctx.saved_tensors
        if gy is None and gp is None:
            return None, None
        if _by_reference(gy, gp):
            named = ctx.settings.for_reference
            gx = _differentiable(
                lambda x: _reference().sorting_network_permutation(x, *named), [x], [True], [gy, gp]
            )[0]
        elif gp is None:
            gx = _ops.sorting_network_sort_bwd(gy.contiguous(), x, *ctx.settings.packed)
        else:
            gy = None if gy is None else gy.contiguous()
            gx = _ops.sorting_network_permutation_bwd(gy, gp.contiguous(), x, *ctx.settings.packed)
        return gx, None


class _Loss(torch.autograd.Function):
    """The forward finds the gradient too, and the backward multiplies it."""

    @staticmethod
    def forward(ctx, x, target, count, codes, settings):
        compiling = torch.compiler.is_compiling()
        # Checkpointing and offloading hook what is saved, and would not see this tensor.
        early = compiling or not saved_tensor_hooks_active()
        loss, gx = _ops.sorting_network_loss(x, target, count, codes, *settings.packed, early)
        # Handed over, not kept: a second backward computes it anew. A compiled graph keeps of the
        # saved tensors what its backward needs.
        ctx.save_for_backward(x, target, count, gx if compiling else None)
        ctx.early = gx if early and not compiling else None
        ctx.codes, ctx.settings = codes, settings
        return loss

    @staticmethod
    def backward(ctx, g):
        x, target, count, gx = ctx.saved_tensors
        early, ctx.early = ctx.early, None
        if _by_reference(g):
            named = ctx.settings.for_reference
            gx = _differentiable(
                lambda x: _loss_by_reference(x, target, count, ctx.codes, *named), [x], [True], [g]
            )[0]
            return gx, None, None, None, None
        g = g.unsqueeze(1) if g.dim() else g
        if gx is not None:
            return gx * g, None, None, None, None
        if early is None:
            _, early = _ops.sorting_network_loss(
                x, target, count, ctx.codes, *ctx.settings.packed, True
            )
        return early.mul_(g), None, None, None, None


def sort(x: Tensor, settings: Settings) -> Tensor:
    """Soft sort of (b, n)."""
    if _reference_needed(settings):
        return _reference().sorting_network_sort(x, *settings.for_reference)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Sort.apply(x, settings)
    return _ops.sorting_network_sort(x, *settings.packed)


def apply(x: Tensor, f: Tensor, transpose: bool, settings: Settings) -> Tensor:
    """P^T f (transpose) or P f, (b, n, d), of features (b, n, d) or (1, n, d)."""
    if _reference_needed(settings):
        return _reference().sorting_network_apply(x, f, transpose, *settings.for_reference)
    if torch.is_grad_enabled() and (x.requires_grad or f.requires_grad):
        return _Apply.apply(x, f, transpose, settings)
    return _ops.sorting_network_apply(x, f, transpose, *settings.packed)


def permutation(x: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """(soft sort (b, n), P (b, n, n))."""
    if _reference_needed(settings):
        return _reference().sorting_network_permutation(x, *settings.for_reference)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permutation.apply(x, settings)
    return _ops.sorting_network_permutation(x, *settings.packed)


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
    codes = [ORDERS.index(order), KINDS.index(kind), REDUCTIONS.index(reduction)]
    if _reference_needed(settings):
        return _loss_by_reference(x, target, count, codes, *settings.for_reference)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Loss.apply(x, target, count, codes, settings)
    return _ops.sorting_network_loss(x, target, count, codes, *settings.packed, False)[0]
