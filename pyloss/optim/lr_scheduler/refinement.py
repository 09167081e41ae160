"""The refined schedule: learning rates that are best for the gradient norms of an earlier run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional import _checks as checks

NORMS = ("l1", "l2")
MODES = ("closed", "optimal")


def refine_schedule(
    grad_norms: Tensor | Sequence[float],
    *,
    norm: str = "l2",
    smoothing: float = 0.1,
    weights: Tensor | Sequence[float] | None = None,
    mode: str = "closed",
) -> Tensor:
    r"""The schedule of learning rates that the gradient norms of an earlier run ask for.

    .. math::
        \eta_t \propto w_t \sum_{p > t} w_p, \qquad
        w_t = G_t^{-2} \ (\text{SGD, L2 norm}) \quad \text{or} \quad w_t = 1 / G_t \
        (\text{as Adam steps, L1 norm})

    divided by its largest value. Large gradients at the beginning become a warm-up, and constant
    ones the linear decay. ``mode="optimal"`` minimises the bound of the last iterate itself, of
    which the formula above is a good guess, over :math:`\lambda_t > 0`, with
    :math:`S_k = \sum_{t \ge k} \lambda_t`:

    .. math::
        \frac{1}{2 S_1} \Big(1 + \sum_t \frac{\lambda_t^2}{w_t}\Big) + \frac12 \sum_{k < T}
        \frac{\lambda_k}{S_k S_{k+1}} \sum_{t \ge k} \frac{\lambda_t^2}{w_t}

    Args:
        grad_norms: G, one number for each step of the run, ``(T,)``, of any floating dtype and on
            any device, or a sequence of numbers. Infinite ones, of steps that a gradient scaler
            skipped, are left out.
        norm: ``"l2"`` or ``"l1"``: which norm G is, and so which weights.
        smoothing: in [0, 1]: share of the run that a running median of G looks at.
        weights: w, ``(T,)``, finite and > 0, in the place of those of the norm. Nothing is smoothed
            then.
        mode: ``"closed"``, or ``"optimal"``: some hundred steps of L-BFGS of O(T) each.

    Returns:
        ``(T,)``, float64, on the CPU: multipliers in [0, 1] of the peak learning rate, which is
        yours to find. The last one is 0 with ``"closed"``.

    Raises:
        TypeError: norms that are no numbers.
        ValueError: fewer than two norms; NaN, or norms below 0; none above 0; weights of another
            length; norms or weights that are too far apart; an option out of range. Norms that are
            0 count as the smallest one above, with a warning.

    Example:
        >>> import torch
        >>> from pyloss.optim.lr_scheduler import refine_schedule
        >>> refine_schedule([1.0, 1.0, 1.0, 1.0, 1.0], smoothing=0)
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
        >>> refine_schedule([8.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], smoothing=0)
        tensor([0.0205, 0.3125, 1.0000, 0.7500, 0.5000, 0.2500, 0.0000],
               dtype=torch.float64)

    Reference:
        Defazio, Cutkosky, Mehta, Mishchenko. When, Why and How Much? Adaptive Learning Rate
        Scheduling by Refinement. arXiv 2310.07831.
    """
    norms = _numbers("grad_norms", grad_norms)
    check_options(norm, smoothing, mode)
    if weights is not None:
        weights = _numbers("weights", weights)
        if weights.shape != norms.shape:
            raise ValueError(
                f"weights must have the shape of grad_norms, {list(norms.shape)}, got "
                f"{list(weights.shape)}"
            )
        if not (weights.isfinite() & (weights > 0)).all():
            raise ValueError("weights must be finite and > 0")
        weights = weights[norms != math.inf]
    norms = _usable(norms)
    if weights is None:
        norms = running_median(norms, smoothing)
        norms = norms / norms.min()  # weights of 1 and below
        weights = norms.square().reciprocal() if norm == "l2" else norms.reciprocal()
    rates = _closed(weights) if mode == "closed" else _optimal(weights)
    if not 0 < rates.max() < math.inf:
        raise ValueError("grad_norms or weights are too far apart for float64")
    return rates / rates.max()


def check_options(norm: str, smoothing: float, mode: str) -> None:
    checks.check_one_of("norm", norm, NORMS)
    checks.check_range("smoothing", smoothing, 0.0)
    if smoothing > 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
    checks.check_one_of("mode", mode, MODES)


def _numbers(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """(T,), float64, on the CPU."""
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor([float(value) for value in values], dtype=torch.float64)
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} must be a Tensor or numbers, got {type(values).__name__}"
            ) from None
    checks.check_floating(name, values)
    if values.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got the shape {list(values.shape)}")
    values = values.detach().to("cpu", torch.float64)
    if values.isnan().any():
        raise ValueError(f"{name} must not contain NaN")
    return values


def _usable(norms: Tensor) -> Tensor:
    """Finite and above 0, two or more."""
    if (norms < 0).any():
        raise ValueError(f"grad_norms must be >= 0, got {norms.min().item():g}")
    norms = norms[norms != math.inf]
    if len(norms) < 2:
        raise ValueError(f"grad_norms must hold two finite numbers or more, got {len(norms)}")
    zeros = norms == 0
    if zeros.all():
        raise ValueError("grad_norms must not all be 0")
    if zeros.any():
        least = norms[~zeros].min()
        warnings.warn(
            f"{int(zeros.sum())} of {len(norms)} grad_norms are 0; they count as the smallest one "
            f"above, {least.item():g}",
            stacklevel=3,
        )
        norms = norms.clamp_min(least)
    return norms


# --------------------------------------------------------------------------------------------------
# The running median


def running_median(x: Tensor, share: float) -> Tensor:
    """Over windows of about `share` of the numbers, centred: as wide as the rule of the paper.

    Beyond the right edge the numbers come again in reverse, so that the end keeps its trend; beyond
    the left edge there is the first one. O(T log T) for any width, since a window of a tenth of a
    run is long: ranks are sorted into a wavelet tree, bit by bit, and each window descends to the
    rank of its median.
    """
    half = int(share * len(x) // 2)
    if not half:
        return x
    values = torch.cat([x[:1].expand(half), x, x.flip(0)[:half]])
    ordered, places = values.sort(stable=True)
    ranks = torch.empty_like(places)
    ranks[places] = torch.arange(len(values))
    low = torch.arange(len(x))
    high, wanted, found = low + 2 * half + 1, torch.full_like(low, half), torch.zeros_like(low)
    for bit in reversed(range(len(values).bit_length())):
        ones = ranks.bitwise_right_shift(bit).bitwise_and(1)
        zeros_before = torch.cat([ones.new_zeros(1), (1 - ones).cumsum(0)])
        a, b = zeros_before[low], zeros_before[high]
        right = wanted >= b - a  # more numbers than those with a 0 here are below it
        zeros = zeros_before[-1]
        low, high = (torch.where(right, zeros + i - z, z) for i, z in ((low, a), (high, b)))
        wanted = torch.where(right, wanted - (b - a), wanted)
        found += right.long() << bit
        ranks = torch.cat([ranks[ones == 0], ranks[ones == 1]])
    return ordered[found]


# --------------------------------------------------------------------------------------------------
# Rates for weights


def _from_here(x: Tensor) -> Tensor:
    """Sums over t >= k."""
    return x.flip(0).cumsum(0).flip(0)


def _closed(weights: Tensor) -> Tensor:
    later = torch.cat([_from_here(weights)[1:], weights.new_zeros(1)])
    return weights * later / weights.sum()


def last_iterate_bound(rates: Tensor, weights: Tensor) -> Tensor:
    """Of the suboptimality of the last iterate, for a distance of 1 from the solution."""
    noise, total = _from_here(rates.square() / weights), _from_here(rates)
    last = (rates[:-1] / (total[:-1] * total[1:]) * noise[:-1]).sum()
    return 0.5 * ((1 + noise[0]) / total[0] + last)


def _optimal(weights: Tensor) -> Tensor:
    """The minimiser, as logarithms, so that the rates stay above 0; from the closed form on."""
    weights = weights / weights.mean()
    rates = _closed(weights)
    rates[-1] = rates[-2]
    # The bound is a / c + b c for rates that are c times as large: c of its minimum.
    rates = rates / (rates.sum() * 2 * last_iterate_bound(rates, weights) - 1).sqrt()
    logs = rates.log().requires_grad_()
    solver = torch.optim.LBFGS(
        [logs], max_iter=1000, max_eval=2000, history_size=20, tolerance_grad=1e-10,
        tolerance_change=1e-14, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        logs.grad = None
        bound = last_iterate_bound(logs.exp(), weights)
        bound.backward()
        return bound

    with torch.enable_grad():
        solver.step(closure)
    return logs.detach().exp()
