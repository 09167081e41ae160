"""The scaled noncentral chi-square distribution of the greatest likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NEAR_STEP, _FAR_STEP = 1e-4, 3e-3  # of the logarithms, for gradient and Hessian
_GAIN = 1e-11  # of the mean log-likelihood: no more steps
_DEBYE_FROM = 12.0  # order from which the expansion of the Bessel function is used


def fit_ncx2(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(df, nc, scale) of the greatest likelihood of positive float64 numbers, 0-d each.

    By Newton's method over their logarithms, from the moments, the best of several dampings in each
    step. A boundary, df = 0 or nc = 0, is far out. Numbers that differ by less than a part in 10^3
    are taken as normal: of the three parameters two count then.
    """
    mean = x.mean()
    x = x / mean
    # With mean 1, variance = 2 (df + 2 nc) / (df + nc)^2: here df = nc.
    start = 3 / (2 * x.var())
    if bool(start > 1e6):
        return start, start, mean / (2 * start)
    log_x = x.log()
    nodes, weights = _mean_rule(log_x)
    mean_log = log_x.mean()

    def loss(at: Tensor) -> Tensor:
        """At rows of the logarithms of df, of nc, and of the mean of the distribution."""
        log_df, log_nc, log_mean = at.unbind(1)
        df, nc = log_df.exp(), log_nc.exp()
        log_rate = (df + nc).log() - log_mean  # of 1 / scale; the mean of x is 1
        order = df / 2 - 1
        log_z = (nodes + (log_rate + log_nc).unsqueeze(1)) / 2
        log_i = _log_bessel(order.unsqueeze(1), log_z) @ weights
        power = order / 2 * (mean_log + log_rate - log_nc)
        return (log_rate.exp() + nc) / 2 - power - log_i - log_rate + math.log(2)

    at = torch.stack([start.log(), start.log(), torch.zeros_like(start)])
    dampings = 10.0 ** torch.arange(-13, 5, dtype=x.dtype, device=x.device).unsqueeze(1)
    offsets = torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype, device=x.device)
    cube = torch.cartesian_prod(offsets, offsets, offsets)
    around = torch.cat([_NEAR_STEP * cube, _FAR_STEP * cube])
    value = loss(at.unsqueeze(0))[0]
    for _ in range(100):
        slope, curve = _derivatives(*loss(at + around).reshape(2, 3, 3, 3))
        bends, axes = torch.linalg.eigh(curve)
        bends = bends.abs()
        steps = (slope @ axes) / (bends + dampings * bends.max()) @ axes.T
        trials = at - steps.clamp(-2, 2)
        trials[:, :2] = trials[:, :2].clamp(-25, 25)
        values = loss(trials).nan_to_num(nan=math.inf)
        best = values.argmin()
        gain = value - values[best]
        if not bool(gain > 0):
            break
        at, value = trials[best], values[best]
        if bool(gain <= _GAIN):
            break
    df, nc = at[0].exp(), at[1].exp()
    return df, nc, mean * at[2].exp() / (df + nc)


def _derivatives(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian, of the values in cubes of three small and of three larger steps."""
    slope = torch.stack([t[2] - t[0] for t in (near[:, 1, 1], near[1, :, 1], near[1, 1, :])])
    lines = (far[:, 1, 1], far[1, :, 1], far[1, 1, :])
    planes = {(0, 1): far[:, :, 1], (0, 2): far[:, 1, :], (1, 2): far[1, :, :]}
    curve = torch.diag(torch.stack([t[2] - 2 * t[1] + t[0] for t in lines]))
    for (i, j), t in planes.items():
        curve[i, j] = curve[j, i] = (t[2, 2] - t[2, 0] - t[0, 2] + t[0, 0]) / 4
    return slope / (2 * _NEAR_STEP), curve / _FAR_STEP**2


def _mean_rule(t: Tensor) -> tuple[Tensor, Tensor]:
    """(points, weights) whose weighted sum of g is the mean of g over t: of its interpolant at
    Chebyshev's points, for a function that is smooth as far as pi from the real axis."""
    low, high = t.min(), t.max()
    middle, half = (low + high) / 2, (high - low) / 2
    size = 32 + int(26 / math.asinh(math.pi / float(half)))
    u = (t - middle) / half
    before, now, moments = torch.ones_like(u), u, [torch.ones_like(middle), u.mean()]
    for _ in range(size - 2):
        before, now = now, 2 * u * now - before
        moments.append(now.mean())
    index = torch.arange(size, dtype=t.dtype, device=t.device)
    angle = (index + 0.5) * math.pi / size
    twice = 2 * torch.stack(moments)
    twice[0] = 1
    return middle + half * angle.cos(), torch.outer(angle, index).cos() @ twice / size


def _log_bessel(order: Tensor, log_z: Tensor) -> Tensor:
    """log I_order(z), order > -1, by Debye's expansion at a large order and the recurrence down.

    The density of x is exp(-(x + nc) / 2) (x / nc)^(order / 2) I_order(sqrt(nc x)) / 2.
    """
    above = max(0, math.ceil(_DEBYE_FROM - float(order.min())))
    log_i = _debye(order + above, log_z)
    if above == 0:
        return log_i
    # ratio = I_{m + 1} / I_m;  I_{m - 1} = I_{m + 1} + 2 m / z I_m
    inverse_z = (-log_z).exp()
    inverse_ratio = (log_i - _debye(order + above + 1, log_z)).exp()
    for m in range(above, 0, -1):
        inverse_ratio = 2 * (order + m) * inverse_z + 1 / inverse_ratio  # I_{m - 1} / I_m
        log_i = log_i + inverse_ratio.log()
    return log_i


def _debye(order: Tensor, log_z: Tensor) -> Tensor:
    z = log_z.exp()
    root = (order * order + z * z).sqrt()
    p2 = (order / root).square()
    # U_k(p) / order^k = polynomial in p^2 / root^k
    series = (
        1
        + (3 - 5 * p2) / (24 * root)
        + (81 + p2 * (-462 + 385 * p2)) / (1152 * root**2)
        + (30375 + p2 * (-369603 + p2 * (765765 - 425425 * p2))) / (414720 * root**3)
        + (4465125 + p2 * (-94121676 + p2 * (349922430 + p2 * (-446185740 + 185910725 * p2))))
        / (39813120 * root**4)
        + (
            1519035525
            + p2
            * (
                -49286948607
                + p2
                * (284499769554 + p2 * (-614135872350 + p2 * (566098157625 - 188699385875 * p2)))
            )
        )
        / (6688604160 * root**5)
    )
    return (
        root
        + order * (log_z - (order + root).log())
        - (2 * math.pi * root).log() / 2
        + (series.log())
    )
