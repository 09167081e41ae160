"""Reductions over the segments of a ragged batch, in plain PyTorch.

    x (N, *) and CSR offsets (S + 1,): segment s is x[offsets[s] : offsets[s + 1]]

Everything is made of two linear maps, the sum over a segment and the repetition of a row of a
segment for each of its values, so that derivatives of any order exist and no memory beyond that of
x is needed, however unequal the segments are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss import segment

EMPTY = {"sum": 0.0, "mean": math.nan, "min": math.inf, "max": -math.inf, "prod": 1.0,
         "logsumexp": -math.inf}  # fmt: skip
REDUCES = tuple(EMPTY)


class Segments:
    """The two maps, of checked offsets."""

    def __init__(self, x: Tensor, offsets: Tensor) -> None:
        segment.check_offsets(offsets, x.shape[0])
        self.offsets = offsets
        self.ids = segment.segment_ids(offsets, x.shape[0])
        self.n = offsets.shape[0] - 1
        lengths = offsets.diff().view(-1, *[1] * (x.dim() - 1))
        self.lengths, self.empty = lengths.to(x.dtype), lengths == 0

    def sum(self, x: Tensor) -> Tensor:
        return x.new_zeros((self.n, *x.shape[1:])).index_add(0, self.ids, x)

    def rows(self, each: Tensor) -> Tensor:
        return each.index_select(0, self.ids)

    def extreme(self, x: Tensor, which: str) -> Tensor:
        """Largest or smallest, without a gradient; NaN where there is one."""
        fill = EMPTY["max" if which == "amax" else "min"]
        ids = self.ids.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
        empty = x.new_full((self.n, *x.shape[1:]), fill)
        return empty.scatter_reduce(0, ids, x.detach(), which)

    def attained(self, x: Tensor, extreme: Tensor) -> Tensor:
        """The extreme, whose gradient values that share it get in equal parts."""
        own = x == self.rows(extreme)
        ties = self.sum(own.to(x.dtype))
        value = self.sum(torch.where(own, x, 0.0) / self.rows(ties))
        # To the last bit: the parts of a sum are rounded.
        exact = torch.where(value.isfinite(), value + (extreme - value).detach(), value)
        return torch.where(self.empty, extreme, exact)

    def shifted(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x less the maximum of its segment, the maximum), constants where that is infinite."""
        most = self.extreme(x, "amax")
        most = torch.where(most.isinf(), 0.0, most)
        return x - self.rows(most), most


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def segment_reduce(x: Tensor, offsets: Tensor, reduce: str = "sum") -> Tensor:
    """One row for each segment.

    Args:
        x: ``(N, *)``, floating; half types are computed in float32.
        offsets: ``(S + 1,)``, int32 or int64.
        reduce: sum, mean, min, max, prod or logsumexp.

    Returns:
        ``(S, *)``, float32 or float64. An empty segment: 0, NaN, inf, -inf, 1, -inf.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 2, 2, 3])
        >>> pyloss.reference.segment_reduce(x, offsets, "sum")
        tensor([3., 0., 5.])
    """
    x = _wide(x)
    s = Segments(x, offsets)
    if reduce == "sum":
        return s.sum(x)
    if reduce == "mean":
        return s.sum(x) / s.lengths
    if reduce in ("min", "max"):
        return s.attained(x, s.extreme(x, f"a{reduce}"))
    if reduce == "prod":
        return _prod(x, s)
    u, most = s.shifted(x)
    total = s.sum(u.exp())
    nothing = total == 0
    return torch.where(nothing, -math.inf, torch.where(nothing, 1.0, total).log() + most)


def _prod(x: Tensor, s: Segments) -> Tensor:
    """By the tree: no division, so that a zero is no special case."""
    levels, top = segment.tree_levels(s.offsets, x.shape[0])
    for left, right, carry in levels:
        pairs = x.index_select(0, left) * x.index_select(0, right)
        x = torch.cat([pairs, x.index_select(0, carry)])
    found = x.index_select(0, top) if x.shape[0] else x.new_ones((s.n, *x.shape[1:]))
    return torch.where(s.empty, 1.0, found)


def segment_moments(
    x: Tensor, offsets: Tensor, *, covariance: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean ``(S, *)`` of each segment, and the mean square around it, ``(S, *)``, or of an x
    ``(N, d)`` the covariance ``(S, d, d)``; NaN of an empty one.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 2, 3])
        >>> pyloss.reference.segment_moments(x, offsets)
        (tensor([1.5000, 5.0000]), tensor([0.2500, 0.0000]))
    """
    x = _wide(x)
    s = Segments(x, offsets)
    mean = s.sum(x) / s.lengths
    d = x - s.rows(mean)
    if covariance:
        return mean, s.sum(d.unsqueeze(2) * d.unsqueeze(1)) / s.lengths.unsqueeze(2)
    return mean, s.sum(d * d) / s.lengths


def segment_softmax_stats(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(x - maximum), and the number in x of the first value that is the
    maximum, ``(S, *)`` each; -inf, 0 and -1 of an empty segment.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([0, 2, 3])
        >>> pyloss.reference.segment_softmax_stats(x, offsets)
        (tensor([1., 5.]), tensor([2., 1.]), tensor([0, 2]))
    """
    x = _wide(x)
    s = Segments(x, offsets)
    extreme = s.extreme(x, "amax")
    most = s.attained(x, extreme)
    finite = torch.where(extreme.isinf(), 0.0, most)
    rows = x.shape[0]
    places = torch.arange(rows, device=x.device).view(-1, *[1] * (x.dim() - 1))
    own = (x == s.rows(extreme)) | x.isnan()
    ids = s.ids.view(-1, *[1] * (x.dim() - 1)).expand_as(x)
    first = torch.where(own, places, rows)
    argmax = first.new_full((s.n, *x.shape[1:]), rows).scatter_reduce(0, ids, first, "amin")
    return most, s.sum((x - s.rows(finite)).exp()), torch.where(s.empty, -1, argmax)


def segment_softmax(x: Tensor, offsets: Tensor) -> Tensor:
    """exp(x) over its sum in the same segment, of the shape of x.

    Example:
        >>> import torch, pyloss
        >>> x, offsets = torch.tensor([0.0, 0.0, 5.0]), torch.tensor([0, 2, 3])
        >>> pyloss.reference.segment_softmax(x, offsets)
        tensor([0.5000, 0.5000, 1.0000])
    """
    x = _wide(x)
    s = Segments(x, offsets)
    # As torch.softmax: NaN of a segment of -inf alone, and of one with +inf.
    e = (x - s.rows(s.extreme(x, "amax"))).exp()
    return e / s.rows(s.sum(e))
