r"""Inductive bias: how rare it is to generalise, of what fits the training set (arXiv 2406.15941).

.. math:: I(\epsilon) = -\log P_{h \sim p_h}\big(L_{test}(h) \le \epsilon\big)

in nats, for hypotheses h that fit the training set: networks trained from random weights, or draws
of the posterior of a Gaussian process. Everything is float64, logarithms of probabilities are right
however small they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.analysis._ncx2_fit import fit_ncx2
from pyloss.analysis._numbers import as_constants
from pyloss.analysis._root import increasing_root
from pyloss.functional import _checks as checks

__all__ = [
    "InductiveBias",
    "chi2_mixture_logcdf",
    "gp_inductive_bias",
    "inductive_bias",
    "ncx2_logcdf",
]

METHODS = ("ncx2", "empirical")
GP_METHODS = ("saddlepoint", "ncx2")
_CHUNK = 1 << 21  # numbers in an array at once
_FEWEST = 8  # losses that a distribution of three parameters is fitted to
_NEAR = 2e-7  # the saddlepoint formula is 0 / 0 at the mean: a series where its last term is less
_TERMS = 1 << 20  # of the sum of a distribution function; for more the saddlepoint is as exact


class InductiveBias(NamedTuple):
    """What :func:`pyloss.analysis.inductive_bias` and :func:`pyloss.analysis.gp_inductive_bias`
    find: float64. :func:`pyloss.visualize.draw_inductive_bias` draws it.

    Example:
        >>> import torch, pyloss.analysis
        >>> found = pyloss.analysis.inductive_bias(torch.rand(500) + 0.5, 0.3)
        >>> bits = found.nats / torch.tensor(2.0).log()
    """

    nats: Tensor  #: of the shape of the target
    df: Tensor  #: degrees of freedom of the fitted distribution, 0-d; NaN where none is fitted
    nc: Tensor  #: its noncentrality
    scale: Tensor  #: its scale


# --------------------------------------------------------------------------------------------------
# From losses


def inductive_bias(
    losses: Tensor, target: float | Tensor, *, method: str = "ncx2"
) -> InductiveBias:
    r"""Information needed to generalise as well as a target, from test losses of hypotheses.

    .. math:: I(\epsilon) = -\log P(L \le \epsilon), \qquad
              L \sim s\, \chi'^2(\text{df}, \text{nc})

    with the scaled noncentral chi-square distribution of the greatest likelihood, which reaches
    beyond the losses that were seen. It is a model: for what a Gaussian process draws, whose
    distribution is known, it may be a third off far out in the tail
    (:func:`pyloss.analysis.gp_inductive_bias` is not).

    Args:
        losses: test losses of hypotheses that were drawn independently and fit the training set,
            ``(S,)``, S >= 8, positive and not all equal; for ``"empirical"`` non-negative.
        target: epsilon, a number or a tensor of any shape.
        method: ``"ncx2"``; or ``"empirical"``: the share of losses that are no larger, infinite
            nats where none is.

    Returns:
        :class:`pyloss.analysis.InductiveBias`; nats of the shape of ``target``, infinite for a
        target <= 0.

    Raises:
        TypeError, ValueError: losses that do not fit, an unknown method.

    Example:
        >>> import torch, pyloss.analysis
        >>> losses = torch.linspace(-2, 2, 100).exp()
        >>> pyloss.analysis.inductive_bias(losses, torch.tensor([1.0, 0.1])).nats
        tensor([0.8484, 2.8343], dtype=torch.float64)

    Reference:
        Boopathy, Yue, Hwang, Iyer, Fiete. Towards Exact Computation of Inductive Bias. arXiv
        2406.15941.
    """
    checks.check_one_of("method", method, METHODS)
    checks.check_floating("losses", losses)
    if losses.dim() != 1 or losses.numel() < _FEWEST:
        raise ValueError(f"losses must be (S,), S >= {_FEWEST}, got {list(losses.shape)}")
    losses = losses.detach().double()
    target = as_constants("target", target, losses.device)
    if bool((losses < 0).any()):
        raise ValueError(f"losses must be >= 0, got {float(losses.min()):g}")
    if bool(losses.isinf().any()):
        raise ValueError("losses must be finite")
    none = losses.new_tensor(math.nan)
    if bool(losses.isnan().any()):
        return InductiveBias(torch.full_like(target, math.nan), none, none, none)
    if method == "empirical":
        ranked = losses.sort().values
        share = torch.searchsorted(ranked, target, right=True).double() / losses.numel()
        nats = torch.where(target.isnan(), target, -share.log())
        return InductiveBias(nats, none, none, none)
    low, high = losses.aminmax()
    if bool(low == 0) or bool(low == high):
        raise ValueError(
            f"losses must be positive and differ for method='ncx2', got {float(low):g} to "
            f"{float(high):g}"
        )
    df, nc, scale = fit_ncx2(losses)
    return InductiveBias(-ncx2_logcdf(target, df, nc, scale), df, nc, scale)


# --------------------------------------------------------------------------------------------------
# The noncentral chi-square distribution


def ncx2_logcdf(
    x: float | Tensor,
    df: float | Tensor,
    nc: float | Tensor,
    scale: float | Tensor = 1.0,
) -> Tensor:
    r"""log of the distribution function of scaled noncentral chi-square, however small.

    .. math:: P(s X \le x) = \sum_{i \ge 0} \frac{e^{-y} y^{a + i}}{\Gamma(a + i + 1)}
              \sum_{j \le i} \frac{e^{-h} h^j}{j!}, \quad a = \tfrac{df}{2},\ y = \tfrac{x}{2 s},
              \ h = \tfrac{nc}{2}

    All terms are positive, so that their logarithms add up without a loss, far out in the lower
    tail too. There are about max(x / s, nc) / 2 of them.

    Args:
        x: any shape.
        df: > 0, one number.
        nc: >= 0, one number.
        scale: > 0, one number.

    Returns:
        float64, of the shape of ``x``; -inf for x <= 0.

    Raises:
        TypeError, ValueError: no numbers, numbers out of range.

    Example:
        >>> import torch, pyloss.analysis
        >>> pyloss.analysis.ncx2_logcdf(torch.tensor([1e-9, 1.0, 20.0]), df=10, nc=5)
        tensor([-114.3696,  -10.9645,   -0.2210], dtype=torch.float64)

    Reference:
        Johnson, Kotz, Balakrishnan. Continuous Univariate Distributions, volume 2, chapter 29.
    """
    device = x.device if isinstance(x, Tensor) else None
    x = as_constants("x", x, device)
    df, nc, scale = (
        checks.one_number(name, as_constants(name, value, x.device))
        for name, value in (("df", df), ("nc", nc), ("scale", scale))
    )
    for name, value, bad, must in (
        ("df", df, df <= 0, "> 0"),
        ("nc", nc, nc < 0, ">= 0"),
        ("scale", scale, scale <= 0, "> 0"),
    ):
        if bool(bad) or bool(value.isinf()):
            raise ValueError(f"{name} must be finite and {must}, got {float(value):g}")
    a, h = df / 2, nc / 2
    y = (x / (2 * scale)).reshape(-1)
    inside = (y > 0) & y.isfinite() & ~(a + h).isnan()
    # e_i has its largest terms at y - a, its product with the inner sum there or at the root below.
    some = torch.where(inside, y, 1.0)
    peak = torch.maximum((some - a).clamp(min=0), (-a + (a * a + 4 * h * some).sqrt()) / 2)
    last = (peak + 12 * (peak + a + 1).sqrt() + 60).nan_to_num(0.0)
    many = last > _TERMS
    found = torch.empty_like(y)
    if bool(many.any()):
        one = torch.ones_like(nc).reshape(1)
        found[many] = _saddlepoint(2 * some[many], one, nc * one, df * one)
    if not bool(many.all()):
        found[~many] = _poisson_sum(some[~many], a, h, int(last[~many].max()))
    return _with_ends(y + 0 * (a + h), found, inside).reshape(x.shape)


def _poisson_sum(y: Tensor, a: Tensor, h: Tensor, last: int) -> Tensor:
    i = torch.arange(last + 1, dtype=torch.float64, device=y.device)
    inner = torch.logcumsumexp(torch.xlogy(i, h) - h - torch.lgamma(i + 1), 0)
    inner = inner - torch.lgamma(a + i + 1)
    found = [
        torch.logsumexp((a + i) * part.log().unsqueeze(1) - part.unsqueeze(1) + inner, 1)
        for part in y.split(max(1, _CHUNK // (last + 1)))
    ]
    return torch.cat(found).clamp(max=0)


def _with_ends(x: Tensor, found: Tensor, inside: Tensor) -> Tensor:
    """log of a distribution function on (0, inf): what was found inside, and what is so outside."""
    ends = torch.where(x <= 0, -math.inf, torch.where(x > 0, 0.0, x))
    return torch.where(inside, found, ends)


# --------------------------------------------------------------------------------------------------
# Sums of squares of normal numbers


def chi2_mixture_logcdf(
    x: float | Tensor,
    weights: Tensor,
    shift: float | Tensor = 0.0,
    offset: float = 0.0,
) -> Tensor:
    r"""log of the distribution function of a weighted sum of squares, by a saddlepoint.

    .. math::
        X &= \sum_j a_j (z_j + b_j)^2 + c, \quad z_j \sim N(0, 1), \qquad
        K(s) = s c - \tfrac12 \sum_j \log(1 - 2 s a_j) + \sum_j \frac{a_j b_j^2 s}{1 - 2 s a_j} \\
        P(X \le x) &\approx \Phi(w) + \phi(w) \Big(\frac1w - \frac1v\Big), \quad
        K'(s) = x, \quad w = \pm \sqrt{2 (s x - K(s))}, \quad v = s \sqrt{K''(s)}

    the formula of Lugannani and Rice, in logarithms, and as a series near the mean, where it is
    0 / 0. The error is relative to the probability also far out: in the lower tail below 0.1 % of
    the logarithm for ten equal weights, up to 0.14 nats for a single one.

    Args:
        x: any shape.
        weights: :math:`a_j \ge 0`, ``(d,)``.
        shift: :math:`b_j`, ``(d,)`` or a number.
        offset: c.

    Returns:
        float64, of the shape of ``x``, <= 0; -inf for x <= c, with a positive weight.

    Raises:
        TypeError, ValueError: tensors that do not fit, negative weights.

    Example:
        >>> import torch, pyloss.analysis
        >>> pyloss.analysis.chi2_mixture_logcdf(torch.tensor([0.1, 5.0, 20.0]), torch.ones(10))
        tensor([-19.7989,  -2.2177,  -0.0297], dtype=torch.float64)

    Reference:
        Lugannani, Rice. Saddle point approximation for the distribution of the sum of independent
        random variables. 1980.
    """
    checks.check_floating("weights", weights)
    if weights.dim() != 1:
        raise ValueError(f"weights must be (d,), got {list(weights.shape)}")
    weights = weights.detach().double()
    if bool(((weights < 0) | weights.isinf()).any()):
        raise ValueError("weights must be finite and >= 0")
    shift = as_constants("shift", shift, weights.device)
    if shift.dim() and shift.shape != weights.shape:
        raise ValueError(
            f"shift must be a number or of the shape of weights, {list(weights.shape)}, got "
            f"{list(shift.shape)}"
        )
    offset = checks.one_number("offset", as_constants("offset", offset, weights.device))
    x = as_constants("x", x, weights.device)
    # a NaN among the weights is kept
    kept = weights != 0
    a, squared = weights[kept], (weights * shift.square()).expand_as(weights)[kept]
    excess = (x - offset).reshape(-1)
    if a.numel() == 0:
        return torch.where(excess >= 0, 0.0, torch.where(excess < 0, -math.inf, excess)).reshape(
            x.shape
        )
    inside = (excess > 0) & excess.isfinite()
    parts = torch.where(inside, excess, 1.0).split(max(1, _CHUNK // a.numel()))
    found = torch.cat([_saddlepoint(part, a, squared, torch.ones_like(a)) for part in parts])
    return _with_ends(excess, found, inside).reshape(x.shape)


def _saddlepoint(x: Tensor, a: Tensor, squared: Tensor, count: Tensor) -> Tensor:
    """Of x > 0, ``(T,)``, with a_j, a_j times the sum of b_j^2 and how often there is each a_j.

    The unknown is rho = -log(1 - 2 s), with max a as the unit, which is 0 at the mean; K' is close
    to a power of its exponential.
    """
    most = a.max()
    x, a, squared = x / most, a / most, squared / most
    mean = count @ a + squared.sum()

    def shrunk(rho: Tensor) -> tuple[Tensor, Tensor]:
        """s, and 1 / (1 - 2 s a_j)."""
        return -torch.expm1(-rho) / 2, 1 / (1 + a * torch.expm1(-rho).unsqueeze(1))

    def function(rho: Tensor) -> tuple[Tensor, Tensor]:
        s, r = shrunk(rho)
        first = r @ (count * a) + r.square() @ squared
        second = 2 * (r.square() @ (count * a * a)) + 4 * (r**3 @ (a * squared))
        return (first / x).log(), second * (-rho).exp() / (2 * first)

    # K' - mean / (1 - 2 s)^2 has one sign on each side of the mean; 2 s K' is at most
    # d + sum b^2 / 4 in the lower tail, and K' >= 1 / (1 - 2 s).
    middle = (x / mean).log() / 2
    most_s = (count.sum() / 2 + (squared / a).sum() / 8) / x
    far = torch.where(x < mean, -torch.log1p(2 * most_s), x.log())
    rho = increasing_root(
        function, torch.minimum(middle, far) - 1e-9, torch.maximum(middle, far) + 1e-9
    )
    s, r = shrunk(rho)
    k = r.log() @ count / 2 + s * (r @ squared)
    cumulants = [
        2.0 ** (m - 1)
        * math.factorial(m - 1)
        * (r**m @ (count * a**m) + m * (r ** (m + 1) @ (a ** (m - 1) * squared)))
        for m in range(2, 7)
    ]
    variance = cumulants[0]
    v = s * variance.sqrt()
    w = torch.sign(s) * (2 * (s * x - k)).clamp(min=0).sqrt()
    # Near the mean w^2 = v^2 (1 + v e), with the cumulants at s.
    r3, r4, r5, r6 = (c / variance ** (m / 2) for m, c in enumerate(cumulants[1:], 3))
    e = -r3 / 3 + v * (r4 / 12 + v * (-r5 / 60 + v * r6 / 360))
    near = (v**3 * r6).abs() / 120 < _NEAR * r3
    ve = torch.where(near, v * e, 0.0)
    series = e * torch.where(ve == 0, -0.5, torch.expm1(-torch.log1p(ve) / 2) / ve)
    w = torch.where(near, v * (1 + ve).sqrt(), w)
    apart = 1 / torch.where(near, 1.0, w) - 1 / torch.where(near, 1.0, v)
    between = torch.where(near, series, apart)
    # phi(w) (R(|w|) +- between), with Mills' ratio R: the lower tail, or what the upper one leaves.
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(w.abs() / math.sqrt(2))
    log_phi = -w * w / 2 - math.log(2 * math.pi) / 2
    lower = log_phi + (mills + between).log()
    upper = torch.log1p(-(log_phi.exp() * (mills - between)).clamp(0, 1))
    return torch.where(w < 0, lower, upper).clamp(max=0)


# --------------------------------------------------------------------------------------------------
# A Gaussian process


def gp_inductive_bias(
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    target: float | Tensor,
    *,
    method: str = "saddlepoint",
    samples: int = 10000,
    jitter: float = 1e-8,
    generator: torch.Generator | None = None,
) -> InductiveBias:
    r"""Information needed to generalise as well as a target, for draws of a Gaussian process.

    .. math:: f \sim N(K_* K^{-1} y,\ K_{**} - K_* K^{-1} K_*^T), \qquad
              L = \frac{1}{m c} \sum_{t, c} (f_{tc} - y_{tc})^2 = \sum_j a_j (z_j + b_j)^2 + c_0

    The hypotheses are those of the posterior, which go through the training set; the mean squared
    error of one is a weighted sum of squares of normal numbers, so that its distribution needs no
    samples: :func:`pyloss.analysis.chi2_mixture_logcdf`.

    Args:
        x: inputs of the training set, ``(n, ...)``, as the kernel takes them.
        y: its targets, ``(n,)`` or ``(n, c)``; outputs are independent, with the same kernel.
        x_test, y_test: m of them likewise.
        kernel: takes two sets of inputs and gives the matrix of their kernel.
        target: epsilon of the mean squared error, a number or a tensor of any shape.
        method: ``"saddlepoint"``; or ``"ncx2"``: draws losses and gives them to
            :func:`pyloss.analysis.inductive_bias`.
        samples: draws for ``"ncx2"``.
        jitter: added to the diagonal of the kernel matrix of the training set, times its mean.
        generator: of the draws.

    Returns:
        :class:`pyloss.analysis.InductiveBias`; df, nc and scale are NaN for ``"saddlepoint"``.

    Raises:
        TypeError, ValueError: tensors or options that do not fit, a kernel matrix that is not
            positive definite.

    Example:
        >>> import torch, pyloss.analysis
        >>> def rbf(a, b):
        ...     return torch.exp(-torch.cdist(a, b).square() / 2)
        >>> x, x_test = torch.linspace(0, 6, 7)[:, None], torch.linspace(0.3, 5.7, 20)[:, None]
        >>> found = pyloss.analysis.gp_inductive_bias(
        ...     x, x.sin()[:, 0], x_test, x_test.sin()[:, 0], rbf, torch.tensor([1e-2, 1e-3])
        ... )
        >>> found.nats
        tensor([0.1600, 2.0385], dtype=torch.float64)

    Reference:
        Boopathy, Yue, Hwang, Iyer, Fiete. Towards Exact Computation of Inductive Bias. arXiv
        2406.15941.
    """
    checks.check_one_of("method", method, GP_METHODS)
    if not callable(kernel):
        raise TypeError(f"kernel must be callable, got {type(kernel).__name__}")
    checks.check_range("jitter", jitter, 0.0)
    samples = checks.checked_count("samples", samples, _FEWEST)
    checks.check_generator(generator)
    x, x_test, y, y_test = _checked_data(x, y, x_test, y_test)
    target = as_constants("target", target, y.device)
    weights, shift, offset = _posterior_loss(x, y, x_test, y_test, kernel, jitter)
    if method == "saddlepoint":
        none = weights.new_tensor(math.nan)
        return InductiveBias(-chi2_mixture_logcdf(target, weights, shift, offset), none, none, none)
    chunk = max(1, _CHUNK // max(1, weights.numel()))
    losses = []
    for start in range(0, samples, chunk):
        rows = min(chunk, samples - start)
        z = torch.randn(rows, weights.numel(), generator=generator, dtype=torch.float64,
                        device=weights.device)  # fmt: skip
        losses.append((z + shift).square() @ weights + offset)
    return inductive_bias(torch.cat(losses), target)


def _posterior_loss(x, y, x_test, y_test, kernel, jitter: float) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, c) of the mean squared error of a draw of the posterior."""
    inner, cross, outer = kernel(x, x), kernel(x_test, x), kernel(x_test, x_test)
    n, m = len(x), len(x_test)
    for found, shape in ((inner, (n, n)), (cross, (m, n)), (outer, (m, m))):
        checks.check_floating("kernel(...)", found)
        if found.shape != shape:
            raise ValueError(
                f"kernel must give {list(shape)} for that many inputs, got {list(found.shape)}"
            )
    inner, cross, outer = (k.detach().double() for k in (inner, cross, outer))
    if any(bool(k.isnan().any()) for k in (inner, cross, outer)):  # LAPACK would raise
        unknown = y.new_full((1,), math.nan)
        return unknown, unknown, unknown[0]
    inner = inner + jitter * inner.diagonal().mean() * torch.eye(n, dtype=y.dtype, device=y.device)
    root, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed):
        raise ValueError(
            f"the kernel matrix of x is not positive definite with jitter={jitter:g}: raise it"
        )
    half = torch.linalg.solve_triangular(root, cross.T, upper=False)
    mean = half.T @ torch.linalg.solve_triangular(root, y, upper=False)
    values, vectors = torch.linalg.eigh(outer - half.T @ half)
    off = vectors.T @ (mean - y_test)  # (m, c)
    each = y_test.numel()
    # What is certain does not vary: its error is a constant.
    varies = values > values.abs().max() * m * torch.finfo(values.dtype).eps
    offset = off[~varies].square().sum() / each
    values, off = values[varies].unsqueeze(1), off[varies]
    weights = (values / each).expand_as(off)
    return weights.reshape(-1), (off / values.sqrt()).reshape(-1), offset


def _checked_data(x, y, x_test, y_test) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for name, t in (("x", x), ("y", y), ("x_test", x_test), ("y_test", y_test)):
        checks.check_floating(name, t)
        checks.check_has_dimension(name, t)
        if len(t) == 0:
            raise ValueError(f"{name} must not be empty")
        checks.check_device(name, t, x, "x")
    for name, t, inputs, rows in (("y", y, "x", len(x)), ("y_test", y_test, "x_test", len(x_test))):
        if t.dim() > 2 or len(t) != rows:
            raise ValueError(
                f"{name} must be ({rows},) or ({rows}, c) as {inputs}, got {list(t.shape)}"
            )
    if y.shape[1:] != y_test.shape[1:]:
        raise ValueError(
            f"y and y_test must have the same outputs, got {list(y.shape)} and {list(y_test.shape)}"
        )
    x, x_test = x.detach().double(), x_test.detach().double()
    y, y_test = (t.detach().double().reshape(len(t), -1) for t in (y, y_test))
    return x, x_test, y, y_test
