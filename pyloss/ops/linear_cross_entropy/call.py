"""What a call of linear cross entropy is: its tensors, how it is carried out, what it returns.

Nothing here crosses to C++: the rows do, as those of row_softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.row_softmax.epilogue import unless_zero
from pyloss.ops.row_softmax.records import DENSE, MIX, REDUCTIONS, Codes, Options

# Bits of `wants` besides those of row_softmax: the gradients of input, weight and bias.
WANT_GRADS = (8, 16, 32)
# A chunk's length, where no number is given: by chunk_rows; or, where the weight's gradient is
# wanted and its product comes in its own dtype, all rows if that takes less memory.
AUTO, AUTO_FOR_WEIGHT = 0, -1


class Tensors(NamedTuple):
    """The tensors of a call, in the order of the op's schema."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (V, D); its dtype may be wider than the input's
    linear_bias: Tensor | None  # (V)
    target: Tensor  # (N) or (N, V)
    target2: Tensor | None  # (N)
    mix: Tensor | None  # (N)
    weight: Tensor | None  # (V)
    token_weight: Tensor | None  # (N)


class Settings(NamedTuple):
    """How a call is carried out; the loss does not depend on it."""

    chunk: int  # rows, or AUTO
    strategy: str
    exact: bool  # the weight's gradient from float32 products
    tiles: float | None = None  # by tiles, leaving out what this filter allows; None: by chunks


def wanted(wants: int) -> tuple[bool, ...]:
    """Which of the gradients of (input, weight, bias)."""
    return tuple(bool(wants & bit) for bit in WANT_GRADS)


def spread(grads, wants: int) -> list[Tensor | None]:
    """Gradients in the order (input, weight, bias), None for those not formed."""
    found, place = [], 0
    for bit in WANT_GRADS:  # by place: Dynamo of torch 2.6 cannot trace a pop
        found.append(grads[place] if wants & bit else None)
        place += bool(wants & bit)
    return found


def ignored_rows(t: Tensors, codes: Codes) -> Tensor | None:
    """Mask of the rows to leave out; None where no row can be."""
    if codes.kind == DENSE:
        return None
    ignored = wide(t.target) == codes.ignore_index
    return ignored | (wide(t.target2) == codes.ignore_index) if codes.kind == MIX else ignored


def _mass(t: Tensors, codes: Codes, ignored) -> tuple[Tensor, Tensor]:
    """The denominators of 'mean': of the loss, and of the z-loss. float64, 0-d."""
    rows_in = t.input.shape[0]
    if t.token_weight is None:
        token = t.input.new_ones(rows_in, dtype=torch.float64)
    else:
        token = t.token_weight.double()
    if ignored is not None:
        token = torch.where(ignored, 0.0, token)
    if t.weight is None or codes.kind == DENSE:
        mass = token.sum()
        return mass, mass

    def of(labels):
        # Out of range, and not ignored: the kernel will say so.
        return t.weight.double()[torch.where(outside(labels, t.weight.shape[0]), 0, wide(labels))]

    picked = of(t.target)
    if codes.kind == MIX:
        mix = t.mix.double()
        picked = mix * picked + (1 - mix) * of(t.target2)
    return (token * picked).sum(), token.sum()


class Call:
    """A call with its denominators multiplied into the weights, so that chunks only add up."""

    def __init__(self, t: Tensors, options: Options, codes: Codes):
        self.options = options
        self.classes = t.linear_weight.shape[0]
        self.ignored = ignored_rows(t, codes)
        self.empty = None  # whether the mean is over nothing and must be NaN
        self.weight, self.token_weight = t.weight, t.token_weight
        reduction = codes.reduction
        if reduction == REDUCTIONS["mean"]:
            self._fold(t, codes)
            reduction = REDUCTIONS["sum"]
        if options.num_items:
            self.options = options._replace(num_items=0.0)
        self.codes = Codes(codes.kind, codes.ignore_index, codes.loss, reduction, 0)
        self.scalar = self.codes.scalar

    def _fold(self, t, codes):
        acc = accumulator_dtype(t.input.dtype)
        if self.options.num_items > 0:
            factor = torch.full((), 1 / self.options.num_items, dtype=acc, device=t.input.device)
        else:
            loss_mass, z_mass = _mass(t, codes, self.ignored)
            factor = 1 / z_mass
            if t.weight is not None:
                # Without any row the class weights do not matter, but must not become NaN.
                ratio = torch.where(z_mass == 0, 1.0, z_mass / loss_mass)
                if codes.zero_if_empty:
                    ratio = torch.where(loss_mass == 0, 0.0, ratio)
                self.weight = (t.weight * ratio).to(acc)
            if codes.zero_if_empty:
                factor = torch.where(z_mass == 0, 0.0, factor)
            else:
                self.empty = loss_mass == 0
        token = factor
        if t.token_weight is not None:
            token = unless_zero(t.token_weight, t.token_weight * factor)
        self.token_weight = token.to(acc).expand(t.input.shape[0])
