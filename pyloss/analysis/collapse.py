"""Neural collapse in closed form: the minima of the unconstrained features model.

    f = |W_M .. W_1 H - Y|^2 / (2 N) + sum_j lam_Wj / 2 |W_j|^2 + lam_H / 2 |H|^2

with free features H of N samples and their one-hot labels Y (arXiv 2301.00437). The product has the
singular directions of Y, and each of its singular values has a problem of its own. Everything is
float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._neural_collapse import checked_decay

__all__ = [
    "LinearUFMOptimum",
    "UFMSolution",
    "gof",
    "linear_ufm_optimum",
    "simplex_etf",
    "ufm_minimizer",
]

_HALVINGS = 80  # of an interval: below the rounding of anything in it


class UFMSolution(NamedTuple):
    """What :func:`pyloss.analysis.ufm_minimizer` finds: float64, one entry for each of K classes
    where nothing else is said.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.ufm_minimizer([30, 20, 10, 4], 5e-3, 5e-4).sigma
        tensor([5.3760, 4.3709, 3.0611, 1.8988], dtype=torch.float64)
    """

    #: Singular values of the product W_M .. W_1 H: of the classes, or, where classes mix (with a
    #: bias, or cross entropy), of the K directions that Y has, in falling order.
    sigma: Tensor
    value: Tensor  #: the least loss, 0-d
    w_norm2: Tensor  #: squared lengths of the rows of W_M .. W_1
    h_norm2: Tensor  #: squared length of the feature that all samples of a class have
    logits_diag: Tensor  #: the logit that a class gives to itself
    collapsed: Tensor  #: bool: sigma is 0 though there are samples


class LinearUFMOptimum(NamedTuple):
    """What :func:`pyloss.analysis.linear_ufm_optimum` finds: float64, one entry for each class.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.linear_ufm_optimum([40, 20, 10, 3], 1e-3, 1e-3)._fields
        ('t', 'w_norm', 'h_norm')
    """

    t: Tensor  #: the logit of the class; the others of the row are 0
    w_norm: Tensor  #: length of its row of W_M .. W_1
    h_norm: Tensor  #: length of its feature


# --------------------------------------------------------------------------------------------------
# Minima


def linear_ufm_optimum(
    counts: Sequence[int] | Tensor,
    lambda_w: float | Sequence[float],
    lambda_h: float,
    layers: int = 1,
) -> LinearUFMOptimum:
    r"""The optimum of M linear layers on free features: squared error, no bias, any class sizes.

    .. math:: t_k = \arg\min_{t \ge 0} \frac{n_k}{2 N} (t - 1)^2 + \frac{M + 1}{2}
              \Big(n_k \lambda_H \prod_j \lambda_{W_j}\Big)^{\frac{1}{M + 1}} t^{\frac{2}{M + 1}}

    With one layer :math:`t_k = \max(0, 1 - N \sqrt{\lambda_W \lambda_H / n_k})`. The rows of W are
    orthogonal, and the feature of a class lies along its row. The same minimum as
    :func:`pyloss.analysis.ufm_minimizer` gives, as lengths.

    Args:
        counts: samples n of each class, ``(K,)``, each > 0.
        lambda_w: weight decay, > 0, of all layers or of each.
        lambda_h: of the features, > 0.
        layers: M >= 1.

    Returns:
        :class:`pyloss.analysis.LinearUFMOptimum`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.linear_ufm_optimum([60, 30, 10], 1e-2, 1e-3).t
        tensor([0.9592, 0.9423, 0.9000], dtype=torch.float64)

    Reference:
        Dang et al. Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.
        arXiv 2301.00437.
    """
    n, decay = _checked(counts=counts, layers=layers, lambda_w=lambda_w, lambda_h=lambda_h)
    found = _of_squares(n, decay, float(lambda_h), bias=False)
    return LinearUFMOptimum(found.logits_diag, found.w_norm2.sqrt(), found.h_norm2.sqrt())


def ufm_minimizer(
    class_sizes: Sequence[int] | Tensor,
    lam_w: float | Sequence[float],
    lam_h: float,
    depth: int = 1,
    loss: str = "mse",
    bias: bool = False,
) -> UFMSolution:
    r"""The minimum of the unconstrained features model, in closed form.

    .. math:: \frac{\|W_M \cdots W_1 H - Y\|^2}{2 N} + \sum_j \frac{\lambda_{W_j}}{2} \|W_j\|^2 +
              \frac{\lambda_H}{2} \|H\|^2

    The singular values :math:`\sigma` of the product minimise, each for itself,

    .. math:: \frac{(\sigma - s)^2}{2 N} + \frac{M + 1}{2} c\, \sigma^{\frac{2}{M + 1}}, \qquad
              c = \Big(\lambda_H \prod_j \lambda_{W_j}\Big)^{\frac{1}{M + 1}}

    where s are the singular values of Y: :math:`\sqrt{n_k}` of class k. With one layer
    :math:`\sigma = \max(0, s - N c)`; with more there is no :math:`\sigma` between 0 and
    :math:`s (M - 1) / M`. Either way :math:`\sigma_k = 0` (minority collapse) when

    .. math:: N c\, n_k^{-\frac{M}{M + 1}} \ge \frac{1}{M}
              \Big(\frac{M - 1}{M}\Big)^{\frac{M - 1}{M + 1}}

    for one layer :math:`n_k \le N^2 \lambda_W \lambda_H`. Every hidden layer has K units or more.

    With a bias, which has no decay, the means of Y over the samples are taken off it, and s are the
    square roots of the eigenvalues of :math:`\mathrm{diag}(n) - n n^\top / N`; for equal classes
    the minimum is a simplex ETF. Cross entropy has a closed form for one layer and equal classes n:
    logits of a scaled ETF, in which the label's is above the others by

    .. math:: \log(1 / \kappa - K + 1), \qquad \kappa = \sqrt{n \lambda_W \lambda_H} < 1 / K

    and 0 otherwise.

    Args:
        class_sizes: samples n of each class, ``(K,)``, each > 0.
        lam_w: weight decay, > 0, of all layers or of each.
        lam_h: of the features, > 0.
        depth: M >= 1.
        loss: ``"mse"`` or ``"ce"``.
        bias: the last layer has one. For cross entropy it is 0 at the minimum.

    Returns:
        :class:`pyloss.analysis.UFMSolution`; the loss is :func:`pyloss.functional.ufm_loss`.

    Raises:
        TypeError: an argument of the wrong type. ValueError: one out of range; cross entropy of
            several layers or of unequal classes, which has no closed form.

    Example:
        >>> import pyloss
        >>> found = pyloss.analysis.ufm_minimizer([100, 100, 1], 5e-3, 1e-3, depth=2)
        >>> found.collapsed
        tensor([False, False,  True])

    Reference:
        Dang et al. Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data.
        arXiv 2301.00437. Cross entropy: Zhu et al. A Geometric Analysis of Neural Collapse with
        Unconstrained Features. arXiv 2105.02375.
    """
    n, decay = _checked(class_sizes=class_sizes, depth=depth, lam_w=lam_w, lam_h=lam_h)
    checks.check_one_of("loss", loss, ("mse", "ce"))
    bias = checks.checked_flag("bias", bias)
    if loss == "ce":
        return _of_cross_entropy(n, decay, float(lam_h))
    return _of_squares(n, decay, float(lam_h), bias)


def _of_squares(n: Tensor, decay: tuple[float, ...], lam_h: float, bias: bool) -> UFMSolution:
    total, depth = n.sum(), len(decay)
    centred = torch.diag(n)
    u, s2 = torch.eye(len(n), dtype=n.dtype, device=n.device), n
    if bias:
        centred = centred - torch.outer(n, n) / total
        s2, u = (t.flip(-1) for t in torch.linalg.eigh(centred))
        s2 = torch.cat([s2[:-1].clamp(min=0), torch.zeros_like(s2[-1:])])  # along the ones
    log_decay = sum(map(math.log, decay))  # of many layers the product may be 0
    c = math.exp((math.log(lam_h) + log_decay) / (depth + 1))
    t = _shrunk(total * c * s2 ** (-depth / (depth + 1)), depth)
    sigma = t * s2.sqrt()
    level = c * sigma ** (2 / (depth + 1))  # lam_W s_W^2 = lam_H s_H^2 of the balanced layers
    value = (s2 * (t - 1).square()).sum() / (2 * total) + (depth + 1) / 2 * level.sum()
    w2 = torch.exp(depth * level.log() - log_decay)  # squared singular values of W_M .. W_1
    # The columns of Y that belong to a class, in the directions u: diag(s)^-1 u^T (Y's column).
    there = s2 > 0
    right = torch.where(there, s2, 1.0).rsqrt() * there * (u.T @ centred).T / n.unsqueeze(1)
    logits = ((u * sigma) * right).sum(1) + (n / total if bias else 0.0)
    return UFMSolution(
        sigma,
        value,
        u.square() @ w2,
        right.square() @ (level / lam_h),
        logits,
        there & (sigma == 0),
    )


def _shrunk(a: Tensor, depth: int) -> Tensor:
    """The minimising t in [0, 1] of (t - 1)^2 / 2 + (M + 1) / 2 a t^(2 / (M + 1)).

    Its derivative is 0 where (1 - t) t^p = a, p = (M - 1) / (M + 1). At the larger root the value
    is below that of t = 0 exactly if t > (M - 1) / M, beyond which the left side falls: so the
    comparison is one of a, and the root is found by bisection, of 1 - t, which may be small.
    """
    if depth == 1:
        return (1 - a).clamp(min=0)
    p = (depth - 1) / (depth + 1)
    low, high = torch.zeros_like(a), torch.full_like(a, 1 / depth)
    least = a >= high * (1 - high) ** p
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = middle * (1 - middle) ** p < a
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(least, 0.0, 1 - (low + high) / 2)


def _of_cross_entropy(n: Tensor, decay: tuple[float, ...], lam_h: float) -> UFMSolution:
    if len(decay) > 1:
        raise ValueError(f"cross entropy has a closed form for depth 1 alone, got {len(decay)}")
    if bool((n != n[0]).any()):
        raise ValueError(
            f"cross entropy has a closed form for equal class sizes alone, got {n.tolist()}"
        )
    classes, (lam_w,) = len(n), decay
    kappa = (n[0] * lam_w * lam_h).sqrt()
    gap = torch.log((1 / kappa - (classes - 1)).clamp(min=1))
    sigma = gap * n.sqrt()
    sigma[-1] = 0  # along the ones
    norm = sigma.sum() / classes  # squares of W's rows, but for the decays
    return UFMSolution(
        sigma,
        torch.log1p((classes - 1) * torch.exp(-gap)) + (classes - 1) * kappa * gap,
        (norm * math.sqrt(lam_h / lam_w)).expand(classes).clone(),
        norm * math.sqrt(lam_w / lam_h) / n,
        (gap * (classes - 1) / classes).expand(classes).clone(),
        (gap == 0).expand(classes).clone(),
    )


def _checked(**given) -> tuple[Tensor, tuple[float, ...]]:
    """Class sizes and the decay of each layer, of four arguments by the names that they have."""
    (sizes_name, sizes), (depth_name, depth), (w_name, lam_w), (h_name, lam_h) = given.items()
    n = _class_sizes(sizes_name, sizes)
    depth = checks.checked_count(depth_name, depth, 1)
    decay = checked_decay(w_name, lam_w, depth, positive=True)
    checks.check_range(h_name, lam_h, 0.0, open_low=True)
    return n, decay


def _class_sizes(name: str, sizes) -> Tensor:
    given = sizes.detach() if isinstance(sizes, Tensor) else sizes
    try:
        found = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be numbers of samples, got {sizes!r}") from None
    if found.dim() != 1 or not found.numel():
        raise ValueError(f"{name} must be (K,), got {list(found.shape)}")
    if not bool(((found > 0) & found.isfinite()).all()):
        raise ValueError(f"{name} must be finite and > 0, got {found.tolist()}")
    return found


# --------------------------------------------------------------------------------------------------
# Frames


def simplex_etf(num_classes: int, dim: int | None = None) -> Tensor:
    r"""A simplex equiangular tight frame: K unit vectors that point away from each other.

    .. math:: m_i^\top m_j = -\frac{1}{K - 1} \quad (i \ne j), \qquad \sum_i m_i = 0

    Args:
        num_classes: K >= 2.
        dim: of the vectors, >= K - 1; default: K - 1.

    Returns:
        ``(K, dim)``, float64, one vector a row; always the same.

    Raises:
        TypeError: no integers. ValueError: out of range.

    Example:
        >>> import pyloss
        >>> m = pyloss.analysis.simplex_etf(3)
        >>> m @ m.T
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]], dtype=torch.float64)

    Reference:
        Papyan, Han, Donoho. Prevalence of Neural Collapse during the Terminal Phase of Deep
        Learning Training. arXiv 2008.08186.
    """
    classes = checks.checked_count("num_classes", num_classes, 2)
    dim = classes - 1 if dim is None else checks.checked_count("dim", dim, classes - 1)
    # Column j of Helmert's matrix: 1 for the classes up to j, -j - 1 for the next one.
    at = torch.arange(classes - 1, dtype=torch.float64)
    row = torch.arange(classes).unsqueeze(1)
    columns = torch.where(row <= at, 1.0, torch.where(row == at + 1, -at - 1, 0.0))
    columns = columns * torch.rsqrt((at + 1) * (at + 2)) * math.sqrt(classes / (classes - 1))
    return torch.nn.functional.pad(columns, (0, dim - classes + 1))


def gof(lengths: Sequence[float] | Tensor, dim: int | None = None) -> Tensor:
    r"""A general orthogonal frame: orthogonal vectors of given lengths.

    .. math:: m_i^\top m_j = \ell_i^2\, \delta_{ij}

    What classifier and class means form at the minimum for unequal classes. Vectors of length 0 are
    those of collapsed classes.

    Args:
        lengths: of K vectors, >= 0.
        dim: of the vectors, >= K; default: K.

    Returns:
        ``(K, dim)``, float64, one vector a row.

    Raises:
        TypeError: no numbers. ValueError: lengths that are negative or no vector, dim out of range.

    Example:
        >>> import pyloss
        >>> found = pyloss.analysis.ufm_minimizer([30, 20, 10], 5e-3, 5e-4)
        >>> weight = pyloss.analysis.gof(found.w_norm2.sqrt(), dim=16)

    Reference:
        Dang et al. arXiv 2301.00437.
    """
    try:
        found = torch.as_tensor(lengths, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"lengths must be numbers, got {lengths!r}") from None
    if found.dim() != 1:
        raise ValueError(f"lengths must be (K,), got {list(found.shape)}")
    if bool((found < 0).any()):
        raise ValueError(f"lengths must be >= 0, got {found.tolist()}")
    classes = len(found)
    dim = classes if dim is None else checks.checked_count("dim", dim, classes)
    return torch.nn.functional.pad(torch.diag(found), (0, dim - classes))
