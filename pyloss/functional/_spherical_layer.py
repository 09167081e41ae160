"""The factored weight of a layer below a spherical loss: what a step of it costs does not depend on
the number of classes.

    W = V U + 1 w0^T      (D, d): V (D, d), U (d, d), w0 (d)

With Q = W^T W and the sum of the rows of W at hand, o_t = w_t . h, sum o = (sum of rows) . h and
sum o^2 = h^T Q h take d^2. Upstream gradients (a, s, q) of the three, of each of m rows H, make the
gradient of the weight

    G = W H2^T H + Y H + 1 s^T H,   H2 = diag(2 q) H,   Y = sum_j a_j e_{t_j} e_j^T

and all of W - lr G but Y H is a change of U and w0; Y H changes the rows of V that are targets.

Paper: Vincent, de Brebisson, Bouthillier. arXiv 1412.7091.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._spherical import Moments, moments_of_sums
from pyloss.ops._labels import equals, outside, wide
from pyloss.ops._launch import without_autocast as without_autocast
from pyloss.ops._transforms import eager as eager

_ROWS_AT_ONCE = 1 << 15  # of V, in float64
_LEAST_PIVOT = 1e-6
_SIZES = (0.5, 2.0)  # singular values of U that need no care
_LARGEST = 4.0  # root mean square of those of U, and of U^-1, that cannot wait


class Factors(NamedTuple):
    """Views of the buffers of a layer; all but `classes` float64."""

    classes: Tensor  # V, (D, d)
    shared: Tensor  # U, (d, d)
    inverse: Tensor  # U^-T, (d, d)
    offset: Tensor  # w0, (d)
    gram: Tensor  # Q, (d, d)
    total: Tensor  # the sum of the rows of W, (d)


class Rows(NamedTuple):
    """What a backward leaves for the step: of m rows, float64."""

    h: Tensor  # (m, d)
    target: Tensor  # (m)
    grads: Tensor  # (3, m): of o_t, sum o, sum o^2


def weight_rows(f: Factors, index: Tensor | slice) -> Tensor:
    """Rows of W, float64."""
    return torch.addmm(f.offset, f.classes[index].double(), f.shared)


class SphericalLayerSums(torch.autograd.Function):
    """(3, m): o_t, sum o, sum o^2. The backward also tells `keep` what the step will need.

    Nothing of an ignored row reaches the results, a gradient or the step, NaN neither. `anchor`
    requires a gradient, so that there is a backward where nothing else does.
    """

    @staticmethod
    def forward(ctx, h, target, ignored, factors, keep, anchor):
        ignored = ignored.unsqueeze(1)
        x = torch.where(ignored, 0.0, h.double())
        own, through = weight_rows(factors, target), x @ factors.gram
        # The factors are saved so that a step between forward and backward is an error.
        ctx.save_for_backward(h, x, target, ignored, own, through, factors.total, factors.classes)
        ctx.keep = keep
        return torch.stack([(own * x).sum(1), x @ factors.total, (through * x).sum(1)])

    @staticmethod
    def backward(ctx, grads):
        h, x, target, ignored, own, through, total, _ = ctx.saved_tensors
        grads = torch.where(ignored.T, 0.0, grads)
        ctx.keep(Rows(x, target, grads.detach()))
        dx = None
        if ctx.needs_input_grad[0]:
            a, s, q = grads.unsqueeze(2)
            dx = (a * own + s * total + 2 * q * through).to(h.dtype)
            if torch.is_grad_enabled():  # create_graph
                dx = _SphericalLayerOnce.apply(dx, h)
        return dx, None, None, None, None, None


class _SphericalLayerOnce(torch.autograd.Function):
    """A gradient that raises when it is differentiated. torch's once_differentiable lets one pass
    whose upstream is a constant, as if the second derivative were 0."""

    @staticmethod
    def forward(ctx, dx, h):
        return dx.view_as(dx)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("SphericalLinear has no second derivative (create_graph=True)")


def moments(
    f: Factors, h: Tensor, target: Tensor, ignore_index: int, keep: Callable[[Rows], None]
) -> tuple[Moments, Tensor]:
    """Of the scores of rows h (m, d), float64, and a mask of those that are ignored."""
    classes = f.classes.shape[0]
    if checks.can_look_at(target):
        checks.check_index_values(target, classes, ignore_index)
    ignored, nowhere = equals(target, ignore_index), outside(target, classes)
    anchor = f.total.new_zeros((), requires_grad=torch.is_grad_enabled())
    sums = SphericalLayerSums.apply(
        h, torch.where(nowhere, 0, wide(target)), ignored, f, keep, anchor
    )
    own = torch.where(nowhere & ~ignored, math.nan, sums[0])  # on a GPU nobody has looked
    return moments_of_sums(own, sums[1], sums[2], classes), ignored


# --------------------------------------------------------------------------------------------------
# A step


def _of_weight(f: Factors, r: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H2; W^T B for the gradient G = B H; the gradient of h; B^T B."""
    a, s, q = r.grads.unsqueeze(2)
    scaled = 2 * q * r.h
    linear = a * weight_rows(f, r.target) + s * f.total
    through = scaled @ f.gram
    same = r.target == r.target.unsqueeze(1)
    ones = f.classes.shape[0] * (s @ s.T) + s @ a.T + a @ s.T + same * (a @ a.T)
    cross = scaled @ linear.T
    return scaled, through + linear, linear, through @ scaled.T + ones + cross + cross.T


def gradient_norm(f: Factors, r: Rows) -> Tensor:
    """Of G, which is never made: ||B H||^2 = <B^T B, H H^T>."""
    inner = _of_weight(f, r)[3]
    return (inner * (r.h @ r.h.T)).sum().clamp(min=0).sqrt()


def decay(f: Factors, factor: float) -> None:
    """W <- factor W."""
    for t, power in ((f.shared, 1), (f.offset, 1), (f.total, 1), (f.inverse, -1), (f.gram, 2)):
        t.mul_(factor**power)


def update(f: Factors, r: Rows, lr: float) -> bool:
    """W <- W - lr G. False, and nothing is done, where U would become singular."""
    scaled, back, _, inner = _of_weight(f, r)
    a, s, q = r.grads.unsqueeze(2)
    inverse = _moved_inverse(f.inverse, r.h, scaled, lr)
    if inverse is None:
        return False
    f.inverse.copy_(inverse)
    f.shared.sub_(lr * (f.shared @ scaled.T) @ r.h)
    f.offset.sub_(lr * ((2 * q * (r.h @ f.offset).unsqueeze(1) + s).T @ r.h).squeeze(0))
    move = (r.h @ inverse.T) * (-lr * a)
    f.classes.index_add_(0, r.target, move.to(f.classes.dtype))
    cross = back.T @ r.h
    f.gram.sub_(lr * (cross + cross.T)).add_(lr**2 * (r.h.T @ inner @ r.h))
    ones = scaled @ f.total.unsqueeze(1) + f.classes.shape[0] * s + a
    f.total.sub_(lr * (ones.T @ r.h).squeeze(0))
    return True


def _moved_inverse(inverse: Tensor, h: Tensor, scaled: Tensor, lr: float) -> Tensor | None:
    """U^-T for U (1 - lr H^T H2): by Woodbury's identity, or directly where rows are many."""
    m, d = h.shape
    few = m < d
    matrix = -lr * (scaled @ h.T if few else scaled.T @ h)
    matrix.diagonal().add_(1)
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    if bool((lu.diagonal().abs() < _LEAST_PIVOT).any()):  # not of a NaN, which is to be seen
        return None
    if not few:  # the matrix is symmetric
        return torch.linalg.lu_solve(lu, pivots, inverse.T).T
    found = torch.linalg.lu_solve(lu, pivots, scaled @ inverse.T)
    return inverse + lr * (found.T @ h)


def update_dense(f: Factors, r: Rows, lr: float) -> None:
    """The same with W itself: O(D d m)."""
    refactor(f)
    a, s, q = r.grads.unsqueeze(2)
    scaled = (2 * q * r.h).to(f.classes.dtype)
    h = r.h.to(f.classes.dtype)
    for part in f.classes.split(_ROWS_AT_ONCE):
        part.sub_(lr * (part @ scaled.T + s.T.to(part.dtype)) @ h)
    f.classes.index_add_(0, r.target, (-lr * a * r.h).to(f.classes.dtype))
    refresh(f)


# --------------------------------------------------------------------------------------------------
# Upkeep


def refactor(f: Factors) -> None:
    """V <- W, U <- 1, w0 <- 0."""
    for at in range(0, f.classes.shape[0], _ROWS_AT_ONCE):
        rows = slice(at, at + _ROWS_AT_ONCE)
        f.classes[rows] = weight_rows(f, rows).to(f.classes.dtype)
    for t in (f.shared, f.inverse):
        t.zero_().diagonal().fill_(1)
    f.offset.zero_()


def refresh(f: Factors) -> None:
    """Q and the sum of the rows anew, without what rounding has added in many steps."""
    f.gram.zero_()
    f.total.zero_()
    for at in range(0, f.classes.shape[0], _ROWS_AT_ONCE):
        rows = weight_rows(f, slice(at, at + _ROWS_AT_ONCE))
        f.gram.addmm_(rows.T, rows)
        f.total.add_(rows.sum(0))


def out_of_shape(f: Factors) -> bool:
    """Whether U has become so large, or its inverse, that the next steps would lose digits of V."""
    worst = torch.maximum(f.shared.norm(), f.inverse.norm())
    return bool(worst > _LARGEST * f.shared.shape[0] ** 0.5)


def stabilize(f: Factors) -> None:
    """Brings the singular values of U that have left [1/2, 2] back to 1; W stays."""
    if not bool(f.shared.isfinite().all()):
        return
    left, sizes, _ = torch.linalg.svd(f.shared)
    wrong = (sizes < _SIZES[0]) | (sizes > _SIZES[1])
    count = int(wrong.sum())
    if count == 0:
        f.inverse.copy_(torch.linalg.inv(f.shared).T)
        return
    if count > len(sizes) // 3:
        refactor(f)
        return
    directions, sizes = left[:, wrong], sizes[wrong]
    # V (1 + (size - 1) u u^T) (1 + (1/size - 1) u u^T) U = V U
    shrink = (directions * (1 / sizes - 1)) @ directions.T
    grow = ((sizes - 1) * directions).to(f.classes.dtype)
    for part in f.classes.split(_ROWS_AT_ONCE):
        part.add_((part @ grow) @ directions.T.to(part.dtype))
    f.shared.add_(shrink @ f.shared)
    f.inverse.copy_(torch.linalg.inv(f.shared).T)
