"""The largest inner products of each query with the keys, and which keys they are of."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def similarity_topk(
    queries: Tensor, keys: Tensor, k: int, first: int = -1
) -> tuple[Tensor, Tensor]:
    """(values (B, k), largest first; indices (B, k)).

    Args:
        queries: (B, D).
        keys: (M, D).
        k: how many, at most M, or M - 1 where one is left out.
        first: query i leaves out key first + i, which is its own; below 0: none is left out.
    """
    scores = _without_own(queries @ keys.mT, first)
    return tuple(scores.topk(k, dim=-1))


def similarity_hardest(
    queries: Tensor, keys: Tensor, scale: Tensor, k: int, first: int = -1
) -> tuple[Tensor, Tensor]:
    """(log-sum-exp (B,), sum (B,)) of the k largest z_ij = scale_i q_i . k_j over j.

    Args:
        queries, keys, k, first: as for :func:`similarity_topk`; of equal products the first count.
        scale: 0-d or (B,), positive.
    """
    scores = _without_own(scale.unsqueeze(-1) * (queries @ keys.mT), first)
    kept = scores.sort(dim=-1, descending=True, stable=True).values[..., :k]
    return kept.logsumexp(-1), kept.sum(-1)


def _without_own(scores: Tensor, first: int) -> Tensor:
    if first < 0:
        return scores
    rows, columns = (torch.arange(n, device=scores.device) for n in scores.shape)
    return torch.where(first + rows.unsqueeze(1) == columns, -math.inf, scores)
