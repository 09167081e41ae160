"""Spherical losses of a row as functions of its moments: what dense scores and the factored layer
share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyloss.functional import _checks as checks


class Moments(NamedTuple):
    """Of rows of C scores o, all of one shape."""

    target: Tensor  # o_t
    offset: Tensor  # o_t - mean
    mean: Tensor
    var: Tensor  # the mean of (o_j - mean)^2
    classes: int

    def sum(self) -> Tensor:
        return self.mean * self.classes

    def square_sum(self) -> Tensor:
        return (self.var + self.mean.square()) * self.classes


def moments_of_sums(target: Tensor, sum: Tensor, square_sum: Tensor, classes: int) -> Moments:
    """From sums, which ought to be float64: the difference that is the variance loses digits."""
    mean = sum / classes
    var = (square_sum / classes - mean.square()).clamp(min=0)
    return Moments(target, target - mean, mean, var, classes)


# --------------------------------------------------------------------------------------------------
# Losses


def z_loss(m: Moments, a: float = 1.0, b: float = 0.0) -> Tensor:
    least = 1e-12 if m.var.dtype == torch.float64 else 1e-6
    # 0 * var: where the variance overflows there is no z.
    z = m.offset / torch.sqrt(m.var + least**2) + 0.0 * m.var
    return -logsigmoid(a * (z - b)) / a


def one_hot_mse(m: Moments) -> Tensor:
    return m.square_sum() - 2.0 * m.target + 1.0


def taylor_softmax(m: Moments) -> Tensor:
    own = 1.0 + m.target + 0.5 * m.target.square()
    return torch.log(m.classes + m.sum() + 0.5 * m.square_sum()) - torch.log(own)


def spherical_softmax(m: Moments, eps: float = 1e-3) -> Tensor:
    own = m.target.square() + eps
    return torch.log(m.square_sum() + m.classes * eps) - torch.log(own)


def of_sums(fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Moments], Tensor]:
    """A user's function of (o_t, sum of o, sum of o^2)."""

    def loss(m: Moments) -> Tensor:
        found = fn(m.target, m.sum(), m.square_sum())
        if not isinstance(found, Tensor) or found.shape != m.target.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"fn must return a loss of each row, {list(m.target.shape)}, got {got}"
            )
        return found

    return loss


# --------------------------------------------------------------------------------------------------
# Options


def check_slope(a, b) -> None:
    checks.check_range("a", a, 0.0, open_low=True)
    checks.check_number("b", b)
    if not -float("inf") < b < float("inf"):
        raise ValueError(f"b must be finite, got {b}")


def check_eps(eps) -> None:
    checks.check_range("eps", eps, 0.0, open_low=True)


def check_function(fn) -> None:
    if not callable(fn):
        raise TypeError(f"fn must be a function of (o_t, s, q), got {type(fn).__name__}")


def check_two_classes(function: str, classes: int) -> None:
    if classes < 2:
        raise ValueError(f"{function} needs at least 2 classes, got {classes}")
