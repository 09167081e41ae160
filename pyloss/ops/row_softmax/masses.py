"""Denominators of 'mean', from the labels alone: for those who sum over parts of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import widened, widest
from pyloss.ops.row_softmax.layout import row_shape
from pyloss.ops.row_softmax.records import DENSE, MIX, Codes

Labels = tuple[Tensor | None, ...]  # target, target2, mix, weight, token_weight


def ignored_rows(labels: Labels, codes: Codes) -> Tensor | None:
    """Mask of the rows to leave out; None where no row can be."""
    if codes.kind == DENSE:
        return None
    target, target2 = labels[:2]
    ignored = wide(target) == codes.ignore_index
    return ignored | (wide(target2) == codes.ignore_index) if codes.kind == MIX else ignored


def masses(labels: Labels, codes: Codes, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the loss, and of the z-loss. float64, 0-d."""
    target, target2, mix, weight, token_weight = labels
    if token_weight is None:
        rows = row_shape(target) if codes.kind == DENSE else target.shape
        token = target.new_ones(rows, dtype=widest(target.device))
    else:
        token = widened(token_weight)
    if ignored is not None:
        token = torch.where(ignored, 0.0, token)
    if weight is None or codes.kind == DENSE:
        mass = token.sum()
        return mass, mass

    def of(labels):
        # Out of range, and not ignored: the kernel will say so.
        return widened(weight)[torch.where(outside(labels, weight.shape[0]), 0, wide(labels))]

    picked = of(target)
    if codes.kind == MIX:
        share = widened(mix)
        picked = share * picked + (1 - share) * of(target2)
    return (token * picked).sum(), token.sum()


def common_mass(
    loss_mass: Tensor, z_mass: Tensor, weight: Tensor, zero_if_empty: bool | int
) -> Tensor:
    """Class weights with which `z_mass` is the denominator of both the loss and the z-loss."""
    # Without any row the class weights do not matter, but must not become NaN.
    ratio = torch.where(z_mass == 0, 1.0, z_mass / loss_mass)
    if zero_if_empty:
        ratio = torch.where(loss_mass == 0, 0.0, ratio)
    return (weight * ratio).to(weight.dtype)
