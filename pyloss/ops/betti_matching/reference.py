"""The ops of betti_matching on the reference.

On a device without kernels the CPU's serve, rather than matrices of the size of the image; the
reference itself where it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import backends
from pyloss.ops.betti_matching import cpu
from pyloss.ops.betti_matching.records import TERMS, Options, dim_weights, pair, wanted


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
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        terms = formulas().betti_matching_loss(
            leaf.flatten(0, 1), y.flatten(0, 1), essential=bool(o.essential),
            dims=[d for d in wanted(int(o.dims)) if d < spatial], **terms_options(o),
        )  # fmt: skip
        weight = terms.new_tensor(dim_weights(o)[:spatial]).unsqueeze(1)
        scale = terms.new_tensor([o.matched_weight, o.unmatched_weight, 0.0])
        grad = input.new_empty((0,))
        if o.want_grad:
            (grad,) = torch.autograd.grad((terms * weight * scale).sum(), leaf)
    return terms.detach().view(*x.shape[:2], spatial, TERMS), grad.to(input.dtype)


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
