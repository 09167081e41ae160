r"""Test and train error of kernel and random-feature ridge regression (arXiv 2311.14646).

A kernel has eigenvalues :math:`\lambda_i`, the target coefficients :math:`v_i` in its
eigenfunctions. Regression sees n samples with noise of variance :math:`\sigma^2` and k random
features, as many as wanted for the kernel itself. The errors are those to expect; float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.analysis._numbers import as_constants, as_numbers
from pyloss.analysis._root import increasing_root
from pyloss.functional import _checks as checks

__all__ = [
    "KernelEigensystem",
    "RFRisk",
    "kernel_eigensystem",
    "optimal_ridge",
    "powerlaw_fit_ratio",
    "rf_risk",
]

_CHUNK = 1 << 20  # settings times eigenvalues at once: 8 MiB each array
_GRID, _GOLDEN = 40, 30  # points of the search for a ridge, and steps between the best two of them


class RFRisk(NamedTuple):
    """What :func:`pyloss.analysis.rf_risk` finds: float64, of the common shape of n, k, ridge and
    noise. :func:`pyloss.visualize.draw_rf_risk` draws it.

    Example:
        >>> import torch, pyloss.analysis
        >>> i = torch.arange(1, 1001)
        >>> pyloss.analysis.rf_risk(i**-1.5, i**-1.8, n=64, k=torch.inf, ridge=1e-3).test
        tensor(0.0939, dtype=torch.float64)
    """

    test: Tensor  #: mean squared error of new samples, their noise included
    train: Tensor  #: mean squared error of the samples
    kappa: Tensor  #: ridge that the features leave to the kernel
    gamma: Tensor  #: eigenvalues above it are learnt
    z: Tensor  #: sum of the learnt fractions, at most min(n, k)
    q: Tensor  #: sum of their squares


class KernelEigensystem(NamedTuple):
    """What :func:`pyloss.analysis.kernel_eigensystem` finds: float64, by falling eigenvalue.

    Example:
        >>> import torch, pyloss.analysis
        >>> found = pyloss.analysis.kernel_eigensystem(torch.eye(4), torch.ones(4))
        >>> found.eigvals
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """

    eigvals: Tensor  #: ``(n,)``
    coeffs_sq: Tensor  #: ``(n,)``, of all targets; they add up to the mean square of y
    vectors: Tensor  #: ``(n, n)``, eigenfunctions at the samples, in columns of mean square 1


# --------------------------------------------------------------------------------------------------
# The risk


def rf_risk(
    eigvals: Tensor,
    coeffs_sq: Tensor,
    n: float | Tensor,
    k: float | Tensor = math.inf,
    *,
    ridge: float | Tensor = 0.0,
    noise: float | Tensor = 0.0,
) -> RFRisk:
    r"""Errors to expect of ridge regression on random features, or with the kernel itself.

    .. math::
        \sum_i \frac{\lambda_i}{\lambda_i + \gamma} + \frac{\delta}{\kappa} &= n, \qquad
        \sum_i \frac{\lambda_i}{\lambda_i + \gamma} + \frac{k \kappa}{\gamma} = k \\
        z &= \sum_i \frac{\lambda_i}{\lambda_i + \gamma}, \qquad
        q = \sum_i \Big(\frac{\lambda_i}{\lambda_i + \gamma}\Big)^2 \\
        E_{test} &= \frac{\sum_i \big(\frac{\gamma}{\lambda_i + \gamma} -
            \frac{\kappa \lambda_i}{(\lambda_i + \gamma)^2} \frac{k}{k - q}\big) v_i^2 + \sigma^2}
            {1 - \frac{q (k - 2 z) + z^2}{n (k - q)}}, \qquad
        E_{train} = \Big(\frac{n - z}{n}\Big)^2 E_{test}

    Differentiable, also twice, in everything but a choice of cases: the root is found without a
    graph and its derivatives come from the equation. Takes about ten arrays of max(M, 2^20)
    numbers at a time, some 100 MB for a million eigenvalues, whatever the number of settings; with
    a gradient more than thirty of the settings times M.

    Args:
        eigvals: :math:`\lambda_i \ge 0`, ``(M,)``, in any order.
        coeffs_sq: :math:`v_i^2`, ``(M,)``; of an eigenvalue of 0 it acts as noise.
        n: samples, > 0.
        k: features, > 0; infinite: the kernel.
        ridge: :math:`\delta \ge 0`, added to the kernel matrix, which for k features is their mean
            of k products; infinite: nothing is learnt.
        noise: :math:`\sigma^2 \ge 0`, variance in the targets.
            n, k, ridge and noise are numbers, or tensors that broadcast.

    Returns:
        :class:`pyloss.analysis.RFRisk`. Without a ridge :math:`z = \min(n, k)`, gamma is 0 where no
        more eigenvalues are positive, and the test error infinite where n = k.

    Raises:
        TypeError, ValueError: tensors that do not fit, numbers out of range. RuntimeError: shapes
            that do not broadcast, tensors on several devices.

    Example:
        >>> import torch, pyloss.analysis
        >>> i = torch.arange(1, 1001)
        >>> k = torch.tensor([32, 64, 128, torch.inf])
        >>> pyloss.analysis.rf_risk(i**-1.5, i**-1.8, n=64, k=k, ridge=1e-3).test
        tensor([0.4411, 1.2916, 0.2157, 0.0939], dtype=torch.float64)

    Reference:
        Simon, Karkada, Ghosh, Belkin. More is Better in Modern Machine Learning. arXiv 2311.14646.
    """
    lam, coeffs = _spectrum(eigvals, coeffs_sq)
    n, k, ridge, noise = _settings(lam, n, k, ridge, noise)
    shape = n.shape
    rows = [t.reshape(-1) for t in (n, k, ridge, noise)]
    chunk = max(1, _CHUNK // lam.numel())
    parts = [
        _risk(lam, coeffs, *part) for part in zip(*(t.split(chunk) for t in rows), strict=True)
    ]
    return RFRisk(*(torch.cat(field).reshape(shape) for field in zip(*parts, strict=True)))


def _risk(lam: Tensor, coeffs: Tensor, n: Tensor, k: Tensor, ridge: Tensor, noise: Tensor):
    """Fields of RFRisk of some settings, ``(S,)`` each.

    With A = n - z, B = k - z, g = gamma / (lam + gamma), p = 1 - g, y = z - q, rho = y / (B + y),

        n (1 - (q (k - 2 z) + z^2) / (n (k - q))) = A + y B / (B + y)
        g - kappa lam / (lam + gamma)^2 k / (k - q) = g^2 + rho p g

    Nothing there is a difference of close numbers, and nothing grows with k. A B / k = ridge /
    gamma gives A and B from each other: T is the smaller one.
    """
    never = ridge.isinf()
    delta = torch.where(never, 1.0, ridge)
    least, lack = torch.minimum(n, k), (1 - n / k).abs()
    rank = (lam > 0).sum()
    short = (delta == 0) & (rank <= least)  # gamma is 0
    with torch.no_grad():
        some = torch.where(short, 1.0, delta)
        u = _log_gamma(lam[lam > 0], n, k, some)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (lam, n, k, delta)):
        some = torch.where(short, 1.0, delta)
        for _ in range(2):  # each step doubles the order to which derivatives are right
            gamma = u.exp()
            p = lam / (lam + gamma.unsqueeze(1))
            t, slope = _smaller(some / gamma, lack, k)
            gone = p.sum(1) + t - least
            u = u - (gone - gone.detach()) / (slope - (p * (1 - p)).sum(1))
    free = least - rank
    by_rank = torch.where(short & (free > 0), free * (free / k + lack), 1.0)  # ridge / gamma
    gamma = torch.where(short, torch.where(free > 0, delta / by_rank, 0.0), u.exp())

    scale = lam + gamma.unsqueeze(1)
    empty = scale == 0
    scale = torch.where(empty, 1.0, scale)
    p, g = lam / scale, torch.where(empty, 1.0, gamma.unsqueeze(1) / scale)
    pg = p * g
    y, q = pg.sum(1), (p * p).sum(1)
    t = _smaller(delta / torch.where(gamma > 0, gamma, 1.0), lack, k)[0]
    t = torch.where(short, free + (g * (lam > 0)).sum(1), t)
    a = t + (n - k).clamp(min=0)
    b = t / k + (1 - n / k).clamp(min=0)  # B / k
    both = b + y / k
    both = torch.where(both == 0, 1.0, both)
    rho = y / k / both
    above = (g * g) @ coeffs + rho * (pg @ coeffs) + noise
    below = a + y * b / both
    safe = torch.where(below == 0, 1.0, below)
    worst = torch.where((above == 0) & (n != k), 0.0, math.inf)
    test = torch.where(below == 0, worst, n * above / safe)
    train = torch.where(below == 0, 0.0, a * a * above / (n * safe))
    nothing = coeffs.sum() + noise
    return (
        torch.where(never, nothing, test),
        torch.where(never, nothing, train),
        torch.where(never, math.inf, gamma * b),
        torch.where(never, math.inf, gamma),
        torch.where(never, 0.0, p.sum(1)),
        torch.where(never, 0.0, q),
    )


def _smaller(ratio: Tensor, lack: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """T >= 0 of T (T / k + lack) = ratio, which is ridge / gamma; and its slope in log gamma."""
    root = lack.square() + 4 * ratio / k
    zero = root == 0
    root = torch.where(zero, 1.0, root).sqrt()
    t = torch.where(zero, 0.0, 2 * ratio / (lack + root))
    return t, torch.where(zero, 0.0, -ratio / root)


def _log_gamma(lam: Tensor, n: Tensor, k: Tensor, ridge: Tensor) -> Tensor:
    """log gamma of z + T = min(n, k), for positive eigenvalues; ridge > 0 or enough of them.

    Each side is compared in logarithms, together with its distance from the number of eigenvalues:
    close to straight lines in log gamma, also where z is nearly that number.
    """
    least, lack, rank = torch.minimum(n, k), (1 - n / k).abs(), lam.numel()
    enough = rank > least
    gap = (rank - least).abs()

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        gamma = u.exp()
        scale = lam + gamma.unsqueeze(1)
        p, g = lam / scale, gamma.unsqueeze(1) / scale
        w, y = g.sum(1), (p * g).sum(1)
        t, slope = _smaller(ridge / gamma, lack, k)
        z = torch.where(enough, p.sum(1), 1.0) + t
        beyond = gap + t
        many = (least / z).log() + (w / beyond).log()
        many_slope = (y - slope) / z + y / w - slope / beyond
        few, few_slope = ((gap + w) / t).log(), y / (gap + w) - slope / t
        return torch.where(enough, many, few), torch.where(enough, many_slope, few_slope)

    inverse = torch.logsumexp(-lam.log(), 0)
    low = torch.where(enough, gap.log() - inverse, -math.inf)
    low = torch.maximum(low, (ridge / n).log())
    high = torch.maximum((2 * lam.sum() / least).log(), (4 * ridge / n).log())
    return increasing_root(function, low - 1, high + 1)


# --------------------------------------------------------------------------------------------------
# The best ridge


def optimal_ridge(
    eigvals: Tensor,
    coeffs_sq: Tensor,
    n: float | Tensor,
    k: float | Tensor = math.inf,
    *,
    noise: float | Tensor = 0.0,
) -> Tensor:
    r"""The ridge of the least test error.

    .. math:: \arg\min_{\delta \ge 0} E_{test}(n, k, \delta)

    by a search over gamma, which gives :math:`\delta = \gamma (1 - z / k) (n - z)` without a root:
    a grid, then a golden section about its best point. With the best ridge, more samples and more
    features never harm.

    Args:
        eigvals, coeffs_sq, n, k, noise: as for :func:`pyloss.analysis.rf_risk`.

    Returns:
        float64, of the common shape of n, k and noise, without a gradient: 0 where to interpolate
        is best, infinite where nothing can be learnt.

    Raises:
        As :func:`pyloss.analysis.rf_risk`.

    Example:
        >>> import torch, pyloss.analysis
        >>> i = torch.arange(1, 1001)
        >>> k = torch.tensor([32, 64, 128, torch.inf])
        >>> ridge = pyloss.analysis.optimal_ridge(i**-1.5, i**-1.8, n=64, k=k, noise=0.1)
        >>> pyloss.analysis.rf_risk(i**-1.5, i**-1.8, 64, k, ridge=ridge, noise=0.1).test
        tensor([0.4313, 0.3467, 0.2984, 0.2435], dtype=torch.float64)

    Reference:
        Simon, Karkada, Ghosh, Belkin. More is Better in Modern Machine Learning. arXiv 2311.14646.
    """
    lam, coeffs = (t.detach() for t in _spectrum(eigvals, coeffs_sq))
    n, k, _, noise = (t.detach() for t in _settings(lam, n, k, 0.0, noise))
    shape = n.shape
    chunk = max(1, _CHUNK // lam.numel())
    parts = zip(*(t.reshape(-1).split(chunk) for t in (n, k, noise)), strict=True)
    return torch.cat([_best_ridge(lam, coeffs, *part) for part in parts]).reshape(shape)


def _best_ridge(lam: Tensor, coeffs: Tensor, n: Tensor, k: Tensor, noise: Tensor) -> Tensor:
    def risk(u: Tensor) -> tuple[Tensor, Tensor]:
        """Test error and ridge by log gamma."""
        gamma = u.exp()
        scale = lam + gamma.unsqueeze(1)
        p, g = lam / scale, gamma.unsqueeze(1) / scale
        pg = p * g
        z, y = p.sum(1), pg.sum(1)
        a, b = (n - z).clamp(min=0), (1 - z / k).clamp(min=0)
        rho = y / k / (b + y / k)
        above = (g * g) @ coeffs + rho * (pg @ coeffs) + noise
        return n * above / (a + y * (1 - rho)), gamma * b * a

    positive = lam[lam > 0]
    learnable = (lam * coeffs).sum()
    if positive.numel() == 0 or bool(learnable == 0):
        nothing = torch.where(coeffs.sum() + noise == 0, 0.0, math.inf)
        return torch.where((n + k + noise + learnable).isnan(), math.nan, nothing)
    least = torch.minimum(n, k)
    few = positive.numel() <= least
    low = torch.where(
        few,
        positive.min().log() - 20,
        _log_gamma(positive, n, k, torch.where(few, 1.0, torch.zeros_like(n))),
    )
    # Beyond gamma of 1 / `weak` another shrinkage costs more signal than it saves of variance.
    total = coeffs.sum() + noise
    variance = total * (lam.square().sum() + lam.sum().square() / k) / n
    high = torch.maximum(lam.sum() / least, variance / learnable).log() + 7
    high = torch.maximum(high, low + 1)

    steps = torch.linspace(0, 1, _GRID, dtype=lam.dtype, device=lam.device)
    tests = torch.stack([risk(low + (high - low) * step)[0] for step in steps])
    best, width = tests.nan_to_num(nan=math.inf).argmin(0), (high - low) / (_GRID - 1)
    left = low + width * (best - 1).clamp(min=0)
    right = low + width * (best + 1).clamp(max=_GRID - 1)
    part = (3 - math.sqrt(5)) / 2
    inner, outer = left + part * (right - left), right - part * (right - left)
    inner_test, outer_test = risk(inner)[0], risk(outer)[0]
    for _ in range(_GOLDEN):
        lower = inner_test < outer_test
        left, right = torch.where(lower, left, inner), torch.where(lower, outer, right)
        fresh = torch.where(lower, left + part * (right - left), right - part * (right - left))
        fresh_test = risk(fresh)[0]
        inner, outer = torch.where(lower, fresh, outer), torch.where(lower, inner, fresh)
        inner_test, outer_test = (
            torch.where(lower, fresh_test, outer_test),
            torch.where(lower, inner_test, fresh_test),
        )
    found_test, found = risk((left + right) / 2)
    without = _risk(lam, coeffs, n, k, torch.zeros_like(n), noise)[0]
    return torch.where(without <= found_test * (1 + 1e-9), 0.0, found)


def powerlaw_fit_ratio(
    alpha: float | Tensor, beta: float | Tensor, s_rel: float | Tensor
) -> Tensor:
    r"""How well training data should be fit where spectrum and target are power laws.

    .. math:: \lambda_i = i^{-\alpha}, \quad v_i^2 = i^{-\beta}, \qquad
              \frac{E_{train}}{E_{test}} = (1 - r)^2, \quad
              r = \arg\min_{r \in (0, 1]} \frac{r^{1 - \beta} + \alpha s}{\alpha - r (\alpha - 1)}

    at the best ridge of kernel regression, for many samples. To interpolate is best just where
    :math:`s \le (\beta - \alpha) / (\alpha (\alpha - 1))`.

    Args:
        alpha: > 1.
        beta: in (1, 2 alpha + 1), where the error is of the tail of the target.
        s_rel: s >= 0, variance of the noise over the test error without noise and ridge.
            Numbers, or tensors that broadcast.

    Returns:
        The ratio, float64, of their common shape.

    Raises:
        TypeError, ValueError: no numbers, numbers out of range.

    Example:
        >>> import torch, pyloss.analysis
        >>> pyloss.analysis.powerlaw_fit_ratio(1.5, 2.2, torch.tensor([0.0, 0.5, 2.0]))
        tensor([0.0000, 0.0000, 0.0398], dtype=torch.float64)

    Reference:
        Simon, Karkada, Ghosh, Belkin. More is Better in Modern Machine Learning. arXiv 2311.14646.
    """
    device = next((t.device for t in (alpha, beta, s_rel) if isinstance(t, Tensor)), None)
    values = [as_constants(name, value, device)
              for name, value in (("alpha", alpha), ("beta", beta), ("s_rel", s_rel))]  # fmt: skip
    a, b, s = torch.broadcast_tensors(*values)
    _check("alpha", a, a <= 1, "> 1")
    _check("beta", b, (b <= 1) | (b >= 2 * a + 1), "in (1, 2 alpha + 1)")
    _check("s_rel", s, s < 0, ">= 0")

    # The derivative has the sign of an increasing function: r is 1, or where that is 0.
    def slope(r: Tensor) -> tuple[Tensor, Tensor]:
        power = (a - 1) * a * s * r.pow(b - 1)
        return power * r + (a - 1) * b * r - (b - 1) * a, b * (power + a - 1)

    inside = slope(torch.ones_like(a))[0] > 0
    found = increasing_root(slope, torch.zeros_like(a), torch.ones_like(a))
    fit = torch.where(inside, (1 - found).square(), 0.0)
    return torch.where((a + b + s).isnan(), math.nan, fit)


# --------------------------------------------------------------------------------------------------
# The eigensystem of data


def kernel_eigensystem(K: Tensor, y: Tensor) -> KernelEigensystem:
    r"""Eigenvalues of a kernel and coefficients of a target, estimated from samples.

    .. math:: K = n\, \Phi \Lambda \Phi^T / n, \quad \Phi^T \Phi = n I, \qquad
              v_i^2 = \sum_c \Big(\frac{1}{n} \Phi^T y\Big)_{ic}^2

    Take many more samples than the n that :func:`pyloss.analysis.rf_risk` is asked about: the
    estimates of small eigenvalues are rough. What rounding has made negative is 0.

    Args:
        K: symmetric, positive semi-definite, ``(n, n)``.
        y: targets, ``(n,)`` or ``(n, c)``, floating; one-hot for classes.

    Returns:
        :class:`pyloss.analysis.KernelEigensystem`.

    Raises:
        TypeError: no floating tensors. ValueError: shapes that do not fit, a matrix that is not
            symmetric or has negative eigenvalues.

    Example:
        >>> import torch, pyloss.analysis
        >>> x = torch.randn(300, 5)
        >>> kernel = torch.exp(-torch.cdist(x, x).square() / 2)
        >>> found = pyloss.analysis.kernel_eigensystem(kernel, x[:, 0])
        >>> risk = pyloss.analysis.rf_risk(found.eigvals, found.coeffs_sq, n=50, ridge=0.1)

    Reference:
        Simon, Karkada, Ghosh, Belkin. More is Better in Modern Machine Learning. arXiv 2311.14646.
    """
    checks.check_floating("K", K)
    checks.check_floating("y", y)
    if K.dim() != 2 or K.shape[0] != K.shape[1] or K.shape[0] == 0:
        raise ValueError(f"K must be (n, n), got {list(K.shape)}")
    n = K.shape[0]
    if y.dim() not in (1, 2) or y.shape[0] != n:
        raise ValueError(f"y must be ({n},) or ({n}, c), got {list(y.shape)}")
    checks.check_device("y", y, K, "K")
    rounding = torch.finfo(K.dtype).eps * n
    K, y = K.detach().double(), y.detach().double()
    size = K.abs().max()
    if not bool(size.isfinite()):
        raise ValueError("K must be finite")
    if bool((K - K.T).abs().max() > rounding * size):
        raise ValueError("K must be symmetric")
    values, vectors = torch.linalg.eigh((K + K.T) / 2)
    if bool(values[0] < -rounding * size * math.sqrt(n)):
        raise ValueError(
            f"K must be positive semi-definite, got an eigenvalue of {float(values[0]):g}"
        )
    vectors = vectors.flip(1)  # eigh gives rising ones, in columns
    coefficients = vectors.T @ y.reshape(n, -1)
    return KernelEigensystem(
        values.flip(0).clamp(min=0) / n,
        coefficients.square().sum(1) / n,
        vectors * math.sqrt(n),
    )


# --------------------------------------------------------------------------------------------------
# Arguments


def _spectrum(eigvals, coeffs_sq) -> tuple[Tensor, Tensor]:
    for name, t in (("eigvals", eigvals), ("coeffs_sq", coeffs_sq)):
        checks.check_floating(name, t)
        if t.dim() != 1 or t.numel() == 0:
            raise ValueError(f"{name} must be (M,), M > 0, got {list(t.shape)}")
        _check(name, t, (t < 0) | t.isinf(), "finite and >= 0")
    if eigvals.shape != coeffs_sq.shape:
        raise ValueError(
            f"eigvals and coeffs_sq must have the same length, got {eigvals.numel()} and "
            f"{coeffs_sq.numel()}"
        )
    checks.check_device("coeffs_sq", coeffs_sq, eigvals, "eigvals")
    return eigvals.double(), coeffs_sq.double()


def _settings(lam: Tensor, n, k, ridge, noise) -> tuple[Tensor, ...]:
    n, k, ridge, noise = (
        as_numbers(name, value, lam.device)
        for name, value in (("n", n), ("k", k), ("ridge", ridge), ("noise", noise))
    )
    _check("n", n, (n <= 0) | n.isinf(), "finite and > 0")
    _check("k", k, k <= 0, "> 0")
    _check("ridge", ridge, ridge < 0, ">= 0")
    _check("noise", noise, (noise < 0) | noise.isinf(), "finite and >= 0")
    return torch.broadcast_tensors(n, k, ridge, noise)


def _check(name: str, t: Tensor, bad: Tensor, must: str) -> None:
    if bool(bad.any()):
        raise ValueError(f"{name} must be {must}, got {float(t[bad][0]):g}")
