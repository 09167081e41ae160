"""Metrics of ranked lists."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._lists import Lists, check_gain, checked_k


@torch.no_grad()
def ndcg(
    scores: Tensor,
    relevance: Tensor,
    k: int | None = None,
    *,
    gain: str = "linear",
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Normalised discounted cumulative gain; equal scores share the mean of their discounts.

    .. math:: \frac{1}{\mathrm{IDCG}_k} \sum_{r \le k} \frac{g(y_{\pi_r})}{\log_2(1 + r)}

    Args:
        scores: ``(..., n)``, floating; pi orders them, the largest first.
        relevance: y, of the same shape, any real dtype, >= 0.
        k: only the first k ranks; default: all.
        gain: g: ``"linear"``, y, as scikit-learn's ``ndcg_score``, or ``"exponential"``, 2^y - 1.
        mask, offsets, reduction: as for :func:`pyloss.functional.list_net`.

    Returns:
        0-d, or one number a list; 0 for a list in which nothing is relevant. A NaN makes its list
        NaN.

    Raises:
        TypeError, ValueError: as :func:`pyloss.functional.list_net`.

    Example:
        >>> import torch, pyloss
        >>> pyloss.metrics.ndcg(torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[3, 0, 1]]))
        tensor(1.)

    Reference:
        Jarvelin, Kekalainen. Cumulated gain-based evaluation of IR techniques. TOIS 20, 2002.
    """
    k = checked_k(k)
    check_gain(gain)
    checks.check_reduction(reduction)
    lists = Lists(scores, relevance, mask, offsets)
    gains, discounts = lists.gains(gain), lists.discounts(k)
    first, count = _ties(lists)
    # The mean discount of the ranks first .. first + count - 1.
    total = torch.cat([discounts.new_zeros(1), discounts.cumsum(0)])
    last = (first + count).clamp(max=lists.n)
    mean = (total[last] - total[first]) / count.clamp(min=1)
    ideal = lists.ideal(gains, discounts)
    each = (gains * mean).sum(1) / torch.where(ideal == 0, 1.0, ideal)
    return lists.reduced(each + lists.poison(), None, reduction)


@torch.no_grad()
def mrr(
    scores: Tensor,
    relevance: Tensor,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Mean reciprocal rank: one over the rank of the first relevant item, y > 0.

    Args:
        scores, relevance, mask, offsets, reduction: as for :func:`ndcg`. An item among equal scores
            has the last of their ranks, so that equal scores earn nothing.

    Returns:
        As :func:`ndcg`; 0 for a list in which nothing is relevant.

    Raises:
        As :func:`ndcg`.

    Example:
        >>> import torch, pyloss
        >>> pyloss.metrics.mrr(torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[0, 0, 1]]))
        tensor(0.5000)
    """
    checks.check_reduction(reduction)
    lists = Lists(scores, relevance, mask, offsets)
    first, count = _ties(lists)
    inverse = torch.where(lists.y > 0, 1 / (first + count).to(lists.s.dtype), 0.0)
    each = inverse.amax(1) if lists.n else inverse.sum(1)
    return lists.reduced(each + lists.poison(), None, reduction)


@torch.no_grad()
def precision_at_k(
    scores: Tensor,
    relevance: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Share of relevant items, y > 0, among the first k; missing items are not relevant.

    Args:
        scores, relevance, mask, offsets, reduction: as for :func:`ndcg`. Equal scores around place
            k share the places that are left.
        k: how many places.

    Returns:
        As :func:`ndcg`.

    Raises:
        As :func:`ndcg`.

    Example:
        >>> import torch, pyloss
        >>> scores, relevance = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1, 0, 0]])
        >>> pyloss.metrics.precision_at_k(scores, relevance, 2)
        tensor(0.5000)
    """
    k = checked_k(k)
    if k is None:
        raise TypeError("k must be an integer, got NoneType")
    checks.check_reduction(reduction)
    lists = Lists(scores, relevance, mask, offsets)
    first, count = _ties(lists)
    inside = ((k - first).clamp(min=0) / count.clamp(min=1)).clamp(max=1).to(lists.s.dtype)
    each = torch.where(lists.y > 0, inside, 0.0).sum(1) / k
    return lists.reduced(each + lists.poison(), None, reduction)


def _ties(lists: Lists) -> tuple[Tensor, Tensor]:
    """(how many items have a larger score, how many have this one), (b, n) each."""
    s = lists.hidden(lists.s, -torch.inf).contiguous()
    ordered = s.sort(1).values
    below = torch.searchsorted(ordered, s)
    up_to = torch.searchsorted(ordered, s, right=True)
    count = up_to - below
    if lists.mask is not None:  # -inf of its own beside that of what is hidden
        hidden = (~lists.mask).sum(1, keepdim=True)
        count = torch.where(s == -torch.inf, count - hidden, count)
    return lists.n - up_to, torch.where(count < 0, 0, count)
