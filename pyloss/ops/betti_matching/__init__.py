"""Persistence pairs, Betti matching and its loss, of images of one to three dimensions.

    betti_loss_fused     loss terms and the gradient of the input; static shapes, no host sync
    betti_matching       tables of the matched and the unmatched bars
    betti_matching_dense the same, of static shapes, so that vmap can fold its dimension away
    persistence_pairs    table of the bars of one image

The loss with a gradient of the target, with a second derivative or in forward mode, is a gather at
the rows of `betti_matching` in torch operations: :func:`composed_terms`.

Papers: arXiv 2211.15272, 2407.04683.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops._empty import scaled
from pyloss.ops._launch import constants
from pyloss.ops._reference import gradients
from pyloss.ops._registry import define_op, lib
from pyloss.ops._shards import beside
from pyloss.ops._transforms import forward_ad_active, functorch_active
from pyloss.ops.betti_matching import cpu, cuda, reference
from pyloss.ops.betti_matching.records import (
    TERMS,
    WIDTHS,
    Options,
    common_dtype,
    dim_weights,
    pair,
    weighty,
    weighty_dims,
)


def _loss_fake(input, target, options):
    shape = (*input.shape[:2], input.dim() - 2, TERMS)
    loss = input.new_empty(shape, dtype=common_dtype(input, target))
    if not Options(*options).want_grad:
        return loss, input.new_empty((0,))
    return loss, torch.empty_like(input, memory_format=torch.contiguous_format)


def _matching_fake(input, target, superlevel, dims):
    ctx = torch.library.get_ctx()
    return tuple(
        input.new_empty((ctx.new_dynamic_size(), width), dtype=torch.int64) for width in WIDTHS
    )


def _pairs_fake(input, superlevel, dims, essential):
    size = torch.library.get_ctx().new_dynamic_size()
    return input.new_empty((size, 6), dtype=torch.int64)


_ROWS = "their rows say which item they belong to, by its number in the whole batch"
_NO_PLAIN_FORM = "which bars there are is found by an algorithm on the values"

define_op(
    "betti_loss_fused(Tensor input, Tensor target, float[] options) -> (Tensor, Tensor)",
    fake=_loss_fake,
    impls={"cpu": cpu.loss, "cuda": cuda.loss, "reference": reference.loss},
    shards="NC..., NC... -> NCkt, NC...",
    plain=_NO_PLAIN_FORM,
)
define_op(
    "betti_matching(Tensor input, Tensor target, bool superlevel, int[] dims) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_matching_fake,
    impls={"cpu": cpu.matching, "cuda": cuda.matching, "reference": reference.matching},
    shards=_ROWS,
    plain=_NO_PLAIN_FORM,
)
define_op(
    "persistence_pairs(Tensor input, bool superlevel, int[] dims, bool essential) -> Tensor",
    fake=_pairs_fake,
    impls={"cpu": cpu.pairs, "cuda": cuda.pairs, "reference": reference.pairs},
    shards=_ROWS,
    plain=_NO_PLAIN_FORM,
)

_ops = torch.ops.pyloss


# --------------------------------------------------------------------------------------------------
# Under torch.func: rows by item, with void ones


def _dense(input, target, superlevel, dims, essential):
    """The rows of each item (N, K, 6 or 4) without its number: dim -1 where there is none."""
    tables = list(_ops.betti_matching(input, target, superlevel, dims))
    if essential and 0 in dims:
        rows = reference.formulas().essential_rows(input, target, superlevel)
        tables[0] = torch.cat([tables[0], rows])
    items, room = input.shape[0], _room(input)
    found = []
    for table, width in zip(tables, (6, 4, 4)):
        table = table[table[:, 0].argsort(stable=True), :width]
        counts = torch.bincount(table[:, 0], minlength=items)
        start = counts.cumsum(0) - counts
        place = torch.arange(len(table), device=table.device) - start[table[:, 0]]
        dense = table.new_full((items, room, width - 1), -1)
        dense[table[:, 0], place] = table[:, 1:]
        found.append(dense)
    return tuple(found)


def _room(input: Tensor) -> int:
    """As many bars as an image can have, and the oldest component.

    Each is born by a cell: of n voxels fewer than n vertices, n facets of top cells, and in 3D
    2 n edges.
    """
    spatial = input.dim() - 1
    return (1, 2, 4)[spatial - 1] * math.prod(input.shape[1:]) + 1


def _dense_fake(input, target, superlevel, dims, essential):
    shape = (input.shape[0], _room(input))
    return tuple(input.new_empty((*shape, width), dtype=torch.int64) for width in (5, 3, 3))


def _dense_vmap(info, in_dims, input, target, superlevel, dims, essential):
    """The batch as further items."""
    images = []
    for x, d in zip((input, target), in_dims):
        x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        images.append(x.flatten(0, 1))
    found = _ops.betti_matching_dense(*images, superlevel, dims, essential)
    return tuple(t.unflatten(0, (info.batch_size, -1)) for t in found), (0, 0, 0)


define_op(
    "betti_matching_dense(Tensor input, Tensor target, bool superlevel, int[] dims, "
    "bool essential) -> (Tensor, Tensor, Tensor)",
    fake=_dense_fake,
    impls={"cpu": _dense, "cuda": _dense, "reference": _dense},
    shards="N..., N... -> Nrk, Nrk, Nrk",
    plain=_NO_PLAIN_FORM,
)
torch.library.register_vmap("pyloss::betti_matching_dense", _dense_vmap, lib=lib)


def _dense_terms(input: Tensor, target: Tensor, o: Options, target_weight: float) -> Tensor:
    """As :func:`composed_terms`, in operations that every transform of torch.func knows."""
    x, y = pair(input, target)
    spatial = x.dim() - 2
    a, b = x.flatten(0, 1), y.flatten(0, 1)
    tables = weighty(
        o, target_weight,
        _ops.betti_matching_dense(
            a.detach(), b.detach(), bool(o.superlevel), weighty_dims(o, spatial), bool(o.essential)
        ),
    )  # fmt: skip
    columns = reference.formulas().dense_loss_terms(
        a.flatten(1), b.flatten(1), *tables, dim_count=spatial, **reference.terms_options(o)
    )
    return columns.unflatten(0, x.shape[:2])


# --------------------------------------------------------------------------------------------------
# Autograd


def _weights(o: Options, target_weight: float, like: Tensor, spatial: int) -> Tensor:
    terms = (o.matched_weight, o.unmatched_weight, target_weight)
    found = [w * t for w in dim_weights(o)[:spatial] for t in terms]
    return beside(constants(found, like.dtype, like.device).view(-1, TERMS), like)


def _total(terms: Tensor, o: Options, target_weight: float) -> Tensor:
    """(N, C) from (N, C, D, 3)."""
    if o.matched_weight == o.unmatched_weight == target_weight == 1:
        if all(w == 1 for w in dim_weights(o)[: terms.shape[2]]):
            return terms.sum((2, 3))
    if target_weight == 0:  # an infinite term that is left out
        terms = terms[..., :2]
    weights = _weights(o, target_weight, terms, terms.shape[2])[:, : terms.shape[3]]
    return torch.where(weights == 0, 0.0, terms * weights).sum((2, 3))


def composed_terms(input: Tensor, target: Tensor, o: Options, target_weight: float) -> Tensor:
    """The loss terms (N, C, D, 3) as torch operations on the matching's rows; 0 where the weight
    is 0."""
    x, y = pair(input, target)
    spatial = x.dim() - 2
    dims = weighty_dims(o, spatial)
    with torch.no_grad():
        a, b = x.detach().flatten(0, 1), y.detach().flatten(0, 1)
        tables = list(_ops.betti_matching(a, b, bool(o.superlevel), dims))
        if o.essential and 0 in dims:
            rows = reference.formulas().essential_rows(a, b, bool(o.superlevel))
            tables[0] = torch.cat([tables[0], rows])
    terms = loss_terms(
        x.flatten(0, 1).flatten(1), y.flatten(0, 1).flatten(1), *weighty(o, target_weight, tables),
        dim_count=spatial, **reference.terms_options(o),
    )  # fmt: skip
    return terms.view(*x.shape[:2], spatial, TERMS)


class _BettiLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, target, numbers, target_weight):
        terms, grad = _ops.betti_loss_fused(input, target, numbers)
        ctx.save_for_backward(input, target, grad)
        ctx.numbers, ctx.target_weight = numbers, target_weight
        return _total(terms, Options(*numbers), target_weight)

    @staticmethod
    def backward(ctx, upstream):
        input, target, grad = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: the loss again, in operations that have one
            o, w = Options(*ctx.numbers), ctx.target_weight

            def loss(input):
                return _total(composed_terms(input, target, o, w), o, w)

            (found,) = gradients(loss, [input], [upstream], create_graph=True)
            # None: no bar, and so nothing that depends on the input.
            return torch.zeros_like(input) if found is None else found, None, None, None
        factor = upstream.reshape(*upstream.shape, *(1,) * (input.dim() - 2))
        return scaled(grad.to(upstream.dtype), factor).to(input.dtype), None, None, None


def _numbers(o: Options, want_grad: bool) -> tuple[float, ...]:
    """The options as the op takes them; a plain tuple, as Dynamo wants it in `apply`."""
    numbers = (
        o.superlevel, o.dims, o.extreme, o.essential, want_grad, o.min_persistence,
        o.matched_weight, o.unmatched_weight, *dim_weights(o),
    )  # fmt: skip
    return tuple([float(x) for x in numbers])


def betti_loss(input: Tensor, target: Tensor, options: Options, target_weight: float) -> Tensor:
    """Loss of each item and channel (N, C), of checked arguments."""
    grad_mode = torch.is_grad_enabled()
    if functorch_active():
        terms = _dense_terms(input, target, options, target_weight)
        return _total(terms, options, target_weight)
    if (grad_mode and target.requires_grad) or forward_ad_active():
        terms = composed_terms(input, target, options, target_weight)
        return _total(terms, options, target_weight)
    if grad_mode and input.requires_grad:
        return _BettiLoss.apply(input, target, _numbers(options, True), target_weight)
    terms, _ = _ops.betti_loss_fused(input, target, _numbers(options, False))
    return _total(terms, options, target_weight)


def betti_matching(input: Tensor, target: Tensor, superlevel: bool, dims: list[int]):
    """(matched, unmatched input, unmatched target) of images (N, *spatial)."""
    return _ops.betti_matching(input.detach(), target.detach(), superlevel, dims)


def persistence_pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    """The bars of images (N, *spatial)."""
    return _ops.persistence_pairs(input.detach(), superlevel, dims, essential)


def essential_rows(input: Tensor, target: Tensor, superlevel: bool) -> Tensor:
    """Rows that match the components that never die."""
    return reference.formulas().essential_rows(input.detach(), target.detach(), superlevel)


def loss_terms(*args, **options) -> Tensor:
    """The loss terms of a matching's rows, as torch operations."""
    return reference.formulas().loss_terms(*args, **options)


def loops(image: Tensor, squares: list[int]) -> list[list[int]]:
    """Edges of a loop for each square of 3D that is the death of a bar of dimension 1.

    Args:
        image: ``(depth, rows, cols)``, filtration values.
    """
    kernels = reference if backends.forced() == "reference" else cpu
    return kernels.loops(image, squares)
