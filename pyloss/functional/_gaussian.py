"""Means over Gaussian numbers and pairs of them, in float64 and by quadrature.

Gauss-Legendre panels of the density rather than Gauss-Hermite nodes: a panel ends wherever the
function has a kink, and panels that grow away from 0 follow a function at every scale of K.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

# Ends of panels, in standard deviations; the mass beyond is 1e-44.
_LINE = (0.0, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0, 10.0, 14.0)
_RAY = (0.0, 0.03, 0.15, 0.5, 1.0, 2.0, 3.0, 4.5, 6.0, 8.0, 11.0)
_LINE_NODES, _RAY_NODES, _SECTOR_NODES = 16, 12, 24
_PAIRS = 128  # of one step: 30 MB


@functools.lru_cache
def legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes in [0, 1] and weights that add up to 1, by Golub and Welsch."""
    k = torch.arange(1, count, dtype=torch.float64)
    beside = k / torch.sqrt(4 * k.square() - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (nodes + 1) / 2, vectors[0].square()


def _panels(ends: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (*, panels * count) between neighbours of sorted ends (*, panels + 1)."""
    nodes, weights = (t.to(ends.device) for t in legendre(count))
    width = ends.diff().unsqueeze(-1)
    return (ends[..., :-1, None] + width * nodes).flatten(-2), (width * weights).flatten(-2)


def line(variance: Tensor, kinks: Sequence[float] = (0.0,)) -> tuple[Tensor, Tensor]:
    """Nodes z (B, M) and weights of N(0, variance), variance (B,); panels end at the kinks."""
    deviation = variance.sqrt().unsqueeze(1)
    half = variance.new_tensor(_LINE)
    ends = torch.cat([-half.flip(0), half[1:]]).expand(len(variance), -1)
    broken = variance.new_tensor([k for k in kinks if k != 0]).expand(len(variance), -1)
    # A kink beyond the panels ends none: it would widen them.
    broken = (broken / deviation).clamp(-_LINE[-1], _LINE[-1])
    x, w = _panels(torch.cat([ends, broken], 1).sort(1).values, _LINE_NODES)
    return x * deviation, w * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def plane_means(
    functions: Sequence[Function],
    first: Tensor,
    second: Tensor,
    cross: Tensor,
    kinks: Sequence[float] = (0.0,),
) -> list[Tensor]:
    """<f(z1) f(z2)> of each function, of pairs with the covariance [[first, cross], [cross,
    second]], (P,) each.

    In polar coordinates, where a function with a kink at 0 is smooth in each of four sectors.
    """
    found = [
        _plane(functions, *part, kinks)
        for part in zip(*(t.split(_PAIRS) for t in (first, second, cross)))
    ]
    if not found:
        return [first.clone() for _ in functions]
    return [torch.cat(each) for each in zip(*found)]


def _plane(functions, first, second, cross, kinks) -> list[Tensor]:
    along = first.sqrt() * second.sqrt()
    angle = torch.where(along > 0, (cross / along).clamp(-1, 1), 0.0 * cross).acos()
    quarter = torch.full_like(angle, math.pi / 2)
    ends = torch.stack(
        [-quarter, angle - quarter, quarter, angle + quarter, 3 * quarter], 1
    )  # (P, 5)
    phi, w_phi = _panels(ends, _SECTOR_NODES)
    on_first = first.sqrt()[:, None] * phi.cos()  # (P, phi)
    on_second = second.sqrt()[:, None] * (phi - angle[:, None]).cos()
    ray = first.new_tensor(_RAY)
    if any(kinks):
        ray = ray.expand(*phi.shape, -1)
        broken = [k / on.unsqueeze(-1) for k in kinks if k for on in (on_first, on_second)]
        ray = torch.cat([ray, *broken], -1).clamp(0, _RAY[-1]).sort(-1).values
    r, w_r = _panels(ray, _RAY_NODES)
    w = w_phi.unsqueeze(-1) * (w_r * r * torch.exp(-r.square() / 2)) / (2 * math.pi)
    z1, z2 = on_first.unsqueeze(-1) * r, on_second.unsqueeze(-1) * r
    return [(w * f(z1) * f(z2)).sum((1, 2)) for f in functions]
