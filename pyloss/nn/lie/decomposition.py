"""Coordinates of matrices of positive determinant by their polar decomposition."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.nn.lie._algebra import Algebra
from pyloss.nn.lie._spectral import atanhc, root_and_log, series, sinhc


class Polar(NamedTuple):
    """A = P R, by :func:`polar`.

    Example:
        >>> import torch, pyloss
        >>> found = pyloss.nn.lie.polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
        >>> found.P
        tensor([[2., 0.],
                [0., 3.]])
        >>> found.R
        tensor([[ 0., -1.],
                [ 1.,  0.]])
    """

    P: Tensor  #: symmetric and positive definite, ``(..., n, n)``
    R: Tensor  #: of SO(n), ``(..., n, n)``


def polar(a: Tensor) -> Polar:
    r"""The polar decomposition :math:`A = P R`, :math:`P = (A A^\top)^{1/2}`.

    In closed form for n = 2, by eigenvalues above; smooth everywhere, also where P is a multiple of
    the identity. For n > 2 there are two derivatives, and the third is NaN.

    Args:
        a: matrices ``(..., n, n)`` of positive determinant, floating.

    Returns:
        :class:`Polar`, of the dtype of ``a``; half types are computed in float32. A matrix with NaN
        gives NaN.

    Raises:
        TypeError: what is not floating.
        ValueError: what is not square; a determinant that is not positive, seen on the CPU: on a
            device and in compiled graphs it gives NaN.

    Example:
        >>> import torch, pyloss
        >>> a = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> p, r = pyloss.nn.lie.polar(a)
        >>> torch.testing.assert_close(p @ r, a)

    Reference:
        Mironenco, Forré. Lie Group Decompositions for Equivariant Neural Networks. arXiv
        2310.11366.
    """
    p, r, _ = parts(_checked(a))
    return Polar(p.to(a.dtype), r.to(a.dtype))


def xi_inv(a: Tensor) -> Tensor:
    r"""Coordinates of matrices of positive determinant: those of :math:`\log P + \log R`.

    Every such matrix has them, while many have no real logarithm. They are inner products with the
    orthonormal basis of :func:`xi`, zero at the identity. Derivatives: see :func:`polar`.

    Args:
        a: matrices ``(..., n, n)`` of positive determinant, n at most 3, floating.

    Returns:
        ``(..., n * n)``, of the dtype of ``a``; half types are computed in float32. The rotation's
        angle is in :math:`[-\pi, \pi]`: coordinates jump at :math:`\pi`. A matrix with NaN
        gives NaN.

    Raises:
        As :func:`polar`; NotImplementedError: n > 3, where log R is not in closed form.

    Example:
        >>> import math, torch, pyloss
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> (pyloss.nn.lie.xi_inv(turn) / math.pi * math.sqrt(2)).round(decimals=3)
        tensor([0., 0., 0., 1.])
        >>> a = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> torch.testing.assert_close(pyloss.nn.lie.xi(pyloss.nn.lie.xi_inv(a)), a)

    Reference:
        Mironenco, Forré. arXiv 2310.11366.
    """
    return coordinates(_checked(a), Algebra(a.shape[-1])).to(a.dtype)


def xi(coords: Tensor) -> Tensor:
    r"""Matrices of positive determinant by their coordinates: :math:`e^{X_{sym}} e^{X_{skew}}`.

    .. math:: X = \sum_k c_k B_k, \qquad \langle B_k, B_l \rangle = \mathrm{tr}(B_k^\top B_l)

    with the orthonormal basis B of the diagonal matrices, then the symmetric ones
    :math:`(E_{ij} + E_{ji}) / \sqrt 2`, then the skew ones :math:`(E_{ji} - E_{ij}) / \sqrt 2`,
    i < j.

    Args:
        coords: ``(..., n * n)``, floating.

    Returns:
        ``(..., n, n)``, of the dtype of ``coords``; half types are computed in float32.

    Raises:
        TypeError: what is not floating.
        ValueError: a last dimension that is no square.

    Example:
        >>> import torch, pyloss
        >>> pyloss.nn.lie.xi(torch.zeros(4))
        tensor([[1., 0.],
                [0., 1.]])

    Reference:
        Mironenco, Forré. arXiv 2310.11366.
    """
    checks.check_floating("coords", coords)
    size = coords.shape[-1] if coords.dim() else 0
    n = math.isqrt(size)
    if n * n != size or not n:
        raise ValueError(f"coords must be (..., n * n), got {list(coords.shape)}")
    return exponential(wide(coords), Algebra(n)).to(coords.dtype)


# --------------------------------------------------------------------------------------------------
# The decomposition, in float32 or float64


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _checked(a: Tensor) -> Tensor:
    """In float32 at least; on the CPU it looks at the determinants."""
    checks.check_floating("a", a)
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or not a.shape[-1]:
        raise ValueError(f"a must be (..., n, n), got {list(a.shape)}")
    if checks.can_look_at(a):
        det = torch.linalg.det(wide(a).detach())
        if (det <= 0).any():
            least = det[det <= 0].min().item()
            raise ValueError(f"a must have positive determinants, got one of {least:.3g}")
    return wide(a)


def coordinates(a: Tensor, algebra: Algebra) -> Tensor:
    """Of log P + log R; a in float32 or float64, not looked at."""
    _, r, log_p = parts(a)
    return algebra.coordinates(log_p, log_rotation(r))


def exponential(coords: Tensor, algebra: Algebra) -> Tensor:
    """The product of the exponentials of the symmetric and the skew matrix."""
    with checks.without_autocast(coords):
        symmetric, skew = algebra.matrices(coords)
        if algebra.n == 2:
            return _exp2(symmetric) @ turned(skew[..., 1, 0])
        return torch.linalg.matrix_exp(symmetric) @ torch.linalg.matrix_exp(skew)


def parts(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, R and log P; NaN where the determinant is not positive."""
    with checks.without_autocast(a):
        if a.shape[-1] == 2:
            (a11, a12), (a21, a22) = (row.unbind(-1) for row in a.unbind(-2))
            det = a11 * a22 - a12 * a21
        else:
            det = torch.linalg.det(a)
        usable = det > 0
        unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        a = torch.where(usable[..., None, None], a, unit)  # LAPACK refuses NaN
        found = _parts2(a) if a.shape[-1] == 2 else _parts_n(a)
        nothing = torch.where(usable, 0.0, math.nan).to(a.dtype)[..., None, None]
        p, r, log_p = (m + nothing for m in found)
    return p, r, log_p


def _parts_n(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if a.shape[-1] == 1:
        return a, torch.ones_like(a), a.log()
    p, twice = root_and_log(a)
    return p, torch.linalg.solve(p, a), twice / 2


def _parts2(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without eigenvalues. For det A > 0 the norm below is at least 2 sqrt(det A)."""
    (a11, a12), (a21, a22) = (row.unbind(-1) for row in a.unbind(-2))
    det = a11 * a22 - a12 * a21
    cos, sin = a11 + a22, a21 - a12
    norm = (cos * cos + sin * sin).sqrt()
    cos, sin = cos / norm, sin / norm
    p11, p22 = a11 * cos - a12 * sin, a21 * sin + a22 * cos
    p12 = (a11 * sin + a12 * cos + a21 * cos - a22 * sin) / 2
    mean, half = (p11 + p22) / 2, (p11 - p22) / 2
    # log P = log(det) / 2 I + c (P - mean I), c = atanh(d / mean) / d, d^2 = half^2 + p12^2
    q = (half * half + p12 * p12) / (mean * mean)
    far = q > 0.5  # where 1 - d / mean cancels: by the determinant
    d = torch.where(far, q, 0.5).sqrt() * mean
    c = torch.where(
        far, torch.log((mean + d) ** 2 / det) / (2 * d), atanhc(torch.where(far, 0, q)) / mean
    )
    middle = torch.log(det) / 2
    log_p = _matrix2(middle + c * half, c * p12, c * p12, middle - c * half)
    return _matrix2(p11, p12, p12, p22), _matrix2(cos, -sin, sin, cos), log_p


def _matrix2(x11: Tensor, x12: Tensor, x21: Tensor, x22: Tensor) -> Tensor:
    return torch.stack([torch.stack([x11, x12], -1), torch.stack([x21, x22], -1)], -2)


def turned(angle: Tensor) -> Tensor:
    """Plane rotations, counterclockwise."""
    cos, sin = angle.cos(), angle.sin()
    return _matrix2(cos, -sin, sin, cos)


def _exp2(x: Tensor) -> Tensor:
    """Of symmetric matrices: e^m (cosh d I + sinh d / d (X - m I))."""
    half, x12 = (x[..., 0, 0] - x[..., 1, 1]) / 2, x[..., 0, 1]
    middle, q = (x[..., 0, 0] + x[..., 1, 1]) / 2, half * half + x12 * x12
    s, cosh = sinhc(q), 1 + q / 2 * sinhc(q / 4) ** 2
    return torch.exp(middle)[..., None, None] * _matrix2(
        cosh + s * half, s * x12, s * x12, cosh - s * half
    )


def log_rotation(r: Tensor) -> Tensor:
    """The skew logarithm of rotations, n <= 3."""
    n = r.shape[-1]
    if n == 1:
        return torch.zeros_like(r)
    if n == 2:
        angle = torch.atan2(r[..., 1, 0], r[..., 0, 0])
        none = torch.zeros_like(angle)
        return _matrix2(none, -angle, angle, none)
    if n > 3:
        raise NotImplementedError(f"log R is there for n <= 3, got n = {n}")
    w, v = _quaternion(r)
    x, y, z = (_angle_over_sine(w, (v * v).sum(-1))[..., None] * v).unbind(-1)
    none = torch.zeros_like(x)
    rows = [none, -z, y], [z, none, -x], [-y, x, none]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _quaternion(r: Tensor) -> tuple[Tensor, Tensor]:
    """(w, (x, y, z)) with w >= 0, from the largest of the four: nothing cancels at any angle."""
    (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = (row.unbind(-1) for row in r.unbind(-2))
    squares = [1 + r00 + r11 + r22, 1 + r00 - r11 - r22, 1 - r00 + r11 - r22, 1 - r00 - r11 + r22]
    a, b, c = r21 - r12, r02 - r20, r10 - r01
    d, e, f = r10 + r01, r02 + r20, r21 + r12
    rows = (
        [squares[0], a, b, c],
        [a, squares[1], d, e],
        [b, d, squares[2], f],
        [c, e, f, squares[3]],
    )
    square = torch.stack(squares, -1)
    largest = torch.nn.functional.one_hot(square.detach().argmax(-1), 4).to(r.dtype)
    chosen = (torch.stack([torch.stack(row, -1) for row in rows], -2) * largest[..., None]).sum(-2)
    found = chosen / (2 * (square * largest).sum(-1, keepdim=True).sqrt())
    found = torch.where(found[..., :1] < 0, -found, found)
    return found[..., 0], found[..., 1:]


def _angle_over_sine(w: Tensor, q: Tensor) -> Tensor:
    """2 atan(r / w) / r of q = r^2, w >= 0; with all derivatives at q = 0."""
    near = q < 0.01 * w * w
    x = torch.where(near, q / torch.where(near, w * w, 1), 0)
    small = 2 * series(x, [(-1) ** k / (2 * k + 1) for k in range(8)])
    r = torch.where(near, 1, q).sqrt()
    return torch.where(near, small / torch.where(near, w, 1), 2 * torch.atan2(r, w) / r)
