"""What makes one row loss differ from another, as torch operations on vectors of rows.

The counterpart of RowTransform and loss_of_nll of csrc/common/row_softmax.h, which the row-softmax
kernels run. Here for those who get a row's statistics otherwise: from the Triton tiles, from the
other ranks of a group.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops.row_softmax.records import COMP_SUM, FOCAL, LDR, POLY1, RELAXED, Options


class Transform(NamedTuple):
    """z = pre x, or post tanh(pre x) with a cap."""

    pre: float
    post: float
    cap: bool

    def value(self, x: Tensor) -> Tensor:
        if self.cap:
            return self.post * torch.tanh(self.pre * x)
        return x if self.pre == 1.0 else self.pre * x

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/dx from z."""
        if not self.cap:
            return self.pre
        th = z / self.post
        return self.pre * self.post * (1 - th) * (1 + th)


def transform(o: Options) -> Transform:
    if o.softcap:
        return Transform(o.logit_scale / o.softcap, o.softcap / o.temperature, True)
    return Transform(o.logit_scale / o.temperature, 1.0, False)


class LossOfNll(NamedTuple):
    value: Tensor
    slope: Tensor


def epilogue(o: Options, loss: int, nll: Tensor) -> LossOfNll:
    """A row's loss as a function of nll = -log p_y >= 0, and its derivative; nll may be infinite.

    Args:
        loss: a key of LOSSES.
    """
    cut = nll >= o.max_nll if o.max_nll < math.inf else None
    if cut is not None:
        nll = torch.where(cut, o.max_nll, nll)
    found = LOSSES[loss](o, nll)
    return found if cut is None else LossOfNll(found.value, torch.where(cut, 0.0, found.slope))


def _comp_sum(o: Options, nll: Tensor) -> LossOfNll:
    a = 1 - o.tau
    if a == 0:
        return LossOfNll(nll, torch.ones_like(nll))
    return LossOfNll(torch.expm1(a * nll) / a, torch.exp(a * nll))


def _focal(o: Options, nll: Tensor) -> LossOfNll:
    p, miss = torch.exp(-nll), -torch.expm1(-nll)
    power = miss**o.gamma
    # nll / miss -> 1 as p -> 1, and p nll -> 0 as p -> 0.
    p_ratio = torch.where(p > 0, p * torch.where(miss > 0, nll / miss, 1.0), 0.0)
    return LossOfNll(power * nll, power * (1 + o.gamma * p_ratio))


def _poly1(o: Options, nll: Tensor) -> LossOfNll:
    return LossOfNll(nll - o.poly1 * torch.expm1(-nll), 1 + o.poly1 * torch.exp(-nll))


def _relaxed(o: Options, nll: Tensor) -> LossOfNll:
    a = o.relaxation
    p, miss = torch.exp(-nll), -torch.expm1(-nll)
    met = p >= 1 - a
    entropy = (1 - a) * math.log1p(-a) + a * math.log(a)
    value = (1 - a) * nll - a * torch.log(miss) + entropy
    return LossOfNll(torch.where(met, 0.0, value), torch.where(met, 0.0, (1 - a) - a * p / miss))


def _ldr(o: Options, nll: Tensor) -> LossOfNll:
    return LossOfNll(o.temperature * (nll - o.offset), torch.full_like(nll, o.temperature))


LOSSES = {COMP_SUM: _comp_sum, FOCAL: _focal, POLY1: _poly1, RELAXED: _relaxed, LDR: _ldr}


class _RowSoftmaxEpilogue(torch.autograd.Function):
    """The value alone, differentiable once."""

    @staticmethod
    def forward(ctx, nll, options, loss):
        found = epilogue(Options(*options), loss, nll)
        ctx.save_for_backward(found.slope)
        return found.value.clone()  # the plain loss is nll itself

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return unless_zero(g, g * slope), None, None


def differentiable_epilogue(o: Options, loss: int, nll: Tensor) -> Tensor:
    """The loss alone, with a gradient that keeps its accuracy where autograd's own would not."""
    return _RowSoftmaxEpilogue.apply(nll, tuple(o), loss)


def unless_zero(factor: Tensor | float, product: Tensor) -> Tensor:
    """A product, 0 where its factor is 0: which must not meet an infinite value."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, product)
    return product if factor else torch.zeros_like(product)
