"""The ops of aldr on the reference, and their gradient in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._labels import outside
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients


def _reference():
    """The reference, imported with its first use."""
    from pyloss.reference import aldr

    return aldr


def composed(x: Tensor, target: Tensor, start: Tensor | None, options) -> tuple[Tensor, Tensor]:
    """(values, lambda) of the rows in torch operations; 0 for a row that is ignored."""
    lam0, alpha, margin, ignore_index, l1 = options
    ignored = target == ignore_index
    bad = outside(target, x.shape[1]) & ~ignored
    label = torch.where(ignored | bad, 0, target)
    x = torch.where(ignored.unsqueeze(1), 0.0, x.to(accumulator_dtype(x.dtype)))
    x = x * torch.where(bad, torch.nan, 1.0).to(x.dtype).unsqueeze(1)
    value, lam = _reference().aldr(
        x, label, lam0=lam0, alpha=alpha, margin=margin, l1=l1, start=start
    )
    before = torch.full_like(lam, lam0) if start is None else start
    return torch.where(ignored, 0.0, value), torch.where(ignored, before, lam.detach())


def composed_gradient(g: Tensor, x: Tensor, target: Tensor, start, options, **more) -> Tensor:
    """Of the sum of the rows' values times g."""
    return gradients(lambda x: composed(x, target, start, options)[0], [x], [g], **more)[0]


def forward(x, target, factor, start, *options):
    with torch.no_grad():
        value, lam = composed(x, target, start, options)
    stats = _reference().statistics(x, target, value, lam, *options)
    if factor is None:
        return [stats]
    return [stats, composed_gradient(factor, x, target, start, options).contiguous()]


def backward(x, target, stats, factor, *options):
    """From lambda, where a forward has been: of a step from a `start` that is not known here."""
    lam = stats[1]

    def values(x):
        lam0, alpha, margin, ignore_index, l1 = options
        ignored = target == ignore_index
        label = torch.where(ignored | outside(target, x.shape[1]), 0, target)
        x = torch.where(ignored.unsqueeze(1), 0.0, x.to(accumulator_dtype(x.dtype)))
        value = _reference().value_at(x, label, lam, lam0=lam0, alpha=alpha, margin=margin, l1=l1)
        return torch.where(ignored, 0.0, value)

    return gradients(values, [x], [factor])[0].contiguous()
