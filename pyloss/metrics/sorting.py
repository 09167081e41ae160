"""Ranking metrics: how much of an order is right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional._checks import check_dense, check_mask, check_tensor, checked_integer
from pyloss.functional._sorting_rows import check_ordered


class RankingAccuracy(NamedTuple):
    """What :func:`ranking_accuracy` returns: shares in [0, 1], float32 and 0-d.

    Example:
        >>> import torch, pyloss
        >>> found = pyloss.metrics.ranking_accuracy(torch.randn(8, 5), torch.randn(8, 5))
        >>> found._fields
        ('exact_match', 'element_wise', 'exact_match_5')
    """

    exact_match: Tensor  # sets whose whole order is right
    element_wise: Tensor  # elements at their right rank
    exact_match_5: Tensor  # exact match of the first five elements of each set, taken alone


@torch.no_grad()
def ranking_accuracy(
    input: Tensor, target: Tensor, dim: int = -1, *, mask: Tensor | None = None
) -> RankingAccuracy:
    """Exact match and element-wise accuracy of the order of scores.

    Ranks are those of a stable sort, of the scores and of the target alike; in a set with a NaN
    none is right.

    Args:
        input: scores ``(..., n, ...)``, floating.
        target: values with the true order, of the same shape, any real dtype.
        dim: the dimension of a set.
        mask: bool, of the same shape, True at what counts: each set is as if it held these elements
            alone, and whatever stands elsewhere, NaN too, has no part. Sets without an element, for
            ``exact_match_5`` those with less than five, are left out.

    Returns:
        :class:`RankingAccuracy`; NaN without a set, and ``exact_match_5`` NaN with less than five
        elements.

    Raises:
        TypeError, ValueError, IndexError: as :func:`pyloss.sorting_cross_entropy`.

    Example:
        >>> import torch, pyloss
        >>> truth = torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
        >>> scores = torch.tensor([[0.1, 0.2, 0.3], [0.2, 0.1, 0.3]])
        >>> found = pyloss.metrics.ranking_accuracy(scores, truth)
        >>> found.exact_match, found.element_wise.round(decimals=2)
        (tensor(0.5000), tensor(0.6700))

    Reference:
        Petersen, Borgelt, Kuehne, Deussen. arXiv 2105.04019.
    """
    check_ordered("input", input)
    check_tensor("target", target)
    check_dense("target", target)
    if input.shape != target.shape:
        raise ValueError(
            f"target must have the shape {list(input.shape)} of input, got {list(target.shape)}"
        )
    dim = checked_integer("dim", dim)
    if input.dim() > 0 and not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim is {dim}, out of range for an input of shape {list(input.shape)}")
    if input.dim() == 0 or input.shape[dim] == 0:
        raise ValueError(f"input has nothing to rank: its shape is {list(input.shape)}, dim {dim}")
    x, y = input.movedim(dim, -1), target.movedim(dim, -1)
    if mask is not None:
        check_mask(mask, input)
        return _masked(x, y, mask.movedim(dim, -1))
    right, first = _right(x, y), _right(x[..., :5], y[..., :5])
    exact5 = first.all(-1).float().mean()
    if x.shape[-1] < 5:
        exact5 = torch.full_like(exact5, torch.nan)
    return RankingAccuracy(right.all(-1).float().mean(), right.float().mean(), exact5)


def _masked(x: Tensor, y: Tensor, mask: Tensor) -> RankingAccuracy:
    count = mask.sum(-1)
    right = _right(x, y, mask) & mask
    front = (
        (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :5]
    )  # what counts, in its order
    x, y, kept = (t.gather(-1, front) for t in (x, y, mask))
    first = _right(x, y, kept)

    def share(whole: Tensor, sets: Tensor) -> Tensor:
        return (whole & sets).sum() / sets.sum()

    return RankingAccuracy(
        share((right | ~mask).all(-1), count > 0),
        right.sum() / count.sum(),
        share(first.all(-1), count >= 5),
    )


def _right(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which ranks are right: none of a set that has a NaN, and so no order."""
    nan = x.isnan() | y.isnan()
    nan = nan if mask is None else nan & mask
    return (_ranks(x, mask) == _ranks(y, mask)) & ~nan.any(-1, keepdim=True)


def _ranks(x: Tensor, mask: Tensor | None) -> Tensor:
    """Of a stable sort; with a mask of what counts, that comes first."""
    order = torch.argsort(x, dim=-1, stable=True)
    if mask is not None:
        left_out = (~mask).to(torch.uint8).gather(-1, order)
        order = order.gather(-1, left_out.argsort(dim=-1, stable=True))
    return order.argsort(-1)
