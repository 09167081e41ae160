"""Around the losses on aggregate responses: what is released, how large a bag should be, and what a
linear model learns from it. The loss itself is :func:`pyloss.functional.aggregate_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss import segment
from pyloss.functional import _checks as checks
from pyloss.functional._bags import bags_of
from pyloss.functional.aggregate import check_options
from pyloss.functional.segment import segment_reduce

__all__ = [
    "OptimalBagSize",
    "aggregate_risk",
    "dp_aggregate",
    "interpolated_least_squares",
    "optimal_bag_size",
]


def interpolated_least_squares(
    x: Tensor,
    bag_response: Tensor,
    bag_index: Tensor | None = None,
    *,
    bag_size: int | None = None,
    offsets: Tensor | None = None,
    rho: float = 0.5,
) -> Tensor:
    r"""The linear model of least :func:`pyloss.functional.aggregate_loss`, squared error.

    .. math:: \hat\theta = \arg\min_\theta \frac{1 - \rho}{m} \sum_a (\bar y_a - \bar x_a^\top
              \theta)^2 + \frac{\rho}{m} \sum_a \frac{1}{k_a} \sum_{i \in a} (\bar y_a -
              x_i^\top \theta)^2

    that of the smallest norm where there are several.

    Args:
        x: ``(n, d)``, floating. There is no intercept: give x a column of ones.
        bag_response: ``(m,)`` or, for several models, ``(m, r)``.
        bag_index, bag_size, offsets: one of them, as for the loss.
        rho: in [0, 1].

    Returns:
        ``(d,)`` or ``(d, r)``, of the dtype of ``x``; computed in float64. NaN if x has NaN or
        infinity.

    Raises:
        TypeError, RuntimeError, ValueError: as for the loss.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(200, 3)
        >>> y = (x @ torch.tensor([1.0, -2.0, 0.5])).view(-1, 4).mean(1)
        >>> pyloss.aggregate.interpolated_least_squares(x, y, bag_size=4, rho=0.0)
        tensor([ 1.0000, -2.0000,  0.5000])

    Reference:
        Javanmard et al. Learning from Aggregate responses. arXiv 2401.11081.
    """
    checks.check_floating("x", x)
    checks.check_floating("bag_response", bag_response)
    if x.dim() != 2:
        raise ValueError(f"x must be (n, d), got {list(x.shape)}")
    if bag_response.dim() not in (1, 2):
        raise ValueError(f"bag_response must be (m,) or (m, r), got {list(bag_response.shape)}")
    check_options(rho=rho)
    m = bag_response.shape[0]
    bags = bags_of(x, bag_index, bag_size, offsets, count=m)
    rows, y = bags.rows(checks.widened(x)), checks.widened(bag_response)
    y = y.unsqueeze(1) if y.dim() == 1 else y
    # The loss is a sum of squares of these rows: no product X^T X, which squares the condition.
    own = segment.segment_ids(bags.offsets, x.shape[0])
    of_bags = math.sqrt((1 - rho) / max(m, 1))
    of_rows = (rho / (max(m, 1) * checks.widened(bags.sizes()))).sqrt()[own].unsqueeze(1)
    left = torch.cat([of_bags * segment_reduce(rows, bags.offsets, "mean"), of_rows * rows])
    right = torch.cat([of_bags * y, of_rows * y[own]])
    there = left.isfinite().all()  # LAPACK refuses NaN
    theta = torch.linalg.pinv(torch.where(there, left, 0.0)) @ right
    theta = torch.where(there, theta, math.nan)
    return (theta.squeeze(1) if bag_response.dim() == 1 else theta).to(x.dtype)


def dp_aggregate(
    y: Tensor,
    bag_index: Tensor | None,
    epsilon: float,
    bound: float,
    generator: torch.Generator | None = None,
    *,
    bag_size: int | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    r"""Mean responses of bags that hide each response: label differential privacy.

    .. math:: \tilde y_a = \tfrac1{k_a} \textstyle\sum_{i \in a} \mathrm{clip}(y_i, \pm B) +
              \mathrm{Laplace}\left( \frac{2 B}{k_a\, \varepsilon} \right)

    One response moves the mean of its bag, and no other, by 2 B / k_a at most, so that what is
    released is epsilon-private in it. The inputs are not hidden, and every further release of the
    same responses adds its epsilon.

    .. warning:: A numerical experiment, not a tool that protects people: the random numbers are
       torch's, which are not secure, and the low bits of floating-point Laplace noise are known to
       give away what they should hide.

    Args:
        y: ``(n,)``, floating.
        bag_index: ``(n,)``, int32 or int64, in any order; None with one of ``bag_size`` and
            ``offsets``, as for :func:`pyloss.functional.aggregate_loss`. Bags are counted up to
            the largest index, which waits for a GPU.
        epsilon: > 0; math.inf: no noise.
        bound: B > 0, chosen without a look at the responses.
        generator: of the noise, on the device of ``y``; default: torch's own.

    Returns:
        ``(m,)``, of the dtype of ``y``, without a gradient.

    Raises:
        TypeError, RuntimeError, ValueError: as for the loss; epsilon or bound that is not above 0.

    Example:
        >>> import torch, pyloss
        >>> released = pyloss.aggregate.dp_aggregate(torch.rand(12), None, 1.0, 1.0, bag_size=4)
        >>> released.shape
        torch.Size([3])

    Reference:
        Javanmard et al. Learning from Aggregate responses. arXiv 2401.11081.
    """
    checks.check_floating("y", y)
    if y.dim() != 1:
        raise ValueError(f"y must be (n,), got {list(y.shape)}")
    _check_privacy(epsilon, bound)
    bags = bags_of(y, bag_index, bag_size, offsets)
    wide = checks.widened(y.detach())
    mean = segment_reduce(bags.rows(wide.clamp(-bound, bound)), bags.offsets, "mean")
    u = torch.empty_like(mean)
    u = (u.uniform_() if generator is None else u.uniform_(generator=generator)) - 0.5
    noise = -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 2**-54))
    return (mean + noise * (2 * bound / epsilon) / bags.sizes()).to(y.dtype)


def aggregate_risk(
    n: int,
    d: int,
    k: int,
    rho: float,
    s2: float,
    signal: float = 1.0,
    epsilon: float | None = None,
    bound: float | None = None,
    reps: int = 64,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Expected error of :func:`interpolated_least_squares` for Gaussian inputs.

    .. math:: E \|\hat\theta - \theta\|^2 = \tfrac1d \|\theta\|^2 E\, \mathrm{tr}\, B^\top B +
              k v\, E\, \mathrm{tr}\, A^{-1} W_1 A^{-1}, \qquad A = W_1 + \rho W_2, \quad
              B = I - A^{-1} W_1

    of y = <x, theta> + noise, x ~ N(0, I_d), in m = n / k bags, with independent W_1, W_2 ~
    Wishart_d(m), Wishart_d(n - m), and the variance v = s2 / k of a bag's noise, to which
    privacy adds 2 (2 B / (k epsilon))^2.

    Args:
        n, d: instances and features.
        k: size of the bags, a divisor of n.
        rho: in [0, 1]; without bags, k = 1, it does not matter.
        s2: >= 0, variance of the noise of a response.
        signal: ||theta||^2 >= 0.
        epsilon, bound: of :func:`dp_aggregate`, both or neither. Its truncation is left out.
        reps: draws of the matrices. With rho = 0 or k = 1 none: the expectation is known, and it
            is infinite for m from d - 1 to d + 1.
        generator: of the draws, of the CPU; default: torch's own.

    Returns:
        0-d, float64.

    Raises:
        TypeError, ValueError: an argument out of range.

    Example:
        >>> import pyloss
        >>> pyloss.aggregate.aggregate_risk(600, 20, 1, 0.0, 0.25, epsilon=1.0, bound=3.0)
        tensor(2.4957, dtype=torch.float64)

    Reference:
        Javanmard et al. Learning from Aggregate responses. arXiv 2401.11081. The formula is for
        finite n and d, by simulation; theirs is the limit.
    """
    n, d, k = (checks.checked_count(name, t, 1) for name, t in (("n", n), ("d", d), ("k", k)))
    if n % k:
        raise ValueError(f"k must divide n, {n}, got {k}")
    check_options(rho=rho)
    checks.check_range("s2", s2, 0.0)
    checks.check_range("signal", signal, 0.0)
    if (epsilon is None) != (bound is None):
        raise ValueError(f"give epsilon and bound, or neither, got {epsilon} and {bound}")
    v = s2 / k
    if epsilon is not None:
        _check_privacy(epsilon, bound)
        v += 2 * (2 * bound / (k * epsilon)) ** 2
    reps = checks.checked_count("reps", reps, 1)
    m = n // k
    if rho == 0 or k == 1:
        return torch.tensor(_bag_risk(d, m, k * v, signal), dtype=torch.float64)
    first, second = (_wishart(reps, d, df, generator) for df in (m, n - m))
    inverse = torch.linalg.pinv(first + rho * second, hermitian=True)
    product = inverse @ first
    bias = (torch.eye(d, dtype=torch.float64) - product).square().sum((1, 2)).mean()
    return signal / d * bias + k * v * (product * inverse).sum((1, 2)).mean()


def _bag_risk(d: int, m: int, variance: float, signal: float) -> float:
    """Of least squares on m rows N(0, I_d), the one of the smallest norm for m < d."""
    if m > d + 1:
        return d * variance / (m - d - 1)
    if m < d - 1:
        return signal * (d - m) / d + m * variance / (d - m - 1)
    return math.inf if variance > 0 else signal * max(0, d - m) / d


def _wishart(reps: int, d: int, df: int, generator: torch.Generator | None) -> Tensor:
    """(reps, d, d), by Bartlett's triangle, whose size does not grow with df."""
    if df < d:
        x = torch.randn((reps, df, d), dtype=torch.float64, generator=generator)
        return x.mT @ x
    half = (df - torch.arange(d, dtype=torch.float64)) / 2
    squares = 2 * torch._standard_gamma(half.expand(reps, d).contiguous(), generator=generator)
    lower = torch.randn((reps, d, d), dtype=torch.float64, generator=generator).tril(-1)
    lower = lower + torch.diag_embed(squares.sqrt())
    return lower @ lower.mT


class OptimalBagSize(NamedTuple):
    """What :func:`optimal_bag_size` finds.

    Example:
        >>> import pyloss
        >>> pyloss.aggregate.optimal_bag_size(60, 5, 0.0, 0.25).size
        1
    """

    size: int  #: of the least risk
    risk: Tensor  #: that risk, 0-d, float64
    sizes: Tensor  #: all sizes that were looked at, int64
    risks: Tensor  #: of each of them, float64


def optimal_bag_size(
    n: int,
    d: int,
    rho: float,
    s2: float,
    signal: float = 1.0,
    epsilon: float | None = None,
    bound: float | None = None,
    reps: int = 64,
    *,
    sizes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> OptimalBagSize:
    """The size of bags of least :func:`aggregate_risk`.

    Large bags have little noise, that of privacy above all, and are few: with ``rho > 0`` the
    best size lies between.

    Args:
        n, d, rho, s2, signal, epsilon, bound, reps, generator: as for :func:`aggregate_risk`.
        sizes: to choose from, divisors of n; None: all that leave more than d + 1 bags, or all of
            them if none does. With fewer bags and ``rho = 0`` the estimate is hardly more than 0,
            whose risk, the signal, may well be the least.

    Returns:
        :class:`OptimalBagSize`.

    Raises:
        TypeError, ValueError: as :func:`aggregate_risk`; no sizes.

    Example:
        >>> import torch, pyloss
        >>> found = pyloss.aggregate.optimal_bag_size(
        ...     600, 20, 0.2, 0.25, epsilon=1.0, bound=3.0,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> 1 < found.size < 60
        True

    Reference:
        Javanmard et al. Learning from Aggregate responses. arXiv 2401.11081.
    """
    n, d = checks.checked_count("n", n, 1), checks.checked_count("d", d, 1)
    if sizes is None:
        divisors = [k for k in range(1, n + 1) if n % k == 0]
        sizes = [k for k in divisors if n // k > d + 1] or divisors
    if len(sizes) == 0:
        raise ValueError("sizes must hold at least one number")
    risks = torch.stack(
        [
            aggregate_risk(n, d, k, rho, s2, signal, epsilon, bound, reps, generator=generator)
            for k in sizes
        ]
    )
    best = int(risks.argmin())
    return OptimalBagSize(int(sizes[best]), risks[best], torch.tensor(list(sizes)), risks)


def _check_privacy(epsilon: float, bound: float) -> None:
    checks.check_number("epsilon", epsilon)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    checks.check_range("bound", bound, 0.0, open_low=True)
