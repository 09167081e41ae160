"""Functions of a matrix that are smooth where eigenvalues or singular values meet.

The derivative of torch.linalg.eigh divides by differences of eigenvalues; that of f(S) does not:
with eigenvectors U and eigenvalues w of S as constants, and E = U^T S U - diag(w),

    f(S) = U (f(w) + f[w_i, w_j] E_ij + sum_k f[w_i, w_k, w_j] E_ik E_kj) U^T

has the value, the first and the second derivative of f(S); the divided differences f[a, b] and
f[a, b, c] have forms without cancellation. E is 0 in value, and all are plain operations: forward
mode, vmap and compiled graphs come with them. A third derivative would need a further term: added
|E|^2.5 is 0 up to the second, and makes it NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

_TERMS = 12  # of the logarithm's series, where eigenvalues are so near each other
_NEAR = 0.05


def root_and_log(a: Tensor) -> tuple[Tensor, Tensor]:
    """(A A^T)^(1/2) and log (A A^T) of regular A (..., n, n)."""
    u, sigma, _ = torch.linalg.svd(a.detach())
    u, sigma = u.detach(), sigma.detach()
    scale = sigma[..., :1]  # of small A the divided differences are larger than float32 has
    sigma, a = sigma / scale, a / scale.unsqueeze(-1)
    e = u.mT @ (a @ a.mT) @ u
    e = e - e.detach()
    x, y, z = sigma[..., :, None, None], sigma[..., None, :, None], sigma[..., None, None, :]

    def of(value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        inner = torch.diag_embed(value) + first.squeeze(-1) * e
        inner = inner + torch.einsum("...ikj,...ik,...kj->...ij", second, e, e)
        inner = inner + e.abs().pow(2.5)  # no third derivative rather than a wrong one
        return u @ inner @ u.mT

    root = of(sigma, 1 / (x + y), -1 / ((x + y) * (y + z) * (x + z)))
    x, y, z = x * x, y * y, z * z
    value = 2 * (sigma.log() + scale.log())
    return root * scale.unsqueeze(-1), of(value, _log2(x, y), _log3(x, y, z))


def _log2(a: Tensor, b: Tensor) -> Tensor:
    """(log a - log b) / (a - b)."""
    d = (a - b) / (a + b)
    return 2 * atanhc(d * d) / (a + b)


def series(x: Tensor, coefficients: Iterable[float]) -> Tensor:
    """Of powers of x, by Horner: derivatives of x ** 0 and x ** 1 at 0 are NaN."""
    total = torch.zeros_like(x)
    for c in reversed(tuple(coefficients)):
        total = c + total * x
    return total


def atanhc(q: Tensor) -> Tensor:
    """atanh(r) / r of q = r^2 in [0, 1); with all derivatives at 0."""
    near = q < 0.01
    r = torch.where(near, 0.5, q).sqrt()
    small = series(torch.where(near, q, 0), [1 / (2 * k + 1) for k in range(8)])
    return torch.where(near, small, torch.atanh(r) / r)


def sinhc(q: Tensor) -> Tensor:
    """sinh(r) / r of q = r^2, likewise."""
    near = q < 0.25
    r = torch.where(near, 1, q).sqrt()
    small = series(torch.where(near, q, 0), [1 / math.factorial(2 * k + 1) for k in range(7)])
    return torch.where(near, small, torch.sinh(r) / r)


def _log3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The second divided difference, by first ones of the outermost two or, of three close
    numbers, by a series of complete homogeneous polynomials."""
    low, high = torch.minimum(torch.minimum(a, b), c), torch.maximum(torch.maximum(a, b), c)
    middle = a + b + c - low - high
    apart = high - low > _NEAR * low
    far = (_log2(high, middle) - _log2(middle, low)) / torch.where(apart, high - low, 1)
    centre = (a + b + c) / 3
    u, v, w = (torch.where(apart, 0, x / centre - 1) for x in (a, b, c))
    p, q, r = u + v + w, u * v + v * w + w * u, u * v * w
    # h_m = p h_{m-1} - q h_{m-2} + r h_{m-3}; log has the coefficients (-1)^(k+1) / k, k = m + 2.
    h3 = h2 = torch.zeros_like(p)
    h1 = torch.ones_like(p)
    near = -h1 / 2
    for m in range(1, _TERMS):
        h1, h2, h3 = p * h1 - q * h2 + r * h3, h1, h2
        near = near + h1 * ((-1) ** (m + 1) / (m + 2))
    return torch.where(apart, far, near / centre**2)
