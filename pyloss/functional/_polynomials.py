"""Polynomials near exp for low-rank tensor attention, and what they cost in accuracy.

With p(x) = exp(x - centre) f(x), the weights of a softmax change from P to P f / sum P f. A
constant factor of f cancels, so what counts is delta = (max f - min f) / (max f + min f) over the
range of the scores: the weights then move by at most 2 (1 - sqrt(1 - delta^2)) / delta in the sum
of their absolute values, and an output by that times the largest |v_1 v_2|. Both are sharp.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

_GRID = 4001


class Polynomial(NamedTuple):
    """sum_t coefficients[t] x^t, near exp(x - centre)."""

    coefficients: tuple[float, ...]
    centre: float = 0.0

    def degree(self) -> int:
        return len(self.coefficients) - 1

    def scaled(self, scale: float) -> tuple[float, ...]:
        """The coefficients of a polynomial in x / scale."""
        return tuple(p * scale**t for t, p in enumerate(self.coefficients))


class Accuracy(NamedTuple):
    """How a polynomial does on [-R, R]."""

    delta: float  # relative error, up to a constant factor
    low: float  # bounds of p(x) / exp(x - centre)
    high: float
    condition: float  # sum_t |p_t| R^t over the least p(x): what rounding errors grow by


def taylor(degree: int) -> Polynomial:
    """The Taylor polynomial at 0."""
    return Polynomial(tuple(1.0 / math.factorial(t) for t in range(degree + 1)))


def chebyshev(degree: int, radius: float) -> Polynomial:
    """Interpolates exp on [-radius, radius] at the zeros of a Chebyshev polynomial."""
    radius = max(radius, _least_radius(degree))
    count = degree + 1
    angles = [math.pi * (k + 0.5) / count for k in range(count)]
    nodes = [math.exp(radius * math.cos(a)) for a in angles]
    series = [
        (2.0 if j else 1.0) / count * sum(f * math.cos(j * a) for f, a in zip(nodes, angles))
        for j in range(count)
    ]
    return Polynomial(tuple(_powers(series, radius)))


def _powers(series: list[float], radius: float) -> list[float]:
    """The coefficients of x^t of a Chebyshev series in x / radius."""
    total = [0.0] * len(series)
    before, now = [0.0] * len(series), [1.0] + [0.0] * (len(series) - 1)
    for j, c in enumerate(series):
        for t, a in enumerate(now):
            total[t] += c * a
        # T_1 = x T_0, then T_{j+1} = 2 x T_j - T_{j-1}
        factor = 2.0 if j else 1.0
        shifted = [0.0] + [factor * a for a in now[:-1]]
        before, now = now, [s - b for s, b in zip(shifted, before)]
    return [a / radius**t for t, a in enumerate(total)]


def _least_radius(degree: int) -> float:
    """No polynomial is made for a smaller range, where exp is nearly 1.

    Rounding leaves 1e-16 / radius^t in coefficient t, a float32 number, and 1e-16 / radius in the
    slope.
    """
    return max(1e-6, 10.0 ** (-36.0 / degree))


def fit(degree: int, samples: tuple[Tensor, Tensor]) -> Polynomial:
    """Least squares of p / exp - 1 over :func:`clustered` scores, with weights exp(score)."""
    x, count = samples
    centre = x.max().item()
    most = x.abs().max().item()
    radius = max(most, 0.1)  # powers of less would be numbers too large
    # (p(x) e^(c - x) - 1)^2 e^(x - c): rows divided by e^((x - c) / 2).
    root = count.sqrt()
    half = torch.exp(0.5 * (x - centre))
    t = x / radius
    columns = [torch.ones_like(t), t]
    for _ in range(degree - 1):
        columns.append(2.0 * t * columns[-1] - columns[-2])
    matrix = torch.stack(columns, 1) * (root / half).unsqueeze(1)
    # Few scores, or near ones, leave coefficients open: then those of Taylor, if not too inexact.
    # What is solved for is the difference, of least norm.
    start = [math.exp(-centre) * c if most < 8.0 else 0.0 for c in taylor(degree).coefficients]
    right = root * (half - sum(c * x**t for t, c in enumerate(start)) / half)
    series = torch.linalg.lstsq(matrix, right.unsqueeze(1), driver="gelsd").solution.flatten()
    return Polynomial(tuple(a + b for a, b in zip(start, _powers(series.tolist(), radius))), centre)


def clustered(samples: Tensor, bins: int = 512) -> tuple[Tensor, Tensor]:
    """The means of at most so many bins, and how many samples each holds."""
    x = samples.detach().double().cpu().flatten()
    low, high = x.min(), x.max()
    width = (high - low).clamp_min(1e-300) / bins
    at = ((x - low) / width).long().clamp_(0, bins - 1)
    count = torch.bincount(at, minlength=bins).double()
    total = torch.zeros(bins, dtype=x.dtype).index_add_(0, at, x)
    return total[count > 0] / count[count > 0], count[count > 0]


def accuracy(polynomial: Polynomial, radius: float) -> Accuracy:
    """What holds for every x in [-radius, radius]."""
    radius = max(radius, 0.0)
    if not math.isfinite(radius) or radius > 300.0:
        return Accuracy(math.inf, -math.inf, math.inf, math.inf)
    if polynomial == taylor(polynomial.degree()):
        low, high = _extremes_of_taylor(polynomial, radius)
    else:
        low, high = _extremes_on_grid(polynomial, radius)
    if not (low > 0.0 and math.isfinite(high)):
        return Accuracy(math.inf, low, high, math.inf)
    absolute = sum(abs(c) * radius**t for t, c in enumerate(polynomial.coefficients))
    condition = absolute / low * math.exp(radius + polynomial.centre)  # p >= low exp(-R - centre)
    return Accuracy((high - low) / (high + low), low, high, condition)


def _extremes_of_taylor(polynomial: Polynomial, radius: float) -> tuple[float, float]:
    """The slope of p / exp is -x^g / g! exp(-x): they are at the ends, and at 0 for odd g."""
    p = polynomial.coefficients
    ends = [sum(c * x**t for t, c in enumerate(p)) * math.exp(-x) for x in (-radius, radius)]
    slack = 4e-16 * (len(p) + 2) * math.exp(2.0 * radius)
    return min(ends) - slack, max(*ends, 1.0) + slack


@functools.lru_cache(maxsize=8)
def _powers_on_grid(count: int) -> Tensor:
    u = torch.linspace(-1.0, 1.0, _GRID, dtype=torch.float64)
    return torch.stack([u**t for t in range(count)])


@functools.lru_cache(maxsize=1024)
def _extremes_on_grid(polynomial: Polynomial, radius: float) -> tuple[float, float]:
    """Those on a grid, and as far beyond as can be reached between two of its points."""
    p, centre = polynomial
    u = torch.linspace(-1.0, 1.0, _GRID, dtype=torch.float64)
    growth = torch.exp(centre - radius * u)
    first = _padded(_derivative(p), p)
    second = _padded(_derivative(first), p)
    # The second derivative of p / exp, and a bound of the third. Between two points of distance h a
    # function leaves the line through them by h^2 / 8 times the most of its second derivative.
    curve = [a - 2.0 * b + c for a, b, c in zip(second, first, p)]
    rows = [[a * radius**t for t, a in enumerate(q)] for q in (p, curve)]
    powers = _powers_on_grid(len(p))
    f, bend = (torch.tensor(rows, dtype=torch.float64) @ powers) * growth
    absolute = torch.tensor(rows[0], dtype=torch.float64).abs() @ powers.abs() * growth
    rise = sum(
        factor * sum(abs(a) * radius**t for t, a in enumerate(q))
        for factor, q in ((1.0, _derivative(second)), (3.0, second), (3.0, first), (1.0, p))
    ) * math.exp(min(centre + radius, 700.0))
    h = 2.0 * radius / (_GRID - 1)
    slack = h * h / 8.0 * (bend.abs().max().item() + 0.5 * h * rise)
    slack += 4e-16 * (len(p) + 2) * absolute.max().item()  # rounding of the evaluation
    return f.min().item() - slack, f.max().item() + slack


def weight_bound(delta: float) -> float:
    """Most that the softmax weights change in the sum of absolute values; at most 2."""
    if delta <= 0.0:
        return 0.0
    # 2 (1 - sqrt(1 - d^2)) / d without the cancellation.
    return 2.0 * delta / (1.0 + math.sqrt(1.0 - delta * delta)) if delta < 1.0 else math.inf


def _derivative(p) -> list[float]:
    return [t * a for t, a in enumerate(p)][1:] or [0.0]


def _padded(q, like) -> list[float]:
    return [*q, *[0.0] * (len(like) - len(q))]
