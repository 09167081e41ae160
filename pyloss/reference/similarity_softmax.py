"""Softmax statistics and sums over all pairs of queries and keys, from the whole matrix of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stats(NamedTuple):
    """Of the logits z_ij of each query, and of each key where the columns were asked for."""

    lse: Tensor  # (N,) log sum exp z_ij over the denominator; of nothing -inf
    positive: Tensor  # (N,) sum of z_ij over the positives
    count: Tensor  # (N,) entries of the denominator
    positives: Tensor  # (N,)
    mean: Tensor | None = None  # (N,) of z_ij under its softmax; no gradient
    column_lse: Tensor | None = None  # (M,) the same over i
    column_positive: Tensor | None = None
    column_count: Tensor | None = None
    column_positives: Tensor | None = None


class Margins(NamedTuple):
    """By how much pairs are on the wrong side, (N,), and how many; a tie counts, with 0."""

    above: Tensor  # sum over negatives of max(0, z_ij - above)
    above_count: Tensor
    below: Tensor  # sum over positives of max(0, below - z_ij)
    below_count: Tensor


def similarity_softmax(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    *,
    first: int = -1,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "ignore",
    denominator: str = "all",
    columns: bool = False,
    mean: bool = False,
) -> Stats:
    """log sum exp and more of z_ij = scale_i q_i . k_j, over j for each i and over i for each j.

    A pair (i, j) is one of: i's own key, which is left out; positive; dropped, which is left out
    too; negative.

    Args:
        queries: (N, D).
        keys: (M, D).
        scale: a number, or a tensor of shape () or (N,).
        first: key first + i is query i's own; below 0: there is none.
        target: (N,), a positive key of each query; one that is no key's index: none.
        query_ids, key_ids: (N,), (M,); what pairs of equal ids are:
        same: "positive"; "drop": left out, the target excepted; "ignore": nothing special.
        denominator: of the softmax, "all" pairs that are not left out, or the "negatives".
        columns: also over i.
        mean: also the mean of z_ij under its softmax, for each query.

    Returns:
        :class:`Stats`, in float64 for float64 and else in float32. Differentiable in the sums.
    """
    z = _logits(queries, keys, scale)
    left_out, positive = _kinds(z, first, target, query_ids, key_ids, same)
    counted = ~left_out if denominator == "all" else ~(left_out | positive)
    scores = torch.where(counted, z, -torch.inf)
    found = [_along(z, scores, counted, positive, dim) for dim in ((1, 0) if columns else (1,))]
    rows, of_columns = found[0], (found[1] if columns else (None,) * 4)
    average = None
    if mean:
        p = torch.where(counted, torch.exp(scores - rows[0].unsqueeze(1)), 0.0)
        average = torch.where(p == 0, 0.0, p * z).sum(1).detach()
    return Stats(*rows, average, *of_columns)


def _along(z, scores, counted, positive, dim):
    return (
        torch.logsumexp(scores, dim),
        torch.where(positive, z, 0.0).sum(dim),
        counted.sum(dim).to(z.dtype),
        positive.sum(dim).to(z.dtype),
    )


def pair_sums(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    first: int = -1,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "ignore",
) -> Tensor:
    """sum_j softplus(-y_ij (z_ij + bias)), (N,), with y = 1 for positive pairs and -1 for negative.

    Args: as of :func:`similarity_softmax`; `bias` a number or a tensor of shape ().
    """
    z = _logits(queries, keys, scale)
    left_out, positive = _kinds(z, first, target, query_ids, key_ids, same)
    u = z + bias
    terms = F.softplus(torch.where(positive, -u, u), threshold=60.0)
    return torch.where(left_out, 0.0, terms).sum(1)


def margin_sums(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    above: float = 0.0,
    below: float = 0.0,
    *,
    first: int = -1,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    same: str = "ignore",
) -> Margins:
    """Negatives at or above one threshold, positives at or below another.

    Args: as of :func:`similarity_softmax`; `above` and `below` are numbers.
    """
    z = _logits(queries, keys, scale)
    left_out, positive = _kinds(z, first, target, query_ids, key_ids, same)
    # Not "z >= above": a NaN belongs to the sum.
    high = ~(left_out | positive | (z < above))
    low = positive & ~(z > below)
    return Margins(
        torch.where(high, z - above, 0.0).sum(1),
        high.sum(1).to(z.dtype),
        torch.where(low, below - z, 0.0).sum(1),
        low.sum(1).to(z.dtype),
    )


def _logits(queries, keys, scale):
    dtype = torch.promote_types(queries.dtype, torch.float32)
    z = queries.to(dtype) @ keys.to(dtype).mT
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
        scale = scale.unsqueeze(1) if scale.dim() else scale
    return z * scale


def _kinds(z, first, target, query_ids, key_ids, same):
    """Which pairs are left out, and which are positive."""
    columns = torch.arange(z.shape[1], device=z.device)
    rows = torch.arange(z.shape[0], device=z.device).unsqueeze(1)
    none = torch.zeros_like(z, dtype=torch.bool)
    own = columns == first + rows if first >= 0 else none
    positive = none if target is None else columns == target.unsqueeze(1)
    left_out = own
    if same != "ignore":
        equal = query_ids.unsqueeze(1) == key_ids
        if same == "drop":
            left_out = own | (equal & ~positive)
        else:
            positive = positive | equal
    return left_out, positive & ~own
