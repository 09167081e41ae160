"""Losses on pairs and triplets of labelled embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._embeddings import DISTANCES, labelled, summed
from pyloss.ops._launch import without_autocast
from pyloss.ops.similarity_softmax import margin_sums

MININGS = ("all", "hard", "semihard", "batch_hard")
AVERAGES = ("active", "all")


def check_pair_options(
    *, pos_margin=0.0, neg_margin=1.0, margin=0.05, mining="all", distance="euclidean",
    normalize=True, average="active", reduction="mean", alpha=2.0, beta=50.0, base=0.5,
    epsilon=None, m_pos=0.9, m_neg=0.5, lam_pos=1.0, lam_neg=1.0,
) -> None:  # fmt: skip
    """Those of the losses on pairs and triplets, also for their modules."""
    for name, value in (
        ("pos_margin", pos_margin), ("neg_margin", neg_margin), ("margin", margin),
        ("lam_pos", lam_pos), ("lam_neg", lam_neg),
    ):  # fmt: skip
        checks.check_range(name, value, 0.0)
    for name, value in (("base", base), ("m_pos", m_pos), ("m_neg", m_neg)):
        checks.check_number(name, value)
    checks.check_range("alpha", alpha, 0.0, open_low=True)
    checks.check_range("beta", beta, 0.0, open_low=True)
    if epsilon is not None:
        checks.check_range("epsilon", epsilon, 0.0)
    checks.check_one_of("mining", mining, MININGS)
    checks.check_one_of("distance", distance, DISTANCES)
    checks.check_one_of("average", average, AVERAGES)
    checks.checked_flag("normalize", normalize)
    checks.check_reduction(reduction)


def _reduced(each: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Of anchors; the mean is over what they counted, and 0 of nothing."""
    if reduction == "none":
        return each
    total = summed(each)
    return total / summed(counted).clamp(min=1) if reduction == "mean" else total


def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    m_pos: float = 0.9,
    m_neg: float = 0.5,
    lam_pos: float = 1.0,
    lam_neg: float = 1.0,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    r"""Threshold-consistent margin loss: one threshold of the cosine for all classes.

    .. math:: \ell = \lambda^+ \operatorname*{mean}_{P:\; s \le m^+} (m^+ - s)
              + \lambda^- \operatorname*{mean}_{N:\; s \ge m^-} (s - m^-)

    P are the pairs of one class, N the others. A regulariser, to be added to a loss that separates
    the classes. The cosines s stream through tiles: memory is that of the embeddings.

    Args:
        embeddings: ``(N, D)``, floating; computed in float32 at least, under autocast too.
        labels: ``(N,)``, any integers.
        m_pos, m_neg: thresholds that positives should be above, negatives below.
        lam_pos, lam_neg: weights, >= 0.
        ref_emb, ref_labels: ``(M, D)`` and ``(M,)``: what the embeddings are compared with, such as
            a memory, with a gradient; a copy of an embedding among them is its positive. Default:
            each other.

    Returns:
        0-d; of the dtype of ``embeddings``, float32 for half types under autocast. A side without
        such pairs is 0 and has no gradient. A NaN among the embeddings makes it NaN.

    Raises:
        TypeError, ValueError: tensors of a wrong dtype or shape, an option out of range.
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(32, 16, requires_grad=True)
        >>> pyloss.functional.tcm_loss(x, torch.arange(32) // 4).backward()
        >>> x.grad.shape
        torch.Size([32, 16])

    Reference:
        Zhang et al. Threshold-Consistent Margin Loss for Open-World Deep Metric Learning. arXiv
        2307.04047.
    """
    check_pair_options(m_pos=m_pos, m_neg=m_neg, lam_pos=lam_pos, lam_neg=lam_neg)
    given = labelled(embeddings, labels, ref_emb, ref_labels)
    with without_autocast(given.x):
        sums = margin_sums(
            given.x, given.y, above=m_neg, below=m_pos, first=given.first(),
            query_ids=given.labels, key_ids=given.others, same="positive",
        )  # fmt: skip
        positive = _reduced(sums.below, sums.below_count, "mean")
        negative = _reduced(sums.above, sums.above_count, "mean")
        return (lam_pos * positive + lam_neg * negative).to(given.dtype)


def contrastive_pair_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    distance: str = "euclidean",
    normalize: bool = True,
    average: str = "active",
    reduction: str = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    r"""Contrastive loss: pairs of one class near, others at least a margin apart.

    .. math:: \ell = \operatorname*{mean}_{P} (d - m^+)_+ + \operatorname*{mean}_{N} (m^- - d)_+

    Args:
        embeddings: ``(N, D)``, floating; computed in float32 at least, under autocast too.
        labels: ``(N,)``, any integers.
        pos_margin, neg_margin: m+ and m-, >= 0.
        distance: d: ``"euclidean"``, ``"squared"``, its square, or ``"cosine"``, 1 - the inner
            product.
        normalize: take the embeddings to length 1.
        average: what the means are over: pairs with a loss, ``"active"``, or ``"all"``.
        reduction: ``"mean"``; ``"sum"`` over pairs; or ``"none"``, the sum of each anchor.
        ref_emb, ref_labels: as for :func:`tcm_loss`.

    Returns:
        0-d, or ``(N,)``; of the dtype of ``embeddings``, float32 for half types under autocast. A
        mean without such pairs is 0 and has no gradient. A NaN makes what it is compared in NaN.

    Raises:
        As :func:`tcm_loss`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
        >>> pyloss.functional.contrastive_pair_loss(x, torch.tensor([0, 0, 1]))
        tensor(0.)

    Reference:
        Hadsell, Chopra, LeCun. Dimensionality Reduction by Learning an Invariant Mapping. 2006.
    """
    check_pair_options(
        pos_margin=pos_margin, neg_margin=neg_margin, distance=distance, normalize=normalize,
        average=average, reduction=reduction,
    )  # fmt: skip
    given = labelled(embeddings, labels, ref_emb, ref_labels, normalize)
    with without_autocast(given.x):
        d = given.distances(distance)
        found = 0.0
        for mask, excess in zip(given.kinds(), (d - pos_margin, neg_margin - d)):
            each = torch.where(mask, excess.relu(), 0.0)
            counted = mask if average == "all" else each > 0
            found = found + _reduced(each.sum(1), counted.sum(1), reduction)
        return found.to(given.dtype)


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.05,
    mining: str = "all",
    distance: str = "euclidean",
    normalize: bool = True,
    average: str = "active",
    reduction: str = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    r"""Triplet loss of a labelled batch: each anchor nearer to its class than to others.

    .. math:: \ell = \operatorname*{mean}_{(a, p, n)} (d_{ap} - d_{an} + m)_+

    The triplets come from the labels, where :func:`torch.nn.functional.triplet_margin_loss` is
    given them. They are not formed: distances are sorted, and each is weighted by the number of
    triplets with a loss that it is in; O(N^2 log N) time and O(N^2) memory for all N^3 of them.

    Args:
        embeddings: ``(N, D)``, floating; computed in float32 at least, under autocast too.
        labels: ``(N,)``, any integers.
        margin: m, >= 0.
        mining: which triplets: ``"all"``; ``"hard"``: the negative is no further than the positive;
            ``"semihard"``: further, but not by the margin; ``"batch_hard"``: of each anchor the
            furthest positive and the nearest negative.
        distance, normalize: as for :func:`contrastive_pair_loss`.
        average: what the mean is over: triplets with a loss, ``"active"``, or ``"all"`` that were
            mined.
        reduction: ``"mean"``; ``"sum"`` over triplets; or ``"none"``, the sum of each anchor.
        ref_emb, ref_labels: as for :func:`tcm_loss`; positives and negatives come from there.

    Returns:
        0-d, or ``(N,)``; of the dtype of ``embeddings``, float32 for half types under autocast. A
        mean without triplets is 0 and has no gradient. A NaN makes what it is compared in NaN.

    Raises:
        As :func:`tcm_loss`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        >>> y = torch.tensor([0, 0, 1])
        >>> pyloss.functional.triplet_margin_loss(x, y, margin=0.5, mining="batch_hard")
        tensor(1.2071)

    Reference:
        Schroff, Kalenichenko, Philbin. FaceNet. arXiv 1503.03832; Hermans, Beyer, Leibe. In Defense
        of the Triplet Loss for Person Re-Identification. arXiv 1703.07737.
    """
    check_pair_options(
        margin=margin, mining=mining, distance=distance, normalize=normalize, average=average,
        reduction=reduction,
    )  # fmt: skip
    given = labelled(embeddings, labels, ref_emb, ref_labels, normalize)
    with without_autocast(given.x):
        d = given.distances(distance)
        if 0 in d.shape:
            each = active = counted = d.sum(1)
        elif mining == "batch_hard":
            each, active, counted = _hardest_triplets(d, *given.kinds(), margin)
        else:
            each, active, counted = _sorted_triplets(d, *given.kinds(), margin, mining)
        counted = active if average == "active" else counted
        return _reduced(each, counted, reduction).to(given.dtype)


def _hardest_triplets(d, positive, negative, margin):
    """(loss, whether it is above 0, whether there is a triplet), (N,) each."""
    some = positive.any(1) & negative.any(1)
    furthest = torch.where(positive, d, -torch.inf).amax(1)
    nearest = torch.where(negative, d, torch.inf).amin(1)
    # 0 - 0 where there is none: infinities would leave a NaN in the gradient.
    between = torch.where(some, furthest, 0.0) - torch.where(some, nearest, 0.0)
    each = torch.where(some, (between + margin).relu(), 0.0)
    return each, each > 0, some


def _sorted_triplets(d, positive, negative, margin, mining):
    """(sum of the losses, triplets that have one, triplets that are mined), (N,) each.

    A sum of (d_p + m) - d_n is a sum of distances, each as often as it is in a triplet.
    """

    def counted(within: Tensor, harder: Tensor | None) -> Tensor:
        """Of the triplets with a loss and of the hard ones, those that are mined and have one."""
        if mining == "semihard":
            return (within - harder).clamp(min=0)
        # Where the margin is 0, or lost in rounding, equal distances are hard and have no loss.
        return harder.minimum(within) if mining == "hard" else within

    def rank(rows: Tensor, values: Tensor, right: bool) -> Tensor:
        return torch.searchsorted(rows, values, right=right, out_int32=True)

    with torch.no_grad():
        fixed, size = d.detach(), d.shape[1]
        # Of a positive p: negatives with d_n < d_p + m, with d_n <= d_p.
        near = torch.where(negative, fixed, torch.inf).sort(1).values
        closer = None if mining == "all" else rank(near, fixed, True)
        of_positive = counted(rank(near, fixed + margin, False), closer)
        of_positive = torch.where(positive, of_positive, 0).to(d.dtype)
        active = mined = of_positive.sum(1)
        if mining == "all":
            mined = positive.sum(1).to(d.dtype) * negative.sum(1)
        elif mining == "hard":
            mined = torch.where(positive, closer, 0).sum(1)
        del near, closer
        # Of a negative n the same comparisons, in the same rounding.
        far = torch.where(positive, fixed, -torch.inf).sort(1).values
        beyond = None if mining == "all" else size - rank(far, fixed, False)
        of_negative = counted(size - rank(far + margin, fixed, True), beyond)
        of_negative = torch.where(negative, of_negative, 0).to(d.dtype)
        del far, beyond
    each = (of_positive * (d + margin)).sum(1) - (of_negative * d).sum(1)
    return each, active, mined


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = None,
    reduction: str = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    r"""Multi-similarity loss: soft sums over the hard positives and negatives of each anchor.

    .. math:: \ell_i = \frac1\alpha \log\Big(1 + \sum_{p} e^{-\alpha (s_{ip} - b)}\Big)
              + \frac1\beta \log\Big(1 + \sum_{n} e^{\beta (s_{in} - b)}\Big)

    Args:
        embeddings: ``(N, D)``, floating; computed in float32 at least, under autocast too. s are
            their cosines.
        labels: ``(N,)``, any integers.
        alpha, beta: > 0.
        base: b.
        epsilon: mine: keep negatives with :math:`s > \min_p s_{ip} - \epsilon` and positives with
            :math:`s < \max_n s_{in} + \epsilon`; 0.1 in the paper. None: keep all.
        reduction: ``"mean"`` or ``"sum"`` over anchors, or ``"none"``.
        ref_emb, ref_labels: as for :func:`tcm_loss`.

    Returns:
        0-d, or ``(N,)``; of the dtype of ``embeddings``, float32 for half types under autocast. A
        sum without terms is 0 and has no gradient. A NaN makes what it is compared in NaN.

    Raises:
        As :func:`tcm_loss`.

    Example:
        >>> import torch, pyloss
        >>> x = torch.randn(32, 16, requires_grad=True)
        >>> pyloss.functional.multi_similarity_loss(x, torch.arange(32) // 4, epsilon=0.1).shape
        torch.Size([])

    Reference:
        Wang et al. Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning.
        arXiv 1904.06627.
    """
    check_pair_options(alpha=alpha, beta=beta, base=base, epsilon=epsilon, reduction=reduction)
    given = labelled(embeddings, labels, ref_emb, ref_labels)
    with without_autocast(given.x):
        s = given.x @ given.y.mT
        positive, negative = given.kinds()
        if epsilon is not None and 0 not in s.shape:
            positive, negative = _mined(s.detach(), positive, negative, epsilon)
        each = _soft_sum(-alpha * (s - base), positive) / alpha
        each = each + _soft_sum(beta * (s - base), negative) / beta
        return _reduced(each, torch.ones_like(each), reduction).to(given.dtype)


def _mined(s, positive, negative, epsilon):
    """The pairs that are not easy; without the other kind none is hard. A NaN is never easy."""
    least = torch.where(positive, s, torch.inf).amin(1, keepdim=True)
    most = torch.where(negative, s, -torch.inf).amax(1, keepdim=True)
    return positive & ~(s - epsilon >= most), negative & ~(s + epsilon <= least)


def _soft_sum(z: Tensor, mask: Tensor) -> Tensor:
    """log(1 + sum of e^z over the mask)."""
    one = z.new_zeros(z.shape[0], 1)
    return torch.cat([one, torch.where(mask, z, -torch.inf)], 1).logsumexp(1)
