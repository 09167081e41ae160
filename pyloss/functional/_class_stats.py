"""Count, mean and sum of squares of the samples of each class, which merge in any order."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class ClassStats(NamedTuple):
    count: Tensor  # (C,)
    mean: Tensor  # (C, D), 0 of no samples
    ssd: Tensor  # (C, D): sum of squared distances from the mean


def class_stats(x: Tensor, y: Tensor, classes: int, dtype: torch.dtype) -> ClassStats:
    """Of one batch, by two passes over it."""
    x = x.detach().to(dtype)
    count = torch.zeros(classes, dtype=dtype, device=x.device)
    count = count.index_add(0, y, torch.ones_like(y, dtype=dtype))
    zero = torch.zeros(classes, x.shape[1], dtype=dtype, device=x.device)
    mean = zero.index_add(0, y, x) / count.clamp(min=1).unsqueeze(1)
    return ClassStats(count, mean, zero.index_add(0, y, (x - mean[y]).square()))


def merged(a: ClassStats, b: ClassStats) -> ClassStats:
    """Of the samples of both (Chan, Golub, LeVeque)."""
    count = a.count + b.count
    share = (b.count / count.clamp(min=1)).unsqueeze(1)
    off = b.mean - a.mean
    return ClassStats(
        count, a.mean + off * share, a.ssd + b.ssd + off.square() * share * a.count.unsqueeze(1)
    )


def merged_scatter(a: ClassStats, scatter_a: Tensor, b: ClassStats, scatter_b: Tensor) -> Tensor:
    """(D, D): the scatter within the classes, summed over them, likewise."""
    off = b.mean - a.mean
    share = a.count * b.count / (a.count + b.count).clamp(min=1)
    return scatter_a + scatter_b + (off * share.unsqueeze(1)).T @ off


def of_ranks(own: ClassStats, group) -> list[ClassStats]:
    """Those of all ranks, in their order."""
    from pyloss.functional import _contrastive_group as of_group  # with its first use

    return [ClassStats(*parts) for parts in zip(*(of_group.of_all(t, group) for t in own))]


def over_ranks(own: ClassStats, group) -> ClassStats:
    """Of the samples of all ranks, merged in their order: the same on each."""
    return functools.reduce(merged, of_ranks(own, group))


def scatter_over_ranks(own: ClassStats, scatter: Tensor, group) -> tuple[ClassStats, Tensor]:
    """Both, of the samples of all ranks; no rank holds the scatter of another."""
    from pyloss.functional import _contrastive_group as of_group

    every = of_ranks(own, group)
    whole, scatter = functools.reduce(merged, every), of_group.total(scatter, group)
    for stats in every:
        off = stats.mean - whole.mean
        scatter = scatter + (off * stats.count.unsqueeze(1)).T @ off
    return whole, scatter


def total_over_ranks(x: Tensor, group) -> Tensor:
    """The sum of what the ranks have."""
    from pyloss.functional import _contrastive_group as of_group

    return of_group.total(x, group)
