"""Learning rates as a function of the batch size, by random matrix theory (arXiv 2006.09092).

The Hessian of a batch is that of all data plus noise of P sigma^2 / b in the square of a row:

    lam' = lam + P sigma^2 / (b lam)   where lam > r = sqrt(P sigma^2 / b),   2 r below
    rate = 2 / lam'

b = B / (1 - B / N) is the effective batch of B out of N samples. Everything is float64, of tensors
or numbers, which are broadcast.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.analysis._numbers import as_constants
from pyloss.functional import _checks as checks
from pyloss.functional import _hessian as laws

__all__ = [
    "HessianNoise",
    "batch_extremal_eigenvalue",
    "effective_batch_size",
    "full_batch_eigenvalue",
    "hessian_noise",
    "max_learning_rate",
    "scale_lr",
]

OPTIMIZERS = ("sgd", "momentum", "adaptive")
CRITERIA = ("mean_square", "eigenvalue")
RULES = ("linear", "sqrt", "rmt")


class HessianNoise(NamedTuple):
    """Of :func:`pyloss.analysis.hessian_noise`; float64.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.hessian_noise(5.0, 8, 4.0)
        HessianNoise(lam=tensor(4., dtype=torch.float64), noise=tensor(32., dtype=torch.float64))
    """

    lam: Tensor  #: largest eigenvalue of the Hessian of all data
    noise: Tensor  #: P sigma^2


def effective_batch_size(batch_size: float | Tensor, population: float | None = None) -> Tensor:
    r"""The batch without replacement that is as noisy as a batch of independent samples.

    .. math:: b = \frac{B}{1 - B / N}

    Args:
        batch_size: B > 0, any shape.
        population: N >= B; None: endless, b = B.

    Returns:
        float64, of the shape of ``batch_size``; infinite at B = N.

    Raises:
        TypeError, ValueError: no number, one out of range.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.effective_batch_size(64, population=128)
        tensor(128., dtype=torch.float64)

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    batch = _positive("batch_size", batch_size)
    if population is None:
        return batch
    checks.check_range("population", population, 0.0, open_low=True)
    if bool((batch > population).any()):
        raise ValueError(
            f"batch_size must be at most the population, {population}, got {float(batch.amax()):g}"
        )
    return laws.effective_batch(batch, float(population))


def batch_extremal_eigenvalue(
    lam: float | Tensor,
    num_params: float | Tensor,
    batch_size: float | Tensor,
    sigma: float | Tensor,
    *,
    population: float | None = None,
) -> Tensor:
    r"""The largest eigenvalue of the Hessian of a batch.

    .. math:: \lambda' = \begin{cases} \lambda + \dfrac{P \sigma^2}{b \lambda} & \lambda > r \\
              2 r & \text{else} \end{cases}, \qquad r = \sigma \sqrt{P / b}

    Below the threshold the eigenvalue is that of the noise, the edge of its semicircle.

    Args:
        lam: lambda, of the Hessian of all data.
        num_params: P > 0.
        batch_size: B > 0.
        sigma: >= 0: standard deviation of an entry of one sample's Hessian.
        population: N, for batches that are drawn without replacement.

    Returns:
        float64, of the shape that the arguments have together.

    Raises:
        TypeError, ValueError: no number, one out of range.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.batch_extremal_eigenvalue(4.0, 1000, 10, 0.2)
        tensor(5., dtype=torch.float64)

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    lam = as_constants("lam", lam)
    noise = _positive("num_params", num_params) * _not_negative("sigma", sigma).square()
    return laws.spike(lam, noise, effective_batch_size(batch_size, population))


def full_batch_eigenvalue(
    lam_batch: float | Tensor,
    batch_size: float | Tensor,
    noise: float | Tensor,
    *,
    population: float | None = None,
) -> Tensor:
    r"""The largest eigenvalue of the Hessian of all data, from that of a batch.

    .. math:: \lambda = \tfrac12 \Big(\lambda' + \sqrt{\lambda'^2 - 4 P \sigma^2 / b}\Big)

    Args:
        lam_batch: lambda', as measured in a batch.
        batch_size: B of that.
        noise: P sigma^2 >= 0.
        population: N, for batches that are drawn without replacement.

    Returns:
        float64; where lambda' is no larger than that of the noise, lambda' / 2, which lambda is at
        most.

    Raises:
        TypeError, ValueError: no number, one out of range.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.full_batch_eigenvalue(5.0, 10, noise=40.0)
        tensor(4., dtype=torch.float64)

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    noise = _not_negative("noise", noise)
    batch = effective_batch_size(batch_size, population)
    return laws.unspike(as_constants("lam_batch", lam_batch), noise, batch)


def hessian_noise(
    lam_small: float | Tensor,
    small: float | Tensor,
    lam_large: float | Tensor,
    large: float | Tensor = math.inf,
    *,
    population: float | None = None,
) -> HessianNoise:
    r"""Noise of a Hessian, and its largest eigenvalue without that, from batches of two sizes.

    .. math:: P \sigma^2 = \lambda\, \frac{\lambda'_1 - \lambda'_2}{1 / b_1 - 1 / b_2}, \qquad
              \lambda = \lambda'_1 - \frac{\lambda'_1 - \lambda'_2}{1 - b_1 / b_2}

    That is the spike law, solved. Where the small batch is all noise by this result, its eigenvalue
    is 2 r instead; where both are, lambda is the largest that is possible. Take means over some
    batches of each size.

    Args:
        lam_small: largest eigenvalue in batches of ``small``.
        small: B_1.
        lam_large: of ``large``.
        large: B_2 > B_1; default: all data.
        population: N, for batches that are drawn without replacement.

    Returns:
        :class:`pyloss.analysis.HessianNoise`, ``(lam, noise)``. Noise of 0 where the smaller batch
        has the smaller eigenvalue.

    Raises:
        TypeError, ValueError: no number, one out of range; sizes in the wrong order.

    Example:
        >>> import pyloss
        >>> law = pyloss.analysis.batch_extremal_eigenvalue
        >>> sizes = [law(4.0, 1000, b, 0.2) for b in (10, 40)]
        >>> lam, noise = pyloss.analysis.hessian_noise(sizes[0], 10, sizes[1], 40)
        >>> f"{lam:.6f} {noise:.6f}"
        '4.000000 40.000000'

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    first, second = as_constants("lam_small", lam_small), as_constants("lam_large", lam_large)
    b1 = effective_batch_size(small, population)
    everything = isinstance(large, float) and large == math.inf
    b2 = b1.new_tensor(math.inf) if everything else effective_batch_size(large, population)
    if bool((b1 >= b2).any()):
        raise ValueError(f"small must be less than large, got {small} and {large}")
    slope = ((first - second) / (1 / b1 - 1 / b2)).clamp(min=0)  # noise / lam
    lam = torch.where(slope == 0, second, first - slope / b1)
    noise = slope * lam
    # By the spike law lam is above r; else the small batch shows 2 r.
    hidden = ~(lam.square() > noise / b1) & ~lam.isnan()
    edge = b1 * first.square() / 4
    noise = torch.where(hidden, edge, noise)
    lam = torch.where(hidden, laws.unspike(second, noise, b2), lam)
    return HessianNoise(lam, noise)


def max_learning_rate(
    lam: float | Tensor,
    batch_size: float | Tensor,
    noise: float | Tensor,
    *,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    damping: float = 0.0,
    criterion: str = "mean_square",
    population: float | None = None,
) -> Tensor:
    r"""The largest rate at which an optimiser is stable with batches of a size.

    .. math::
        \text{sgd} &: \frac{2}{\lambda + P \sigma^2 / (b \lambda)} \\
        \text{momentum} &: \frac{2 (1 + \mu)}{\lambda + \frac{1 + \mu}{1 - \mu}
        P \sigma^2 / (b \lambda)} \\
        \text{adaptive} &: \frac{2}{2 r} = \sqrt{b / (P \sigma^2)}

    SGD scales as B where b is far below :math:`P \sigma^2 / \lambda^2`, and stays at
    :math:`2 / \lambda` far above; an adaptive optimiser, which meets the noise of its
    preconditioned Hessian, scales as the square root.

    Args:
        lam: lambda > 0, the largest eigenvalue of the Hessian of all data.
        batch_size: B > 0.
        noise: P sigma^2 >= 0, of :func:`hessian_noise`.
        optimizer: ``"sgd"``, ``"momentum"`` (heavy ball, as torch's SGD) or ``"adaptive"``.
        momentum: mu in [0, 1), of ``"momentum"`` alone.
        damping: >= 0, added to the curvature.
        criterion: ``"mean_square"``: with a new batch in each step :math:`E \lVert x \rVert^2`
            stays bounded, on a quadratic of curvature lambda in all directions; the formulas above.
            ``"eigenvalue"``: :math:`2 (1 + \mu) / \lambda'`, with the eigenvalue of
            :func:`batch_extremal_eigenvalue`: one batch in all steps. Both agree without momentum
            and above the threshold, and without noise. No matter for ``"adaptive"``.
        population: N, for batches that are drawn without replacement.

    Returns:
        float64, of the shape that the arguments have together; infinite where nothing bounds it.

    Raises:
        TypeError, ValueError: no number, one out of range; an unknown option.

    Example:
        >>> import torch, pyloss
        >>> sizes = torch.tensor([1.0, 2.0, 4.0, 1e6])
        >>> pyloss.analysis.max_learning_rate(2.0, sizes, noise=400.0)
        tensor([0.0099, 0.0196, 0.0385, 0.9999], dtype=torch.float64)

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    lam = _not_negative("lam", lam)
    batch = effective_batch_size(batch_size, population)
    noise = _not_negative("noise", noise)
    checks.check_one_of("optimizer", optimizer, OPTIMIZERS)
    checks.check_one_of("criterion", criterion, CRITERIA)
    checks.check_range("damping", damping, 0.0)
    mu = laws.checked_momentum(momentum) if optimizer == "momentum" else 0.0
    if optimizer == "adaptive":
        return 2 / (2 * (noise / batch).sqrt() + damping + 0 * lam)
    if criterion == "eigenvalue":
        curvature = laws.spike(lam, noise, batch)
    else:
        curvature = laws.mean_square_curvature(lam, noise, batch, mu)
    return 2 * (1 + mu) / (curvature + damping)


def scale_lr(
    lr: float | Tensor,
    old_bs: float,
    new_bs: float,
    rule: str = "linear",
    *,
    lam: float | Tensor | None = None,
    noise: float | Tensor | None = None,
    population: float | None = None,
) -> float | Tensor:
    r"""The rate for batches of another size.

    .. math:: \text{linear}: \frac{B'}{B}, \qquad \text{sqrt}: \sqrt{B' / B}, \qquad
              \text{rmt}: \frac{\lambda + P \sigma^2 / (b \lambda)}
              {\lambda + P \sigma^2 / (b' \lambda)}

    times ``lr``. The last is linear in small batches and constant in large ones.

    Args:
        lr: >= 0, for batches of ``old_bs``.
        old_bs: B > 0.
        new_bs: B' > 0.
        rule: ``"linear"`` (SGD), ``"sqrt"`` (adaptive optimisers) or ``"rmt"``.
        lam: lambda > 0, of ``"rmt"``.
        noise: P sigma^2, likewise; of :func:`hessian_noise`.
        population: N, likewise.

    Returns:
        A number where all arguments are; a tensor of the dtype of ``lr`` if that is one, else
        float64.

    Raises:
        TypeError, ValueError: no number, one out of range; options of ``"rmt"`` that are missing or
            belong to no other rule.

    Example:
        >>> import pyloss
        >>> pyloss.analysis.scale_lr(0.1, 32, 128)
        0.4
        >>> pyloss.analysis.scale_lr(0.1, 32, 128, "rmt", lam=2.0, noise=64.0)
        0.1333...

    Reference:
        Granziol, Zohren, Roberts. arXiv 2006.09092.
    """
    checks.check_one_of("rule", rule, RULES)
    if isinstance(lr, Tensor):
        checks.check_floating("lr", lr)
    given = _not_negative("lr", lr)
    for name, size in (("old_bs", old_bs), ("new_bs", new_bs)):
        checks.check_range(name, size, 0.0, open_low=True)
    ratio = torch.tensor(new_bs / old_bs, dtype=torch.float64)
    if rule == "rmt":
        if lam is None or noise is None:
            raise ValueError(f"rule='rmt' needs lam and noise, got {lam} and {noise}")
        lam, noise = _positive("lam", lam), _not_negative("noise", noise)
        old, new = (laws.mean_square_curvature(lam, noise, effective_batch_size(b, population))
                    for b in (old_bs, new_bs))  # fmt: skip
        ratio = old / new
    elif not (lam is None and noise is None and population is None):
        raise ValueError(f"lam, noise and population are for rule='rmt', got rule={rule!r}")
    elif rule == "sqrt":
        ratio = ratio.sqrt()
    found = given * ratio.to(given.device)
    if isinstance(lr, Tensor):
        return found.to(lr.dtype)
    return found if found.dim() else found.item()


def _not_negative(name: str, value) -> Tensor:
    found = as_constants(name, value)
    if bool((found < 0).any()):
        raise ValueError(f"{name} must be >= 0, got {float(found.amin()):g}")
    return found


def _positive(name: str, value) -> Tensor:
    found = as_constants(name, value)
    if bool((found <= 0).any()):
        raise ValueError(f"{name} must be > 0, got {float(found.amin()):g}")
    return found
