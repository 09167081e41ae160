"""The ops of segment on the reference, and their gradients in torch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.ops._reference import gradients
from pyloss.ops.segment import kinds

_REDUCES = {kind: name for name, kind in kinds.REDUCES.items()}


def _reference():
    from pyloss import reference  # with its first use

    return reference


def composed(x: Tensor, offsets: Tensor, kind: int) -> Tensor:
    """The fold in torch operations."""
    if kind in _REDUCES:
        return _reference().segment_reduce(x, offsets, _REDUCES[kind]).unsqueeze(0)
    if kind == kinds.MOMENTS:
        return torch.stack(_reference().segment_moments(x, offsets))
    return torch.stack(_reference().segment_softmax_stats(x, offsets)[:2])


def argmax(x: Tensor, offsets: Tensor) -> Tensor:
    return _reference().segment_softmax_stats(x, offsets)[2]


def composed_softmax(x: Tensor, offsets: Tensor) -> Tensor:
    return _reference().segment_softmax(x, offsets).to(x.dtype)


def composed_covariance(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return _reference().segment_moments(x, offsets, covariance=True)


def composed_gradient(g: Tensor, x: Tensor, offsets: Tensor, kind: int) -> Tensor:
    """The gradient of a fold, with gradients of its own to g and x."""
    return gradients(lambda x: composed(x, offsets, kind), [x], [g], create_graph=True)[0]


def composed_softmax_gradient(g: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return gradients(lambda x: composed_softmax(x, offsets), [x], [g], create_graph=True)[0]


def fold(
    x: Tensor, other: Tensor | None, offsets: Tensor, given: Sequence[Tensor], kind: int
) -> Tensor:
    if kind <= kinds.SOFTMAX:
        return composed(x, offsets, kind).contiguous()
    if kind == kinds.ARGMAX:
        return argmax(x, offsets).unsqueeze(0)
    from pyloss.reference.segment import Segments

    wide = x.double() if x.dtype == torch.float64 else x.float()
    s = Segments(wide, offsets)
    if kind == kinds.TIES:
        return s.sum((wide == s.rows(given[0])).to(wide.dtype)).unsqueeze(0)
    if kind == kinds.INNER:
        return s.sum(wide * other.to(wide.dtype)).unsqueeze(0)
    zero = wide == 0
    rest = _reference().segment_reduce(torch.where(zero, 1.0, wide), offsets, "prod")
    return torch.stack([rest, s.sum(zero.to(wide.dtype))])


def map_(
    x: Tensor, other: Tensor | None, offsets: Tensor, given: Sequence[Tensor], kind: int
) -> Tensor:
    from pyloss.reference.segment import Segments

    wide = x.double() if x.dtype == torch.float64 else x.float()
    s = Segments(wide, offsets)
    n = s.rows(s.lengths)
    at = [s.rows(t) for t in given]
    return _VALUES[kind](wide, other, n, *at).to(x.dtype).contiguous()


def _to_factors(x, other, n, g, p, z):
    zero = x == 0
    one = torch.where(z == 0, p / torch.where(zero, 1.0, x), torch.where(zero, p, 0.0))
    return g * torch.where(z > 1, 0.0, one)


def _to_softmax(x, other, n, gm, gs, m, s, t):
    infinite = m.isinf()
    own = (gm - torch.where(infinite, 0.0, gs * s)) / t
    own = torch.where(x == m, own, torch.where(t == 0, t / t, 0.0))
    return gs * (x - torch.where(infinite, 0.0, m)).exp() + own


_VALUES = {
    kinds.SPREAD: lambda x, other, n, g: g,
    kinds.SPREAD_MEAN: lambda x, other, n, g: g / n,
    kinds.TO_TIES: lambda x, other, n, g, m, t: torch.where(
        x == m, g / t, torch.where(t == 0, t / t, 0.0)
    ),
    kinds.TO_FACTORS: _to_factors,
    kinds.EXP: lambda x, other, n, g, total: (
        g * (x - torch.where(total == -torch.inf, 0.0, total)).exp()
    ),
    kinds.TO_MOMENTS: lambda x, other, n, gm, gv, mean: (gm + 2 * gv * (x - mean)) / n,
    kinds.TO_SOFTMAX: _to_softmax,
    kinds.NORMALIZED: lambda x, other, n, m, s: (x - m).exp() / s,
    kinds.FROM_NORMALIZED: lambda x, other, n, d: other.to(x.dtype) * (x - d),
}
