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
    scores = queries @ keys.mT
    if first >= 0:
        own = first + torch.arange(queries.shape[0], device=queries.device)
        columns = torch.arange(keys.shape[0], device=queries.device)
        scores = torch.where(own.unsqueeze(1) == columns, -math.inf, scores)
    return tuple(scores.topk(k, dim=-1))


def similarity_hardest(
    queries: Tensor, keys: Tensor, scale: Tensor, k: int, first: int = -1
) -> tuple[Tensor, Tensor]:
    """(log-sum-exp (B,), sum (B,)) of the k largest z_ij = scale_i q_i . k_j over j.

    Args:
        queries, keys, k, first: as for :func:`similarity_topk`; of equal products the first count.
        scale: 0-d or (B,), positive.
    """
    scores = scale.unsqueeze(-1) * (queries @ keys.mT)
    if first >= 0:
        own = first + torch.arange(queries.shape[0], device=queries.device)
        columns = torch.arange(keys.shape[0], device=queries.device)
        scores = torch.where(own.unsqueeze(1) == columns, -math.inf, scores)
    kept = scores.sort(dim=-1, descending=True, stable=True).values[..., :k]
    return kept.logsumexp(-1), kept.sum(-1)
