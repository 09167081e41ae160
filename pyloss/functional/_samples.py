"""State that is kept for each sample of a data set: which of it a batch is about, means of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_integers
from pyloss.ops._labels import outside


def over_samples(index: Tensor, log_u: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of u, in the log domain, and of `other` over the entries of each sample.

    Args:
        index: (B,), int64: of which sample an entry is; several may be of one.
        log_u, other: (..., B).

    Returns:
        Both, (..., B): all entries of a sample hold its mean.
    """
    if not index.numel():
        return log_u, other
    placed, order = index.sort(stable=True)
    fresh = torch.cat([placed.new_zeros(1), (placed[1:] != placed[:-1]).long()])
    group = torch.zeros_like(index).scatter(0, order, fresh.cumsum(0))
    # Sums in float64, whose order does not show after rounding.
    count = torch.zeros(index.shape, dtype=checks.widest(index.device), device=index.device)
    count = count.index_add(0, group, torch.ones_like(count))[group]

    def mean(x: Tensor) -> Tensor:
        x = checks.widened(x)
        return torch.zeros_like(x).index_add(-1, group, x)[..., group] / count

    most = torch.full_like(log_u, -math.inf)
    most = most.scatter_reduce(-1, group.expand_as(log_u), log_u, "amax")[..., group]
    shift = most.masked_fill(most.isinf(), 0)
    log_mean = shift + mean(torch.exp(log_u - shift)).log()
    return log_mean.to(log_u.dtype), mean(other).to(other.dtype)


def over_all_samples(
    index: Tensor, log_u: Tensor, other: Tensor, group
) -> tuple[Tensor, Tensor, Tensor]:
    """(index, log u, other) of the samples of all ranks, means as of over_samples."""
    if group is not None:
        from pyloss.functional import _contrastive_group as of_group

        index, log_u, other = of_group.last_dimension("index", group, index, log_u, other)
    return index, *over_samples(index, log_u, other)


def checked_index(index, rows: int, samples: int, like: Tensor) -> Tensor:
    """(B,), int64; values are looked at where nothing waits for that."""
    check_integers("index", index, rows)
    if checks.can_look_at(index) and index.numel():
        bad = index[outside(index, samples)]
        if bad.numel():
            raise IndexError(f"index {int(bad[0])} is out of range for {samples} samples")
    return index.to(like.device, torch.int64)
