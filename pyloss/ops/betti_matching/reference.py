"""The ops of betti_matching on the reference.

On a device without kernels the CPU's serve, rather than matrices of the size of the image; the
reference itself where it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops.betti_matching import cpu
from pyloss.ops.betti_matching.records import (
    TERMS,
    Options,
    dim_weights,
    pair,
    wanted,
    weighty,
    weighty_dims,
)


def formulas():
    """The reference, imported with its first use."""
    from pyloss.reference import betti_matching

    return betti_matching


def _forced() -> bool:
    return backends.forced() == "reference"


def terms_options(o: Options) -> dict:
    """The arguments of the reference's terms that stand in an op's options."""
    return dict(
        superlevel=bool(o.superlevel),
        unmatched="extreme" if o.extreme else "diagonal",
        min_persistence=o.min_persistence,
    )


def loss(input: Tensor, target: Tensor, options: list[float]) -> tuple[Tensor, Tensor]:
    if not _forced():
        return cpu.elsewhere(cpu.loss)(input, target, options)
    o = Options(*options)
    x, y = pair(input, target)
    spatial = x.dim() - 2
    f, dims = formulas(), [d for d in wanted(int(o.dims)) if d < spatial]
    a, b = x.flatten(0, 1), y.flatten(0, 1)
    tables = list(f.betti_matching(a, b, bool(o.superlevel), dims))
    if o.essential and 0 in dims:
        tables[0] = torch.cat([tables[0], f.essential_rows(a, b, bool(o.superlevel)).cpu()])
    tables = [t.to(x.device) for t in tables]

    def terms(image, tables):
        options = dict(dim_count=spatial, **terms_options(o))
        return f.loss_terms(image.flatten(1), b.flatten(1), *tables, **options)

    grad = input.new_empty((0,))
    if o.want_grad:
        counted = weighty(o, 0.0, tables)
        for d in set(wanted(int(o.dims))) - set(weighty_dims(o, spatial)):
            counted = [t[t[:, 1] != d] for t in counted]
        weight = a.new_tensor(dim_weights(o)[:spatial]).unsqueeze(1)
        scale = a.new_tensor([o.matched_weight, o.unmatched_weight, 0.0])
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            total = (terms(leaf, counted) * weight * scale).sum()
            grad = torch.autograd.grad(total, leaf)[0].view_as(x)
    return terms(a, tables).view(*x.shape[:2], spatial, TERMS), grad.to(input.dtype)


def matching(
    input: Tensor, target: Tensor, superlevel: bool, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    if not _forced():
        return cpu.elsewhere(cpu.matching)(input, target, superlevel, dims)
    found = formulas().betti_matching(*pair(input, target), superlevel, dims)
    return tuple(t.to(input.device) for t in found)


def loops(image: Tensor, squares: list[int]) -> list[list[int]]:
    return formulas().loops(image, squares)


def pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    if not _forced():
        return cpu.elsewhere(cpu.pairs)(input, superlevel, dims, essential)
    x, _ = pair(input, input)
    return formulas().persistence_pairs(x, superlevel, dims, essential).to(input.device)
