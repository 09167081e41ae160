"""What a call of linear cross entropy is: its tensors, how it is carried out, what it returns.

Nothing here crosses to C++: the rows do, as those of row_softmax.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.row_softmax.epilogue import unless_zero
from pyloss.ops.row_softmax.masses import common_mass, ignored_rows, masses
from pyloss.ops.row_softmax.records import REDUCTIONS, Codes, Options

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


class Call:
    """A call with its denominators multiplied into the weights, so that chunks only add up."""

    def __init__(self, t: Tensors, options: Options, codes: Codes):
        self.options = options
        self.classes = t.linear_weight.shape[0]
        self.ignored = ignored_rows(t[3:], codes)
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
            loss_mass, z_mass = masses(t[3:], codes, self.ignored)
            factor = 1 / z_mass
            if t.weight is not None:
                self.weight = common_mass(loss_mass, z_mass, t.weight, codes.zero_if_empty).to(acc)
            if codes.zero_if_empty:
                factor = torch.where(z_mass == 0, 0.0, factor)
            else:
                self.empty = loss_mass == 0
        token = factor
        if t.token_weight is not None:
            token = unless_zero(t.token_weight, t.token_weight * factor)
        self.token_weight = token.to(acc).expand(t.input.shape[0])
