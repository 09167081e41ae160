"""Few-shot learning: prototypes, and losses of an episode's embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._embeddings import alike, check_labels, check_rows, prepared, summed
from pyloss.ops._labels import outside
from pyloss.ops._launch import without_autocast

_UNDER_ROOT = 1e-6  # of a distance, as the authors have it: a gradient at 0
_OVER = 1e-7  # what a distance is divided by is at least this
_LEAST_SCORE = 1e-8


def _check_classes(name: str, labels: Tensor, classes: int) -> None:
    if checks.can_look_at(labels) and labels.numel():
        bad = labels[outside(labels, classes)]
        if bad.numel():
            raise IndexError(f"{name} must be in [0, {classes - 1}], got {int(bad[0])}")


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return labels[:, None] == torch.arange(classes, device=labels.device)


def prototypes(support: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Mean embedding of each class of a support set.

    .. math:: p_c = \operatorname*{mean}_{y_i = c} x_i

    Args:
        support: x ``(S, D)``, floating.
        labels: y ``(S,)``, integers from 0 to ``num_classes`` - 1, each at least once.
        num_classes: C.

    Returns:
        ``(C, D)``, of the dtype of ``support``; sums are in float32 at least. Differentiable in
        ``support``. A NaN makes its feature NaN. On a GPU, where nobody looks, a class without
        embeddings is NaN, and so is everything if a label is out of range.

    Raises:
        ValueError: a class without embeddings; wrong shapes. IndexError: a label out of range.
        TypeError: wrong dtypes.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 4.0]])
        >>> pyloss.functional.prototypes(x, torch.tensor([0, 0, 1]), 2)
        tensor([[1., 0.],
                [1., 4.]])

    Reference:
        Snell, Swersky, Zemel. Prototypical Networks for Few-shot Learning. arXiv 1703.05175.
    """
    check_rows("support", support)
    check_labels(labels, support, like_name="support")
    num_classes = checks.checked_integer("num_classes", num_classes)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    _check_classes("labels", labels, num_classes)
    member = _one_hot(labels, num_classes)
    if checks.can_look_at(labels):
        missing = (~member.any(0)).nonzero()
        if missing.numel():
            raise ValueError(
                f"labels must name every class, but class {int(missing[0])} is not there"
            )
    with without_autocast(support):
        x = prepared(support, False)
        share = member.to(x.dtype) / member.sum(0)
        # A label that is no class: nothing of the result can be relied on.
        share = torch.where(member.any(1, keepdim=True), share, torch.nan)
        return (share.mT @ x).to(support.dtype)


def check_proto_options(*, margin=0.5, reduction="mean") -> None:
    checks.check_range("margin", margin, 0.0)
    checks.check_reduction(reduction)


def proto_triplet_loss(
    queries: Tensor,
    query_labels: Tensor,
    prototypes: Tensor,
    margin: float = 0.5,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet loss of queries and prototypes: nearer to the own one than to the next, by a margin.

    .. math:: \ell_q = \Big(d(q, p_y) - \min_{c \ne y} d(q, p_c) + m\Big)_+, \qquad
              d(x, y) = \sqrt{\|x - y\|^2 + 10^{-6}}

    Args:
        queries: ``(Q, D)``, floating; computed in float32 at least, under autocast too.
        query_labels: ``(Q,)``, integers from 0 to C - 1.
        prototypes: ``(C, D)``, of the same dtype, under autocast or float32, C >= 2: as
            :func:`prototypes` gives them.
        margin: m, >= 0.
        reduction: ``"mean"`` or ``"sum"`` over queries, or ``"none"``.

    Returns:
        0-d, or ``(Q,)``; of the dtype of ``queries``, float32 for half types under autocast.
        Differentiable in queries and prototypes. A NaN makes what it is compared in NaN; so does,
        on a GPU, a label out of range.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, fewer than two prototypes, an
            option out of range. IndexError: a label out of range. RuntimeError: several devices.

    Example:
        >>> import torch, pyloss
        >>> p = torch.tensor([[0.0, 0.0], [4.0, 0.0]])
        >>> q = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> pyloss.functional.proto_triplet_loss(q, torch.tensor([0, 1]), p, reduction="none")
        tensor([0.0000, 0.5000])

    Reference:
        Mendez-Ruiz et al. SuSana Distancia is all you need. arXiv 2305.09062.
    """
    check_proto_options(margin=margin, reduction=reduction)
    check_rows("queries", queries)
    check_labels(query_labels, queries, "query_labels", "queries")
    check_rows("prototypes", prototypes, least=2)
    _check_alike("prototypes", prototypes, "queries", queries)
    _check_classes("query_labels", query_labels, prototypes.shape[0])
    dtype = checks.result_dtype(queries.dtype, queries)
    q, p = prepared(queries, False), prepared(prototypes, False)
    d = _distance(q[:, None], p)
    own = _one_hot(query_labels, p.shape[0])
    near = torch.where(own, d, 0.0).sum(1)
    next_one = torch.where(own, torch.inf, d).amin(1)
    each = (near - next_one + margin).relu()
    each = torch.where(own.any(1), each, torch.nan)
    if reduction == "none":
        return each.to(dtype)
    total = summed(each)
    return (total / each.shape[0] if reduction == "mean" else total).to(dtype)


def _check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if not alike(x, other) or x.shape[1] != other.shape[1]:
        raise ValueError(
            f"{name} must be {other.dtype} with {other.shape[1]} features as {other_name}, got "
            f"{x.dtype} {list(x.shape)}"
        )
    checks.check_device(name, x, other, other_name)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    between = x - y
    return ((between * between).sum(-1) + _UNDER_ROOT).sqrt()


# --------------------------------------------------------------------------------------------------
# Intra-class and inter-class distances of nearest neighbours


def check_icnn_options(*, k=4, neighbours=None, use_omega=False) -> tuple[int, int]:
    """(k, neighbours) as integers."""
    k = checks.checked_integer("k", k)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    checks.checked_flag("use_omega", use_omega)
    if neighbours is None:
        return k, k + 1
    neighbours = checks.checked_integer("neighbours", neighbours)
    if neighbours < k:
        raise ValueError(f"neighbours must be at least k = {k}, got {neighbours}")
    return k, neighbours


def icnn_score(
    embeddings: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    target_labels: Tensor | None = None,
    *,
    k: int = 4,
    neighbours: int | None = None,
    use_omega: bool = False,
) -> Tensor:
    r"""Score in (0, 1] of how well nearest neighbours tell the classes apart: intra-class and
    inter-class distances (ICNN).

    .. math:: \mathrm{score} = \tfrac12 \Big(\tfrac12 (\lambda_s + \lambda_d) + \gamma\Big)

    Of the k nearest neighbours j of a point i, at distances :math:`d_{ij} = \sqrt{\|x_i - t_j\|^2 +
    10^{-6}}`: gamma is the share of those of its class. :math:`1 - \lambda_s` is the mean over i of
    the mean over those of its class of :math:`r_{ij} = d_{ij} / m_i`, with m_i the distance to the
    nearest of another class (r is 0 without one), divided by the largest r_ij of i if that is above
    1. lambda_d is the mean over i of the mean distance to those of other classes, divided by the
    largest of all. Points without such neighbours do not count; without any, lambda_s is 0 and
    lambda_d is 1.

    Args:
        embeddings: x ``(N, D)``, floating; computed in float32 at least, under autocast too.
        labels: ``(N,)``, any integers.
        targets, target_labels: t ``(M, D)`` and ``(M,)``, M >= 3: what neighbours are taken from,
            as the support set or :func:`prototypes`. Default: the embeddings, each without itself.
        k: neighbours that are looked at; at most M - 2, and where it is no less gamma is 1.
        neighbours: among so many m_i is looked for; the authors take shot + query. Default: k + 1.
        use_omega: mean with a third term, 1 - var of the r of the own class - var of the scaled
            distances to others, as the published score has; its form was not verified.

    Returns:
        0-d; of the dtype of ``embeddings``, float32 for half types under autocast. Differentiable
        in the distances; which points are neighbours, and gamma, are constants. A NaN makes it NaN.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, fewer than three targets, an
            option out of range. RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> x = torch.cat([torch.randn(10, 4) + 20, torch.randn(10, 4) - 20])
        >>> bool(pyloss.functional.icnn_score(x, torch.arange(20) // 10) > 0.9)
        True

    Reference:
        Mendez-Ruiz et al. arXiv 2107.06992; SuSana Distancia is all you need. arXiv 2305.09062.
    """
    score, _ = _icnn(embeddings, labels, targets, target_labels, k, neighbours, use_omega)
    return score.to(checks.result_dtype(embeddings.dtype, embeddings))


def icnn_loss(
    embeddings: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    target_labels: Tensor | None = None,
    *,
    k: int = 4,
    neighbours: int | None = None,
    use_omega: bool = False,
) -> Tensor:
    r"""ICNN loss: nearest neighbours of the own class near, others far.

    .. math:: \ell = -\log \mathrm{score}

    with :func:`icnn_score`. Of an episode: the support set alone; queries with the support set or
    the prototypes as targets; or both sets together.

    Args:
        embeddings, labels, targets, target_labels, k, neighbours, use_omega: as for
            :func:`icnn_score`.

    Returns:
        As :func:`icnn_score`. Where no embedding has another one of its class, and with a single
        class, it is 0 and has no gradient.

    Raises:
        As :func:`icnn_score`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(20, 4, requires_grad=True)
        >>> pyloss.functional.icnn_loss(x, torch.arange(20) % 5).backward()
        >>> x.grad.shape
        torch.Size([20, 4])

    Reference:
        Mendez-Ruiz et al. SuSana Distancia is all you need. arXiv 2305.09062.
    """
    score, some = _icnn(embeddings, labels, targets, target_labels, k, neighbours, use_omega)
    loss = torch.where(some, -score.clamp(min=_LEAST_SCORE).log(), 0.0 * score)
    return loss.to(checks.result_dtype(embeddings.dtype, embeddings))


def _icnn(embeddings, labels, targets, target_labels, k, neighbours, use_omega):
    """(the score, whether a point has another one of its class)."""
    k, neighbours = check_icnn_options(k=k, neighbours=neighbours, use_omega=use_omega)
    check_rows("embeddings", embeddings)
    check_labels(labels, embeddings)
    if (targets is None) != (target_labels is None):
        raise ValueError("give both targets and target_labels, or neither")
    own = targets is None or (targets is embeddings and target_labels is labels)
    if own:
        targets, target_labels = embeddings, labels
    else:
        check_rows("targets", targets)
        _check_alike("targets", targets, "embeddings", embeddings)
        check_labels(target_labels, targets, "target_labels", "targets")
    if targets.shape[0] < 3:
        name = "embeddings" if own else "targets"
        raise ValueError(f"{name} must hold at least 3 rows, got {list(targets.shape)}")
    x = prepared(embeddings, False)
    t = x if own else prepared(targets, False)
    if x.shape[0] == 0:
        return x.sum() * torch.nan + 0 * t.sum(), torch.ones_like(x.sum(), dtype=torch.bool)
    all_counted = k + 2 >= t.shape[0]
    k = min(k, t.shape[0] - 2)
    d, same, some = _neighbours(x, labels, t, target_labels, own, max(neighbours, k))
    return _score(d, same, k, all_counted, use_omega), some


def _neighbours(x, labels, t, target_labels, own, count):
    """(distances to the nearest, ascending; whether they are of the own class; whether any is)."""
    with torch.no_grad():
        far = torch.cdist(x.detach(), t.detach(), compute_mode="donot_use_mm_for_euclid_dist")
        same = labels.long()[:, None] == target_labels.long()
        if own:
            itself = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
            far, same = far.masked_fill(itself, torch.inf), same & ~itself
        count = min(count, t.shape[0] - own)
        index = far.sort(dim=1, stable=True).indices[:, :count]
        nearest = same.gather(1, index)
    # As of a table: its gradient is summed in a fixed order.
    return _distance(x[:, None], F.embedding(index, t)), nearest, same.any()


def _score(d, same, k, all_counted, use_omega):
    other = torch.where(same, torch.inf, d).amin(1, keepdim=True)
    d, same = d[:, :k], same[:, :k]
    r = d / (other + _OVER)
    r = r / r.amax(1, keepdim=True).clamp(min=1)
    scaled = torch.where(same, 0.0, d)
    scaled = scaled / (scaled.amax((0, 1)) + _OVER)
    within, alike = _mean_of_means(r, same)
    across, unlike = _mean_of_means(scaled, ~same)
    within = torch.where(alike, 1 - within, 0.0 * within)
    across = torch.where(unlike, across, 1.0)
    share = torch.ones_like(within) if all_counted else same.to(d.dtype).mean()
    terms = [(within + across) / 2, share]
    if use_omega:
        terms.append(1 - _variance(r, same) - _variance(scaled, ~same))
    return sum(terms) / len(terms)


def _mean_of_means(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(the mean over rows that have some of the mean over what they have, whether any has)."""
    count = mask.sum(1)
    each = torch.where(mask, x, 0.0).sum(1) / count.clamp(min=1)
    rows = (count > 0).sum()
    return summed(each) / rows.clamp(min=1), rows > 0


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    count = mask.sum().clamp(min=1)
    mean = summed(torch.where(mask, x, 0.0)) / count
    return summed(torch.where(mask, (x - mean).square(), 0.0)) / count
