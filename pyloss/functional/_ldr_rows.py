"""Rows of class scores for the label distributionally robust losses: scores normalised, margins
added, the divergence-free forms by sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._rows import Prepared
from pyloss.ops import row_softmax as op
from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import accumulator_dtype

NORMALIZE = (None, "l1", "softplus")
_TINY = 1e-12  # beside a mean, which may be 0


def class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def check_margin(margin) -> None:
    """A number, or a table of all pairs of classes, of which only the shape can be looked at."""
    if not isinstance(margin, Tensor):
        checks.check_range("margin", margin, 0.0)
        return
    checks.check_floating("margin", margin)
    checks.check_constant("margin", margin)
    if margin.dim() != 2 or margin.shape[0] != margin.shape[1]:
        raise ValueError(
            f"margin must be a number or a table (C, C), got shape {list(margin.shape)}"
        )
    if checks.can_look_at(margin) and (margin < 0).any():
        raise ValueError("margin must be >= 0 for every pair of classes")


def check_normalize(normalize) -> None:
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be None, 'l1' or 'softplus', got {normalize!r}")


def check_topk(topk) -> None:
    if topk is not None and checks.checked_integer("topk", topk) < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")


def normalized(input: Tensor, normalize: str | None, p: Prepared) -> Tensor:
    """The scores over their mean size, in the dtype of the sums; 0, without a gradient, where that
    mean is 0 and in rows that are ignored."""
    if normalize is None:
        return input
    dim = class_dim(input)
    ignored = wide(p.labels[0]) == p.codes.ignore_index
    x = torch.where(ignored.unsqueeze(1) if dim else ignored, 0.0, input)
    x = x.to(accumulator_dtype(input.dtype))
    if normalize == "softplus":
        x = torch.nn.functional.softplus(x)
        mean, tiny = x.mean(dim, keepdim=True), 0.0
    else:
        mean, tiny = x.abs().mean(dim, keepdim=True), _TINY
    return torch.where(mean == 0, 0.0, x / torch.where(mean == 0, 1.0, mean + tiny))


def with_margins(input: Tensor, target: Tensor, table: Tensor) -> Tensor:
    """The scores with the margins of their labels' rows; the label's own is left out."""
    dim = class_dim(input)
    classes = input.shape[dim]
    if table.shape[0] != classes:
        raise ValueError(
            f"margin must be a table of the {classes} classes, got shape {list(table.shape)}"
        )
    checks.check_device("margin", table, input)
    label = torch.where(outside(target, classes), 0, wide(target))
    off_diagonal = table.to(input.dtype) * (1 - torch.eye(classes, device=table.device)).to(
        input.dtype
    )
    return input + off_diagonal[label].movedim(-1, dim)


def row_weights(p: Prepared, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(labels that exist, weight of each row, which rows count): flat. A row whose label is no
    class has the weight NaN."""
    target, _, _, weight, _ = p.labels
    y = wide(target).flatten()
    ignored = y == p.codes.ignore_index
    bad = outside(y, classes) & ~ignored
    label = torch.where(ignored | bad, 0, y)
    dtype = accumulator_dtype(p.loss_dtype)
    each = y.new_ones(y.shape, dtype=dtype) if weight is None else weight.to(dtype)[label]
    each = torch.where(ignored, 0.0, torch.where(bad, math.nan, each))
    return label, each, ~ignored


def row_factors(each: Tensor, reduction: int) -> Tensor:
    """What the losses of rows of the given weights are multiplied by before they are added."""
    return each / each.sum() if reduction == op.REDUCTIONS["mean"] else each


def reduced(rows: Tensor, factors: Tensor, p: Prepared, shape) -> Tensor:
    """The loss of rows whose losses are given, 0 for those that are ignored."""
    product = rows * factors
    if p.codes.reduction == op.REDUCTIONS["none"]:
        return product.view(shape).to(p.loss_dtype)
    total = product.sum()
    if rows.numel() == 0 and p.codes.reduction == op.REDUCTIONS["mean"]:
        total = total / 0.0
    return total.to(p.loss_dtype)


def by_rows(input: Tensor) -> Tensor:
    """(rows, classes)"""
    if input.dim() == 1:
        return input.unsqueeze(0)
    return input if input.dim() == 2 else input.movedim(1, -1).flatten(0, -2)


def capped_value(delta: Tensor, lam: float, k: int) -> Tensor:
    """max over p in the simplex with p <= 1/k of <p, delta> - lam KL(p, uniform), row by row.

    With the scores in falling order, the first r have p = 1/k and the others share the rest like a
    softmax; r is the smallest for which none of these is above 1/k.
    """
    classes = delta.shape[1]
    top, index = delta.topk(k, 1)
    if lam == 0 or k == classes:
        return top.mean(1)
    z = delta / lam
    with torch.no_grad():
        others = z.scatter(1, index, -math.inf).logsumexp(1, keepdim=True)
        # Of the scores from r on, for r = 0 .. k - 1.
        tails = torch.cat([top / lam, others], 1).flip(1).logcumsumexp(1).flip(1)[:, :k]
        left = torch.arange(k, 0, -1, device=z.device)  # k - r
        fits = (top / lam - tails + left.log().to(z.dtype) <= 0) | (left == 1)
        r = fits.int().argmax(1, keepdim=True)
        is_capped = torch.zeros_like(z, dtype=torch.bool)
        is_capped = is_capped.scatter(1, index, torch.arange(k, device=z.device) < r)
    share = (k - r).to(z.dtype) / k
    tail = z.masked_fill(is_capped, -math.inf).logsumexp(1, keepdim=True)
    capped = torch.where(is_capped, delta, 0.0).sum(1, keepdim=True) / k
    value = capped - lam * (1 - share) * math.log(classes / k)
    value = value + lam * share * (tail - share.log() - math.log(classes))
    return value.squeeze(1)
