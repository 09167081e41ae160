"""Learning by sorting: positives in front of negatives, in the order of a relaxed sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sorting_rows import (
    applied,
    check_choice,
    check_ordered,
    checked_settings,
    rows_of,
)
from pyloss.ops import similarity_topk as nearest
from pyloss.ops import sorting_network as op
from pyloss.ops._launch import accumulator_dtype, without_autocast

_FLOOR = 100.0  # of -log q, as torch's binary cross entropy has it


def check_scores_options(
    *, steepness=1.0, network="odd_even", distribution="cauchy", art_lambda=0.25, reduction="mean"
) -> op.Settings:
    """Those of groco_from_scores, as settings of the op."""
    check_choice("reduction", reduction, op.REDUCTIONS)
    return checked_settings(network, distribution, steepness, art_lambda)


def check_options(*, n_pos=None, topk_neg=10, stop_grad=True, **options) -> op.Settings:
    """Those of groco_loss, also for its module, which finds a typo when it is made."""
    for name, value in (("n_pos", n_pos), ("topk_neg", topk_neg)):
        if value is not None or name == "topk_neg":
            value = checks.checked_integer(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
    return check_scores_options(**options)


def groco_from_scores(
    pos: Tensor,
    neg: Tensor,
    *,
    steepness: float | Tensor = 1.0,
    network: str = "odd_even",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    reduction: str = "mean",
) -> Tensor:
    r"""Group ordering loss: every positive score above every negative one.

    .. math:: \ell = -\frac{1}{n} \sum_i \log q_i, \qquad
              q_i = \sum_{r \in \text{block of } i} P_{ir}

    s are the negatives and behind them the positives, each ascending, P the relaxed permutation
    that sorts s, and the block of i is the first K ranks for a negative, the last for a positive. P
    itself is not formed: the masses of the blocks are two vectors pushed through the network.

    Args:
        pos: scores of the positives ``(..., Np)``, floating, larger is nearer.
        neg: scores of the negatives ``(..., K)``; leading dimensions broadcast against those of
            ``pos``. -inf marks entries that are none; they still count in the mean.
        steepness, network, distribution, art_lambda: as in :func:`pyloss.soft_sort`.
        reduction: ``"mean"`` or ``"sum"`` over the leading dimensions, or ``"none"``.

    Returns:
        0-d, or of the leading shape; of the promoted dtype, float32 for half types under autocast.
        A row with a NaN gives NaN. Twice differentiable.

    Raises:
        TypeError: scores that are no floating tensors; an option of the wrong type.
        ValueError: no positives or no negatives; shapes or devices that do not fit; an unknown name
            or an option out of range.

    Example:
        >>> import torch, pyloss
        >>> pos, neg = torch.tensor([[0.9]]), torch.tensor([[0.1, 0.3, 0.2]])
        >>> good = pyloss.functional.groco_from_scores(pos, neg, steepness=10.0)
        >>> bool(good < pyloss.functional.groco_from_scores(-pos, neg, steepness=10.0))
        True

    Reference:
        Shvetsova, Petersen, Kukleva, Schiele, Kuehne. arXiv 2301.02009.
    """
    settings = check_scores_options(
        steepness=steepness, network=network, distribution=distribution, art_lambda=art_lambda,
        reduction=reduction,
    )  # fmt: skip
    for name, scores in (("pos", pos), ("neg", neg)):
        check_ordered(name, scores)
        checks.check_has_dimension(name, scores)
        if scores.shape[-1] == 0:
            raise ValueError(f"{name} must hold at least one score, got {list(scores.shape)}")
    if neg.device != pos.device:
        raise ValueError(f"neg is on {neg.device}, pos on {pos.device}")
    try:
        lead = torch.broadcast_shapes(pos.shape[:-1], neg.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"the leading shape {list(neg.shape[:-1])} of neg does not broadcast with "
            f"{list(pos.shape[:-1])} of pos"
        ) from None
    dtype = torch.promote_types(pos.dtype, neg.dtype)
    blocks = [
        t.to(dtype).expand(*lead, t.shape[-1]).sort(-1).values.to(accumulator_dtype(dtype))
        for t in (neg, pos)
    ]
    each = _loss_of(torch.cat(blocks, -1), neg.shape[-1], settings)
    return op.reduced(each, reduction).to(checks.result_dtype(dtype, pos))


def groco_loss(
    views: Tensor | Sequence[Tensor],
    *,
    n_pos: int | None = None,
    topk_neg: int = 10,
    steepness: float = 1.0,
    network: str = "odd_even",
    distribution: str = "cauchy",
    art_lambda: float = 0.25,
    stop_grad: bool = True,
    reduction: str = "mean",
    group: Any = None,
) -> Tensor:
    r"""GroCo: views of one image nearer to each other than the nearest other images are.

    .. math:: \ell = \frac{1}{V B} \sum_{a, i} \text{groco}\big(
              \{\cos(z_{a,i}, z_{p,i})\}_{p \ne a},\;
              K \text{ largest of } \{\cos(z_{a,i}, z_{a,j})\}_{j \ne i}\big)

    with :func:`groco_from_scores` as groco. The K nearest negatives are taken out of tiles of the
    similarities: memory is one tile, whatever the batch.

    Args:
        views: V embeddings ``(B, D)`` of the same B images, as a sequence or as ``(V, B, D)``,
            floating; computed in float32 at least, under autocast too.
        n_pos: how many of the first views may be positives, as large crops are; default: all. Each
            view is an anchor.
        topk_neg: K; there must be more than K images.
        steepness, network, distribution, art_lambda: as in :func:`pyloss.soft_sort`.
        stop_grad: gradients reach the anchors alone, not what they are compared with.
        reduction: ``"mean"`` or ``"sum"`` over anchors, or ``"none"``.
        group: a process group: negatives come from the batches of all its ranks, which may differ
            in size. The mean over the ranks of their ``"mean"`` is the loss of the whole batch, and
            so is its gradient as DDP averages it; ``"sum"`` and ``"none"`` are of a rank's own
            anchors. Not for ``fullgraph=True``.

    Returns:
        0-d, or ``(V, B)``; of the dtype of the views, float32 for half types under autocast. A NaN
        reaches the losses that it is compared in.

    Raises:
        TypeError: views that are no floating tensors; an option of the wrong type.
        ValueError: fewer than two views, or one as the only positive; shapes, dtypes or devices
            that differ; too few images for ``topk_neg``; an option out of range.

    Example:
        >>> import torch, pyloss
        >>> z = torch.randn(2, 32, 16, requires_grad=True)
        >>> pyloss.groco_loss(z, topk_neg=5).backward()
        >>> z.grad.shape
        torch.Size([2, 32, 16])

    Reference:
        Shvetsova, Petersen, Kukleva, Schiele, Kuehne. arXiv 2301.02009.
    """
    settings = check_options(
        n_pos=n_pos, topk_neg=topk_neg, steepness=steepness, network=network,
        distribution=distribution, art_lambda=art_lambda, reduction=reduction,
    )  # fmt: skip
    views = _checked_views(views)
    count, (images, _) = len(views), views[0].shape
    n_pos = count if n_pos is None else checks.checked_integer("n_pos", n_pos)
    topk_neg = checks.checked_integer("topk_neg", topk_neg)
    if n_pos > count:
        raise ValueError(f"n_pos must be at most {count}, the number of views, got {n_pos}")
    if count < 2:
        raise ValueError("views must be at least two: one alone has no positive")
    if n_pos == 1:
        raise ValueError("n_pos must be at least 2: the first view has no positive else")
    dtype = views[0].dtype
    result = checks.result_dtype(dtype, views[0])
    # Not under autocast: cosines of near neighbours differ by less than half types tell apart.
    with without_autocast(views[0]):
        views = [z.to(accumulator_dtype(dtype)) for z in views]
        if count == n_pos == 2 and stop_grad and group is None and images > topk_neg:
            scores = _scores_of_two(views, topk_neg)
            return op.reduced(_loss_of(scores, topk_neg, settings), reduction).to(result)
        units = [_unit_rows(z) for z in views]
        keys = [u.detach() for u in units] if stop_grad else units
        others, first = keys, 0  # what negatives are taken from, and where this rank's begin
        if group is not None:
            from pyloss.ops.similarity_topk.group import gathered

            others, first = gathered(torch.stack(keys), group)
        if others[0].shape[0] <= topk_neg:
            raise ValueError(
                f"topk_neg must be below the number of images, {others[0].shape[0]}, got {topk_neg}"
            )
        each = [None] * count
        # Views with as many positives make rows of one length, and go through the network at once.
        for anchors in (range(n_pos), range(n_pos, count)):
            rows = [
                _scores(
                    units[a], [keys[p] for p in range(n_pos) if p != a], others[a], topk_neg, first
                )
                for a in anchors
            ]
            if rows:
                found = _loss_of(torch.cat(rows), topk_neg, settings).view(len(rows), images)
                each[anchors.start : anchors.stop] = found.unbind(0)
        each = torch.stack(each)
        if group is not None and reduction == "mean":
            from pyloss.functional._contrastive_group import mean

            return mean(each.sum(), each.numel(), group).to(result)
        return op.reduced(each, reduction).to(result)


def _checked_views(views) -> list[Tensor]:
    if isinstance(views, Tensor):
        check_ordered("views", views)
        if views.dim() != 3:
            raise ValueError(
                f"views must be (V, B, D), or a sequence of (B, D), got {list(views.shape)}"
            )
        return list(views.unbind(0))
    if not isinstance(views, (list, tuple)):
        raise TypeError(f"views must be a Tensor or a sequence of them, got {type(views).__name__}")
    for at, z in enumerate(views):
        name = f"views[{at}]"
        check_ordered(name, z)
        if z.dim() != 2:
            raise ValueError(f"{name} must be (B, D), got {list(z.shape)}")
        first = views[0]
        if z.shape != first.shape or z.dtype != first.dtype or z.device != first.device:
            raise ValueError(
                f"views must be alike, but {name} is {z.dtype} {list(z.shape)} on {z.device} and "
                f"views[0] {first.dtype} {list(first.shape)} on {first.device}"
            )
    return list(views)


def _unit_rows(x: Tensor) -> Tensor:
    """F.normalize with eps 1e-8; a backward of half as many passes over x."""
    return x * x.square().sum(-1, keepdim=True).clamp_min(nearest.SHORTEST).rsqrt()


def _scores_of_two(views: list[Tensor], topk_neg: int) -> Tensor:
    """(2, B, K + 1) of two views, each an anchor."""

    def compose(views: list[Tensor]) -> Tensor:
        units = [_unit_rows(z) for z in views]
        keys = [u.detach() for u in units]
        return torch.stack([_scores(units[a], [keys[1 - a]], keys[a], topk_neg, 0) for a in (0, 1)])

    if nearest.transforms_active() or torch.compiler.is_compiling():
        return compose(views)
    return nearest.anchor_scores(views, topk_neg, compose)


def _scores(
    anchor: Tensor, positives: list[Tensor], others: Tensor, topk_neg: int, first: int
) -> Tensor:
    """(B, K + Np): an anchor's nearest negatives, ascending, and its positives, ascending."""
    neg, _ = nearest.similarity_topk(anchor, others, topk_neg, first)
    pos = torch.stack([(anchor * p).sum(-1) for p in positives], -1)
    return torch.cat([neg.flip(-1), pos.sort(-1).values if len(positives) > 1 else pos], -1)


def _loss_of(scores: Tensor, count: int, settings: op.Settings) -> Tensor:
    """(...): scores (..., n) hold `count` negatives and then positives, both ascending."""
    rows = rows_of("scores", scores, -1, False, settings)
    below = (torch.arange(rows.n, device=scores.device) < count).to(rows.x.dtype)
    # Both masses: the small one of the two, as 1 less the other, would lose its digits.
    masses = applied(rows, torch.stack([below, 1 - below], -1).unsqueeze(0), False)
    q = torch.cat([masses[:, :count, 0], masses[:, count:, 1]], 1)
    tiny = max(torch.finfo(q.dtype).tiny, math.exp(-_FLOOR))
    surprise = torch.where(q < tiny, _FLOOR, -q.clamp(tiny, 1.0).log())
    return surprise.mean(1).view(rows.lead)
