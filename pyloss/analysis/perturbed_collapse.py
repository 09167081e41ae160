"""Neural collapse near given features: the perturbed model, and the central path.

    f = |H W^T - Y|^2 / (2 N) + lam_W / (2 K) |W|^2 + beta / (2 N) |H - H_0|^2 + lam_H / (2 N) |H|^2

Features H are tied to those of an earlier layer, H_0 (arXiv 2210.16658). Everything is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _neural_collapse as collapse

__all__ = ["CentralPath", "PerturbedUFM", "central_path", "perturbed_ufm"]

_KEPT = 12  # steps that the next one is extrapolated from


class PerturbedUFM(NamedTuple):
    """What :func:`pyloss.analysis.perturbed_ufm` finds, in float64.

    Example:
        >>> import torch, pyloss
        >>> h0, y = torch.randn(20, 6), torch.arange(20) % 4
        >>> found = pyloss.analysis.perturbed_ufm(h0, y, lam_w=0.05, beta=0.1)
        >>> found.weight.shape, found.features.shape
        (torch.Size([4, 6]), torch.Size([20, 6]))
    """

    weight: Tensor  #: W (K, D)
    features: Tensor  #: H (N, D)
    value: Tensor  #: f, 0-d
    iterations: int
    change: float  #: of W in the last iteration, relative
    converged: bool  #: the change is no more than `tol`


class CentralPath(NamedTuple):
    """What :func:`pyloss.analysis.central_path` finds, in float64; T points of time.
    :func:`pyloss.visualize.draw_central_path` draws it.

    Example:
        >>> import torch, pyloss
        >>> h0, y = torch.randn(20, 6), torch.arange(20) % 4
        >>> pyloss.analysis.central_path(h0, y, lam_w=0.05, steps=10).time
        tensor([ 0.,  2.,  4.,  6.,  8., 10., 12., 14., 16., 18., 20.], dtype=torch.float64)
    """

    time: Tensor  #: (T,)
    value: Tensor  #: f of the best W, (T,)
    nc1: Tensor  #: tr(Sigma_W pinv(Sigma_B)) / K, (T,)
    nc1_trace: Tensor  #: tr(Sigma_W) / tr(Sigma_B), (T,)
    weight: Tensor  #: W at the end, (K, D)
    features: Tensor  #: H at the end, (N, D)


class _Model(NamedTuple):
    start: Tensor  # H_0 (N, D)
    labels: Tensor  # (N,)
    y: Tensor  # (N, K)
    ridge: float  # N lam_W / K: what the best W has beside H^T H
    beta: float
    lam_h: float

    def best_weight(self, gram: Tensor, cross: Tensor) -> Tensor:
        """W (K, D) of H^T H and Y^T H."""
        gram = gram + self.ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve(gram, cross, left=False)

    def value(self, weight: Tensor, features: Tensor) -> Tensor:
        fit = (features @ weight.T - self.y).square().sum()
        tied = self.beta * (features - self.start).square().sum()
        decay = self.ridge * weight.square().sum() + self.lam_h * features.square().sum()
        return (fit + tied + decay) / (2 * len(self.y))


def perturbed_ufm(
    features: Tensor,
    labels: Tensor,
    lam_w: float,
    beta: float,
    lam_h: float = 0.0,
    *,
    num_classes: int | None = None,
    tol: float = 1e-9,
    max_iter: int = 20_000,
) -> PerturbedUFM:
    r"""A minimum of the perturbed model: features that may leave the given ones, at a price.

    .. math:: \frac{1}{2 N} \|H W^\top - Y\|^2 + \frac{\lambda_W}{2 K} \|W\|^2 +
              \frac{\beta}{2 N} \|H - H_0\|^2 + \frac{\lambda_H}{2 N} \|H\|^2

    by turns, from :math:`H = H_0` on: both steps are exact, so the value never rises.

    .. math:: W = Y^\top H \Big(H^\top H + \tfrac{N}{K} \lambda_W I\Big)^{-1}, \qquad
              H = (Y W + \beta H_0) (W^\top W + (\beta + \lambda_H) I)^{-1}

    The samples enter through the inner products of H_0 and Y alone, so an iteration costs
    :math:`O((D + K)^2 D)`, however many there are. With a small :math:`\beta` features collapse,
    with a large one they stay. The problem is not convex: this is the minimum that H_0 leads to.

    Args:
        features: :math:`H_0` ``(N, D)``, floating.
        labels: classes from 0 on, ``(N,)``, integers.
        lam_w: > 0.
        beta: > 0.
        lam_h: >= 0.
        num_classes: K; default: the largest label and one.
        tol: of the relative change of W at which it stops.
        max_iter: iterations at most.

    Returns:
        :class:`pyloss.analysis.PerturbedUFM`; NaN, and not converged, of NaN.

    Raises:
        TypeError, ValueError: tensors that do not fit, an option out of range. IndexError: a label
            that is no class.

    Example:
        >>> import torch, pyloss
        >>> torch.manual_seed(0)
        <...>
        >>> h0, y = torch.randn(60, 10), torch.arange(60) % 4
        >>> near = [pyloss.analysis.perturbed_ufm(h0, y, 0.05, b).features for b in (1.0, 1e-2)]
        >>> before, after = (pyloss.metrics.nc1(h, y) for h in near)
        >>> bool(after < before)
        True

    Reference:
        Tirer, Huang, Niles-Weed. Perturbation Analysis of Neural Collapse. arXiv 2210.16658.
    """
    checks.check_range("beta", beta, 0.0, open_low=True)
    model = _model(features, labels, lam_w, beta, lam_h, num_classes)
    checks.check_range("tol", tol, 0.0)
    max_iter = checks.checked_count("max_iter", max_iter, 1)
    z = torch.cat([model.start, model.y], 1)
    weight, iterations, change = _by_turns(model, z.T @ z, tol, max_iter)
    found = z @ _mix(model, weight)
    value = model.value(weight, found)
    return PerturbedUFM(weight, found, value, iterations, change, change <= tol)


def _by_turns(model: _Model, gram: Tensor, tol: float, max_iter: int) -> tuple[Tensor, int, float]:
    """(W, iterations, relative change of W in the last one), of the inner products of [H_0, Y].

    The change falls slowly where beta is small, so each step is extrapolated from the last ones
    (Anderson), as far as that does not raise the value.
    """
    dim = model.start.shape[1]
    weight = model.best_weight(gram[:dim, :dim], gram[dim:, :dim])
    history: list[tuple[Tensor, Tensor]] = []  # of W after a turn, and its change
    least = torch.inf
    for iteration in range(1, max_iter + 1):
        value, turned = _turn(model, weight, gram)
        if history and value > least * (1 + 1e-12):  # extrapolated too far: back to the plain step
            weight, least = history[-1][0], torch.inf
            history.clear()
            continue
        least = value
        off = turned - weight
        change = float(off.norm() / turned.norm())
        if not change > tol:
            return turned, iteration, change
        history.append((turned, off))
        del history[:-_KEPT]
        weight = _extrapolated(history)
    return turned, max_iter, change


def _turn(model: _Model, weight: Tensor, gram: Tensor) -> tuple[float, Tensor]:
    """The value of a W with its best H, and the best W of that."""
    dim = len(gram) - len(weight)
    mix = _mix(model, weight)
    half = gram @ mix
    squares, cross = mix.T @ half, half[dim:]
    # 2 N f of the best H: |Y|^2 + beta |H_0|^2 - <Y W + beta H_0, H> + the decay of W.
    pull = (weight * cross).sum() + model.beta * half[:dim].diagonal().sum()
    value = gram[dim:, dim:].trace() + model.beta * gram[:dim, :dim].trace() - pull
    value = value + model.ridge * weight.square().sum()
    return float(value), model.best_weight(squares, cross)


def _extrapolated(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The combination of steps whose changes cancel best, with weights that add up to 1."""
    turned, off = history[-1]
    if len(history) == 1:
        return turned
    steps = torch.stack([(a - b[0]).flatten() for (a, _), b in zip(history[1:], history)], 1)
    turns = torch.stack([(b[1] - a).flatten() for (_, a), b in zip(history, history[1:])], 1)
    share = torch.linalg.pinv(turns, rtol=1e-12) @ off.flatten()
    return turned - (steps @ share).view_as(turned)


def _mix(model: _Model, weight: Tensor) -> Tensor:
    """(D + K, D): the best H is [H_0, Y] times this."""
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    a = weight.T @ weight + (model.beta + model.lam_h) * eye
    return torch.linalg.solve(a, torch.cat([model.beta * eye, weight]), left=False)


def central_path(
    features: Tensor,
    labels: Tensor,
    lam_w: float,
    steps: int = 400,
    step_size: float = 2.0,
    *,
    beta: float = 0.0,
    lam_h: float = 0.0,
    num_classes: int | None = None,
) -> CentralPath:
    r"""Follows features along the central path, where the classifier is the best one all the time.

    .. math:: \frac{d H}{d t} = -\nabla_H f(W^*(H), H), \qquad
              W^*(H) = Y^\top H \Big(H^\top H + \tfrac{N}{K} \lambda_W I\Big)^{-1}

    with f of :func:`pyloss.analysis.perturbed_ufm`, by Euler's method. Since :math:`W^*` is the
    best, the gradient is that with W held: :math:`((H W^\top - Y) W + \beta (H - H_0) + \lambda_H
    H) / N`. Variability within classes falls along the path.

    Args:
        features, labels, lam_w, lam_h, num_classes: as for
            :func:`pyloss.analysis.perturbed_ufm`.
        steps: T - 1.
        step_size: of the time t, > 0. Too long a step diverges, as gradient descent does.
        beta: >= 0; with 0, features are free to leave :math:`H_0`.

    Returns:
        :class:`pyloss.analysis.CentralPath`.

    Raises:
        As :func:`pyloss.analysis.perturbed_ufm`.

    Example:
        >>> import torch, pyloss
        >>> torch.manual_seed(0)
        <...>
        >>> path = pyloss.analysis.central_path(torch.randn(60, 10), torch.arange(60) % 4, 0.05)
        >>> bool((path.nc1.diff() < 0).all())
        True

    Reference:
        Tirer, Huang, Niles-Weed. arXiv 2210.16658. Han, Papyan, Donoho. Neural Collapse Under MSE
        Loss: Proximity to and Dynamics on the Central Path. arXiv 2106.02073.
    """
    checks.check_range("beta", beta, 0.0)
    model = _model(features, labels, lam_w, beta, lam_h, num_classes)
    steps = checks.checked_count("steps", steps)
    checks.check_range("step_size", step_size, 0.0, open_low=True)
    h, rows = model.start, []
    for step in range(steps + 1):
        weight = model.best_weight(h.T @ h, model.y.T @ h)
        rows.append(torch.stack([model.value(weight, h), *_variability(model, h)]))
        if step < steps:
            slope = (h @ weight.T - model.y) @ weight
            slope = slope + beta * (h - model.start) + lam_h * h
            h = h - step_size / len(h) * slope
    time = step_size * torch.arange(steps + 1, dtype=h.dtype, device=h.device)
    return CentralPath(time, *torch.stack(rows, 1), weight, h)


def _variability(model: _Model, h: Tensor) -> tuple[Tensor, Tensor]:
    stats = collapse.stats_of(h, model.labels, model.y.shape[1], h.dtype)
    return collapse.nc1_of(h, model.labels, stats), collapse.nc1_trace(stats)


def _model(features, labels, lam_w, beta, lam_h, num_classes) -> _Model:
    labels, classes = collapse.checked_samples(features, labels, num_classes, -100)
    if not len(features) or bool((labels == classes).any()):
        raise ValueError("features must hold samples, each with a class")
    checks.check_range("lam_w", lam_w, 0.0, open_low=True)
    checks.check_range("lam_h", lam_h, 0.0)
    start = features.detach().double()
    y = torch.nn.functional.one_hot(labels, classes).double()
    return _Model(start, labels, y, len(y) * lam_w / classes, float(beta), float(lam_h))
