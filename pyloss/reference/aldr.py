"""ALDR-KL in ordinary PyTorch operations: the specification in code.

For one row of scores x with label y, ``s = 1 / mean |x|`` (``l1``) or 1::

    v = s x - margin [j = y]
    F(lam) = lam - lam0 + KL(softmax(v / lam), 1/C) / kappa = 0,    kappa = alpha log C / lam0
    value = lam (logsumexp(v / lam) - v_y / lam - log C) - kappa / 2 (lam - lam0)^2

The value is a maximum over lam, so a gradient at fixed lam is that of the value; the second
derivative needs that of lam, which one Newton step from the solution brings in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEPS, _PATIENCE = 20, 5


def scores(x: Tensor, label: Tensor, margin: float, l1: bool) -> tuple[Tensor, Tensor]:
    """(v, s); s is 0 for a row of zeros, which has no gradient."""
    s = torch.ones_like(x[:, :1])
    if l1:
        mean = x.abs().mean(1, keepdim=True)
        zero = mean == 0
        s = torch.where(zero, 0.0, 1 / (torch.where(zero, 1.0, mean) + 1e-12))
    hot = label.unsqueeze(1) == torch.arange(x.shape[1], device=x.device)
    return x * s - margin * hot.to(x.dtype), s


def divergence(v: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(v / lam), 1/C) and the variance of v / lam under that softmax."""
    z = v / lam.unsqueeze(1)
    log_p = torch.log_softmax(z, 1)
    p = torch.exp(log_p)
    # A score of -inf has p = 0.
    kl = torch.where(p == 0, 0.0, p * log_p).sum(1) + math.log(v.shape[1])
    u = torch.where(p == 0, 0.0, z - z.amax(1, keepdim=True))
    mean = (p * u).sum(1)
    return kl, ((p * u * u).sum(1) - mean * mean).clamp(min=0)


def plain_step(kl: Tensor, lam0: float, alpha: float, classes: int) -> Tensor:
    scale = lam0 / (alpha * math.log(classes)) if classes > 1 else 0.0
    return (lam0 - kl.clamp(min=0) * scale).clamp(min=lam0 * (1 - 1 / alpha))


def solve(v: Tensor, lam0: float, alpha: float) -> Tensor:
    """The solution that is reached from lam0: Newton's method where the slope of F is surely
    positive, the plain step lam0 - KL / kappa, which passes no solution, where it is not, longer
    and longer once it creeps, and halving after a step that has passed one."""
    classes = v.shape[1]
    scale = lam0 / (alpha * math.log(classes)) if classes > 1 else 0.0
    lam = torch.full_like(v[:, 0], lam0)
    above, below = lam, torch.full_like(lam, -1.0)
    lowest = lam0 * (1 - 1 / alpha)
    tolerance = 1e-11 if v.dtype == torch.float64 else 1e-6
    plain, stride = torch.zeros_like(lam), torch.ones_like(lam)
    for _ in range(_STEPS - 1):
        kl, variance = divergence(v, lam)
        excess = lam - plain_step(kl, lam0, alpha, classes)
        slope = 1 - variance * scale / lam
        passed = excess < 0
        below, above = torch.where(passed, lam, below), torch.where(passed, above, lam)
        steep = slope > 0.1
        newton = lam - excess / torch.where(steep, slope, 1.0)
        plain = torch.where(steep, plain, plain + 1)
        stride = torch.where(~steep & (plain > _PATIENCE), 2 * stride, stride)
        next = torch.where(steep, newton, lam - stride * excess.clamp(min=0))
        outside = (below > 0) & ~((next > below) & (next < above))
        next = torch.where(outside, (below + above) / 2, next).clamp(min=lowest)
        moves = ~((next - lam).abs() <= tolerance * lam0)
        lam = torch.where(moves, next, lam)
    return lam


def value_at(
    x: Tensor, label: Tensor, lam: Tensor, *, lam0: float, alpha: float, margin: float, l1: bool
) -> Tensor:
    """The value of each row at a given lam."""
    v, _ = scores(x, label, margin, l1)
    return _value(v, label, lam, lam0, alpha)


def _value(v: Tensor, label: Tensor, lam: Tensor, lam0: float, alpha: float) -> Tensor:
    log_classes = math.log(v.shape[1])
    z = v / lam.unsqueeze(1)
    nll = -torch.log_softmax(z, 1).gather(1, label.unsqueeze(1)).squeeze(1)
    kappa = alpha * log_classes / lam0
    return lam * (nll - log_classes) - kappa / 2 * (lam - lam0).square()


def aldr(
    x: Tensor,
    label: Tensor,
    *,
    lam0: float = 1.0,
    alpha: float = 2.0,
    margin: float = 0.0,
    l1: bool = True,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(value, lam) of each row, (N,) each.

    Args:
        x: scores, (N, C), float32 or float64.
        label: (N,), int64, in range.
        start: lam so far, (N,): one plain step from it, without a gradient, gives lam; None: the
            solution, with one.
    """
    v, _ = scores(x, label, margin, l1)
    classes = v.shape[1]
    fixed = v.detach()
    if start is not None:
        kl, _ = divergence(fixed, start.to(x.dtype))
        lam = plain_step(kl, lam0, alpha, classes)
    else:
        lam = solve(fixed, lam0, alpha)
        scale = lam0 / (alpha * math.log(classes)) if classes > 1 else 0.0
        slope = 1 - divergence(fixed, lam)[1] * scale / lam
        kl, _ = divergence(v, lam)
        shift = (kl - kl.detach()) * scale / slope
        lam = lam - torch.where(shift == shift, shift, 0.0)  # a value of 0, and the derivative
    return _value(v, label, lam, lam0, alpha), lam


def legacy_step(
    x: Tensor, label: Tensor, lam: Tensor, *, lam0: float, alpha: float, margin: float
) -> tuple[Tensor, Tensor]:
    """(value, new lam) of the authors' code, for comparison with it alone: the p that moves lam
    knows no margin, and is p + 1e-5 over its sum."""
    classes = x.shape[1]
    delta = x - x.gather(1, label.unsqueeze(1))
    p = torch.softmax(delta / lam.unsqueeze(1), 1) + 1e-5
    p = p / p.sum(1, keepdim=True)
    kl = (p * torch.log(p * classes)).sum(1)
    kappa = alpha * math.log(classes) / lam0
    lam = (lam0 - kl / kappa).detach()
    hot = label.unsqueeze(1) == torch.arange(classes, device=x.device)
    return _value(x - margin * hot.to(x.dtype), label, lam, lam0, alpha), lam


def statistics(x, label, value, lam, lam0, alpha, margin, ignore_index, l1) -> Tensor:
    """What a forward of the kernels leaves of each row (csrc/common/aldr.h), (8, N)."""
    dtype, classes = value.dtype, x.shape[1]
    ignored = label == ignore_index
    bad = (label < 0) | (label >= classes)
    y = torch.where(bad, 0, label)
    x = torch.where(ignored.unsqueeze(1), 0.0, x.to(dtype))
    v, s = scores(x, y, margin, l1)
    chain = s.squeeze(1)
    zero = chain == 0
    scale = torch.where(zero, 1.0, chain)
    peak = v.amax(1)
    u = (v - peak.unsqueeze(1)) / lam.unsqueeze(1)
    e = torch.exp(u)
    uy = u.gather(1, y.unsqueeze(1)).squeeze(1)
    rest = e.scatter(1, y.unsqueeze(1), 0.0).sum(1)
    total = rest + torch.exp(uy)
    miss = rest / total
    mean = torch.where(e == 0, 0.0, e * u).sum(1) / total
    pull = lam * (mean - uy) - margin * miss if l1 else torch.zeros_like(lam)
    rows = torch.stack([value, lam, peak / scale, total, miss, scale / lam, chain, pull])
    rows = torch.where(bad & ~ignored, math.nan, rows)
    keep = torch.arange(len(rows), device=x.device).unsqueeze(1) == 1
    return torch.where(ignored & ~keep, 0.0, rows)
