"""Sums, means and gradients over nothing: where 0 meets infinity, and must stay 0."""

from __future__ import annotations

import torch
from torch import Tensor


def divided(total: Tensor, divisor: Tensor, zero_if_empty: bool) -> Tensor:
    """A sum over its denominator; with `zero_if_empty` 0, and a gradient of 0, where that is 0.

    There the sum is divided by 1: torch.where alone would hand the gradient of 0/0 on.
    """
    if not zero_if_empty:
        return total / divisor
    nothing = divisor == 0
    return torch.where(nothing, 0.0, total / torch.where(nothing, 1.0, divisor))


def scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """A gradient for an upstream 1 times what came from above. What is 0, as in rows that are
    ignored, stays 0 whatever that is; scaled_gradient of csrc/common/row_softmax.h."""
    return torch.where(grad == 0, grad, grad * upstream.to(grad.dtype))


def scale_(grad: Tensor, upstream: Tensor) -> Tensor:
    """The same in place."""
    zero = grad == 0
    return grad.mul_(upstream).masked_fill_(zero, 0)
