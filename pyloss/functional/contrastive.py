"""Contrastive losses. The similarities stream through tiles: memory is O(B), whatever the loss.

All take features ``(B, D)`` and normalise them unless told not to. Rows that have nothing to learn
from are 0, get no gradient and do not count in the mean; where no row counts, the mean is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._contrastive import (
    Features,
    at_once,
    check_common,
    check_finite,
    check_positive,
    check_same_rows,
    checked_fraction,
    checked_labels,
    hardest_count,
    joined,
    of_columns,
    of_rows,
    other_views,
    pair_sums_over,
    shares,
    softmax_over,
)
from pyloss.ops._labels import outside
from pyloss.ops.similarity_softmax import similarity_softmax
from pyloss.ops.similarity_softmax.call import COLUMNS
from pyloss.ops.similarity_softmax.loss import SIGMOID, VIEWS
from pyloss.ops.similarity_topk import similarity_hardest


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    target: Tensor | None = None,
    ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    in_batch: bool = True,
    normalize: bool = True,
    symmetric: bool = False,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> Tensor:
    r"""InfoNCE: the key of each query among the keys of the others.

    .. math:: \ell_i = -\log \frac{e^{s_{i t_i} / T}}{\sum_{j \in K_i} e^{s_{ij} / T}}, \qquad
              s_{ij} = \cos(q_i, k_j)

    K holds the positive, the other keys of the batch and those of the queue.

    Args:
        query: ``(B, D)``, floating.
        key: ``(B, D)``, or ``(M, D)`` with ``target``.
        queue: ``(Q, D)``: further negative keys of all queries.
        temperature: T > 0, or a tensor of one number or of one a query, with a gradient.
        target: ``(B,)``, integer: which key is a query's positive; default: the key of its row. -1
            is none: the query has the loss 0, and the mean does not count it.
        ids: ``(B,)``, integer: of which item a query is. Keys of the same item that are not the
            positive are no negatives.
        key_ids: ``(M,)`` of the keys; default: ``ids``.
        queue_ids: ``(Q,)`` of the queue; default: all of it is of other items.
        in_batch: whether the other keys of the batch are negatives. In MoCo the queue has them all.
        normalize: cosines; else inner products of the features as they are.
        symmetric: the mean of this and of the same loss with queries and keys exchanged, from one
            pass over the products.
        reduction: ``"mean"`` or ``"sum"`` over queries, or ``"none"``.
        group: a process group: keys come from the batches of all its ranks, which may differ in
            size. The mean over the ranks of their ``"mean"`` is the loss of the joined batch, and
            so is its gradient as DDP averages it; ``"sum"`` and ``"none"`` are a rank's own, as are
            the queue, and the keys that ``target`` counts. Every rank must call it, and run the
            backward. Not for ``fullgraph=True``.
        ring: with ``group``: keys go around the ranks, and none holds them all; no second
            derivatives.

    Returns:
        0-d, or ``(B,)``; of the promoted dtype, float32 for half types under autocast. A query
        without negatives has the loss 0, and so has the mean of no queries.

    Raises:
        TypeError: features that are no floating tensors; an option of the wrong type.
        ValueError: shapes that do not fit; options that exclude each other or are out of range.
        IndexError: a target that is no key (CPU).
        RuntimeError: tensors on several devices.

    Example:
        >>> import torch, pyloss
        >>> query, key = torch.randn(2, 32, 16)
        >>> temperature = torch.tensor(0.1, requires_grad=True)
        >>> pyloss.info_nce(query, key, temperature=temperature).backward()
        >>> queue = torch.randn(4096, 16)
        >>> pyloss.info_nce(query, key, queue, in_batch=False).shape  # MoCo
        torch.Size([])

    Reference:
        van den Oord, Li, Vinyals. arXiv 1807.03748. He, Fan, Wu, Xie, Girshick. arXiv 1911.05722.
    """
    check_info_nce(temperature, in_batch, normalize, symmetric, reduction, group, ring)
    given = {"query": query, "key": key}
    features = Features(normalize, **given, **({} if queue is None else {"queue": queue}))
    rows = query.shape[0]
    if target is None:
        check_same_rows("key", key, "query", query)
    else:
        target = _checked_target(target, query, key)
    _check_together(queue, target, ids, key_ids, queue_ids, in_batch, symmetric)
    scale = features.inverse("temperature", temperature, None if symmetric else rows)
    if queue is None and target is None and ids is None:
        flags = COLUMNS if symmetric else 0
        found = at_once(features, query, key, scale, reduction, group, flags)
        if found is not None:
            return found
    q, k = features.of(query), features.of(key)
    others = None if queue is None else features.of(queue)
    masks = {}
    if ids is not None:
        masks = _masks(query, ids, key, key_ids, queue, queue_ids, in_batch)
    if not in_batch:
        stats = similarity_softmax(q, others, scale, **masks)
        own, counted = k, None
        if target is not None:
            own, counted = k[target.clamp(min=0)], target >= 0
        positive = (q.to(features.sums) * own).sum(1) * scale
        return features.reduced(-F.logsigmoid(positive - stats.lse), reduction, counted, group)
    options = dict(columns=symmetric)
    options["target"] = torch.arange(rows, device=q.device) if target is None else target
    if group is None or others is None:
        keys = k if others is None else joined(k, others)
        stats = softmax_over(group, ring)(q, keys, scale, **options, **masks)
    else:  # the queue is no other rank's
        of_batch, of_queue = _split_masks(masks, k.shape[0])
        stats = softmax_over(group, ring)(q, k, scale, **options, **of_batch)
        more = similarity_softmax(q, others, scale, **of_queue)
        lse = torch.logaddexp(stats.lse, more.lse)
        stats = stats._replace(lse=lse, count=stats.count + more.count)
    each = of_rows(stats)
    if symmetric:
        each = 0.5 * (each + of_columns(stats))
    return features.reduced(each, reduction, None if target is None else target >= 0, group)


def check_info_nce(
    temperature, in_batch, normalize, symmetric, reduction, group=None, ring=False
) -> None:
    check_positive("temperature", temperature)
    checks.checked_flag("in_batch", in_batch)
    checks.checked_flag("symmetric", symmetric)
    check_common(normalize, reduction, group, ring)


def _checked_target(target, query: Tensor, key: Tensor) -> Tensor:
    """Out of range on a device that is not looked at: as -1."""
    target, count = checked_labels("target", target, query.shape[0], query), key.shape[0]
    if checks.can_look_at(target):
        checks.check_index_values(target, count, -1)
        return target
    return torch.where(outside(target, count), -1, target)


def _check_together(queue, target, ids, key_ids, queue_ids, in_batch, symmetric) -> None:
    if queue is None and not in_batch:
        raise ValueError("in_batch=False needs a queue: there are no other negatives")
    if symmetric and (queue is not None or target is not None):
        raise ValueError("symmetric needs one key for each query, without queue and target")
    if ids is None and (key_ids is not None or queue_ids is not None):
        raise ValueError("key_ids and queue_ids need ids, those of the queries")
    if queue is None and queue_ids is not None:
        raise ValueError("queue_ids needs a queue")
    if ids is not None and target is not None and key_ids is None and in_batch:
        raise ValueError("ids with target needs key_ids, those of the keys")


def _masks(query, ids, key, key_ids, queue, queue_ids, in_batch) -> dict:
    """What leaves out the keys of the same item."""
    ids = checked_labels("ids", ids, query.shape[0], query)
    parts = []
    if in_batch:
        key_ids = ids if key_ids is None else key_ids
        parts.append(checked_labels("key_ids", key_ids, key.shape[0], query))
    if queue is not None:
        if queue_ids is None:
            # An id that no query has; nobody waits for it.
            other = ids.min() - 1 if ids.shape[0] else ids.new_zeros(())
            queue_ids = other.expand(queue.shape[0])
        parts.append(checked_labels("queue_ids", queue_ids, queue.shape[0], query))
    return {"query_ids": ids, "key_ids": torch.cat(parts), "same": "drop"}


def _split_masks(masks: dict, count: int) -> tuple[dict, dict]:
    """Of the first so many keys, and of the others."""
    if not masks:
        return {}, {}
    parts = masks["key_ids"][:count], masks["key_ids"][count:]
    of_batch, of_queue = ({**masks, "key_ids": part} for part in parts)
    return of_batch, of_queue


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> Tensor:
    r"""NT-Xent of SimCLR: of each view, the other view of its image among all other views.

    .. math:: \ell_a = -\log \frac{e^{s_{a p(a)} / T}}{\sum_{b \ne a} e^{s_{ab} / T}}, \qquad
              s_{ab} = \cos(z_a, z_b)

    a runs through the 2B views, and p(a) is the other view of the same image.

    Args:
        z1, z2: the two views of B images, ``(B, D)`` each, floating.
        temperature: T > 0, or a tensor of one number, with a gradient.
        normalize: cosines; else inner products of the features as they are.
        reduction: ``"mean"`` or ``"sum"`` over the 2B views, or ``"none"``.
        group, ring: as for :func:`info_nce`.

    Returns:
        0-d, or ``(2B,)``, the views of ``z1`` first; dtype as :func:`info_nce`. One image alone has
        no negatives: its loss is 0, and so is the mean of no images.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> z1, z2 = torch.randn(2, 32, 16, requires_grad=True)
        >>> pyloss.nt_xent(z1, z2, temperature=0.2).backward()

    Reference:
        Chen, Kornblith, Norouzi, Hinton. arXiv 2002.05709.
    """
    check_nt_xent(temperature, normalize, reduction, group, ring)
    features = Features(normalize, z1=z1, z2=z2)
    check_same_rows("z2", z2, "z1", z1)
    scale = features.inverse("temperature", temperature)
    found = at_once(features, z1, z2, scale, reduction, group, VIEWS)
    if found is not None:
        return found
    z, other = features.of(z1, z2), other_views(z1)
    stats = softmax_over(group, ring)(z, z, scale, first=0, target=other)
    return features.reduced(of_rows(stats), reduction, group=group)


def check_nt_xent(temperature, normalize, reduction, group=None, ring=False) -> None:
    check_positive("temperature", temperature)
    check_common(normalize, reduction, group, ring)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 1 / 0.07,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> Tensor:
    r"""The loss of CLIP: each image's text among all texts, and each text's image, on average.

    .. math:: \ell_i = -\frac12 \Big(\log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
              + \log \frac{e^{z_{ii}}}{\sum_j e^{z_{ji}}}\Big), \qquad
              z_{ij} = \lambda \cos(x_i, y_j)

    Args:
        image_features: x ``(B, D)``, floating.
        text_features: y ``(B, D)``.
        logit_scale: lambda > 0, the factor itself and not its logarithm, or a tensor of one number,
            with a gradient, as open_clip's models return it.
        normalize: cosines. Features that have been normalised, as open_clip's are, give the same.
        reduction: ``"mean"`` or ``"sum"`` over pairs, or ``"none"``.
        group, ring: as for :func:`info_nce`.

    Returns:
        0-d, or ``(B,)``; dtype as :func:`info_nce`. One pair alone, and no pairs: 0.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> image, text = torch.randn(2, 32, 16)
        >>> log_scale = torch.tensor(2.66, requires_grad=True)
        >>> pyloss.clip_loss(image, text, log_scale.exp()).backward()
        >>> log_scale.grad.shape
        torch.Size([])

    Reference:
        Radford et al. arXiv 2103.00020.
    """
    check_clip(logit_scale, normalize, reduction, group, ring)
    features = Features(normalize, image_features=image_features, text_features=text_features)
    check_same_rows("text_features", text_features, "image_features", image_features)
    scale = features.scale("logit_scale", logit_scale)
    found = at_once(features, image_features, text_features, scale, reduction, group, COLUMNS)
    if found is not None:
        return found
    stats = softmax_over(group, ring)(
        features.of(image_features), features.of(text_features), scale, columns=True,
        target=torch.arange(image_features.shape[0], device=image_features.device),
    )  # fmt: skip
    each = 0.5 * (of_rows(stats) + of_columns(stats))
    return features.reduced(each, reduction, group=group)


def check_clip(logit_scale, normalize, reduction, group=None, ring=False) -> None:
    check_positive("logit_scale", logit_scale)
    check_common(normalize, reduction, group, ring)


def supervised_contrastive(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> Tensor:
    r"""Supervised contrastive loss: all of one class are positives, in the "out" form.

    .. math:: \ell_a = -\frac{1}{|P_a|} \sum_{p \in P_a}
              \log \frac{e^{s_{ap} / T}}{\sum_{b \ne a} e^{s_{ab} / T}}, \qquad
              P_a = \{p \ne a : y_p = y_a\}

    Args:
        features: ``(B, D)``, or ``(B, V, D)`` with V views of each, floating.
        labels: y ``(B,)``, integer.
        temperature: T > 0, or a tensor of one number, with a gradient.
        normalize: cosines; else inner products of the features as they are.
        reduction: ``"mean"`` or ``"sum"`` over features, or ``"none"``. One without a positive or
            without a negative, as in a batch of one class, has the loss 0, and the mean does not
            count it.
        group, ring: as for :func:`info_nce`.

    Returns:
        0-d, or of the leading shape of ``features``; dtype as :func:`info_nce`.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> views = torch.randn(32, 2, 16, requires_grad=True)
        >>> pyloss.supervised_contrastive(views, torch.randint(4, (32,))).backward()

    Reference:
        Khosla et al. arXiv 2004.11362.
    """
    check_nt_xent(temperature, normalize, reduction, group, ring)
    checks.check_tensor("features", features)
    if features.dim() not in (2, 3):
        raise ValueError(f"features must be (B, D) or (B, V, D), got {list(features.shape)}")
    lead = features.shape[:-1]
    labels = checked_labels("labels", labels, lead[0], features)
    if features.dim() == 3:
        labels, features = labels.repeat_interleave(lead[1]), features.flatten(0, 1)
    checked = Features(normalize, features=features)
    scale = checked.inverse("temperature", temperature)
    found = at_once(checked, features, None, scale, reduction, group, 0, labels=labels)
    if found is not None:
        return found
    z = checked.of(features)
    stats = softmax_over(group, ring)(
        z, z, scale, first=0, query_ids=labels, key_ids=labels, same="positive"
    )
    each = stats.lse - stats.positive / stats.positives.clamp(min=1)
    counted = (stats.positives > 0) & (stats.count > stats.positives)
    found = checked.reduced(each, reduction, counted, group)
    return found.view(lead) if reduction == "none" else found


def dcl(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sigma: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> Tensor:
    r"""Decoupled contrastive loss: NT-Xent without the positive in the denominator.

    .. math:: \ell_a = -w_a \frac{s_{a p(a)}}{T} + \log \sum_{b \ne a, p(a)} e^{s_{ab} / T},
              \qquad w_a = 2 - B \, \mathrm{softmax}_a\big(s_{a p(a)} / \sigma\big)

    a runs through the 2B views; the softmax goes over images, and w is 1 without ``sigma``.

    Args:
        z1, z2: the two views of B images, ``(B, D)`` each, floating.
        temperature: T > 0, or a tensor of one number, with a gradient.
        sigma: > 0: positives that agree already count less (DCLW). No gradient goes through w.
        normalize: cosines; else inner products of the features as they are.
        reduction: ``"mean"`` or ``"sum"`` over the 2B views, or ``"none"``.
        group, ring: as for :func:`info_nce`.

    Returns:
        0-d, or ``(2B,)``, the views of ``z1`` first; dtype as :func:`info_nce`. It may be negative.
        One image alone has no negatives: its loss is 0, and so is the mean of no images.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> z1, z2 = torch.randn(2, 32, 16, requires_grad=True)
        >>> pyloss.functional.dcl(z1, z2).backward()

    Reference:
        Yeh et al. Decoupled Contrastive Learning. arXiv 2110.06848.
    """
    check_dcl(temperature, sigma, normalize, reduction, group, ring)
    features = Features(normalize, z1=z1, z2=z2)
    check_same_rows("z2", z2, "z1", z1)
    scale = features.inverse("temperature", temperature)
    z, other = features.of(z1, z2), other_views(z1)
    stats = softmax_over(group, ring)(z, z, scale, first=0, target=other, denominator="negatives")
    positive = stats.positive
    if sigma is not None:
        first, second = z.detach().to(features.sums).chunk(2)
        agreed = (first * second).sum(1)
        weight = 2 - shares(agreed / sigma, group)
        positive = positive * torch.cat([weight, weight])
    return features.reduced(stats.lse - positive, reduction, stats.count > 0, group)


def check_dcl(temperature, sigma, normalize, reduction, group=None, ring=False) -> None:
    check_nt_xent(temperature, normalize, reduction, group, ring)
    if sigma is not None:
        checks.check_range("sigma", sigma, 0.0, open_low=True)


def hard_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    hard_fraction: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""InfoNCE against the hardest negatives alone.

    .. math:: \ell_i = -\log \frac{e^{s_{ii} / T}}{e^{s_{ii} / T} + \sum_{j \in H_i} e^{s_{ij} / T}}

    H holds the most similar keys of other queries, a fraction of them.

    Args:
        query, key: ``(B, D)`` each, floating.
        temperature: T > 0, or a tensor of one number or of one a query, with a gradient.
        hard_fraction: in (0, 1]: of n = B - 1 negatives, ceil(hard_fraction n) are kept, of equal
            ones the first. 1 is :func:`info_nce`.
        normalize: cosines; else inner products of the features as they are.
        reduction: ``"mean"`` or ``"sum"`` over queries, or ``"none"``.

    Returns:
        0-d, or ``(B,)``; dtype as :func:`info_nce`. One query alone, and none: 0.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> query, key = torch.randn(2, 32, 16, requires_grad=True)
        >>> pyloss.functional.hard_info_nce(query, key, hard_fraction=0.25).backward()

    Reference:
        Wang, Liu. Understanding the Behaviour of Contrastive Loss. arXiv 2012.09740.
    """
    check_hard_info_nce(temperature, hard_fraction, normalize, reduction)
    features = Features(normalize, query=query, key=key)
    check_same_rows("key", key, "query", query)
    rows = query.shape[0]
    negatives = max(0, rows - 1)
    count = hardest_count(hard_fraction, negatives)
    if count == negatives:
        return info_nce(
            query, key, temperature=temperature, normalize=normalize, reduction=reduction
        )
    scale = features.inverse("temperature", temperature, rows)
    q, k = features.exact(query), features.exact(key)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=q.dtype, device=q.device)
    lse, _ = similarity_hardest(q, k, scale, count, 0)
    positive = (q * k).sum(1) * scale
    return features.reduced(-F.logsigmoid(positive - lse), reduction)


def check_hard_info_nce(temperature, hard_fraction, normalize, reduction) -> None:
    checked_fraction(hard_fraction)
    check_nt_xent(temperature, normalize, reduction)


def simple_contrastive(
    query: Tensor,
    key: Tensor,
    *,
    weight: float | None = None,
    hard_fraction: float = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    r"""The simple contrastive loss: linear in the similarities, without a softmax.

    .. math:: \ell_i = -s_{ii} + \lambda \sum_{j \in H_i} s_{ij}

    It is what InfoNCE becomes, but for constants, at large temperatures: all negatives are pushed
    alike.

    Args:
        query, key: ``(B, D)`` each, floating.
        weight: lambda >= 0; default: 1 / B.
        hard_fraction: in (0, 1]: H are the ceil(hard_fraction (B - 1)) most similar keys of other
            queries, of equal ones the first. With all of them no product is formed.
        normalize: cosines; else inner products of the features as they are.
        reduction: ``"mean"`` or ``"sum"`` over queries, or ``"none"``.

    Returns:
        0-d, or ``(B,)``; dtype as :func:`info_nce`. The mean of no queries is 0; one alone has its
        positive term, which needs no negatives.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> query, key = torch.randn(2, 32, 16, requires_grad=True)
        >>> pyloss.functional.simple_contrastive(query, key, hard_fraction=0.25).backward()

    Reference:
        Wang, Liu. Understanding the Behaviour of Contrastive Loss. arXiv 2012.09740.
    """
    check_simple(weight, hard_fraction, normalize, reduction)
    features = Features(normalize, query=query, key=key)
    check_same_rows("key", key, "query", query)
    rows = query.shape[0]
    q, k = features.exact(query), features.exact(key)
    positive = (q * k).sum(1)
    negatives = max(0, rows - 1)
    count = hardest_count(hard_fraction, negatives)
    if count == negatives:
        negative = (q * k.sum(0)).sum(1) - positive
    else:
        _, negative = similarity_hardest(q, k, q.new_ones(()), count, 0)
    weight = 1 / max(1, rows) if weight is None else weight
    return features.reduced(weight * negative - positive, reduction)


def check_simple(weight, hard_fraction, normalize, reduction) -> None:
    if weight is not None:
        checks.check_range("weight", weight, 0.0)
    checked_fraction(hard_fraction)
    check_common(normalize, reduction)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor = 10.0,
    logit_bias: float | Tensor = -10.0,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    group: Any = None,
    ring: bool = False,
) -> Tensor:
    r"""The loss of SigLIP: whether image and text belong together, for each pair by itself.

    .. math:: \ell_i = \sum_j \log\big(1 + e^{-y_{ij} (\lambda \cos(x_i, y_j) + b)}\big), \qquad
              y_{ij} = 1 \text{ if } i = j \text{ else } -1

    Args:
        image_features: x ``(B, D)``, floating.
        text_features: y ``(B, D)``.
        logit_scale: lambda > 0, the factor itself and not its logarithm, or a tensor of one number,
            with a gradient, as open_clip's models return it.
        logit_bias: b, likewise.
        normalize: cosines. Features that have been normalised, as open_clip's are, give the same.
        reduction: ``"mean"`` or ``"sum"`` over images, or ``"none"``.
        group, ring: as for :func:`info_nce`.

    Returns:
        0-d, or ``(B,)``; dtype as :func:`info_nce`. No pairs: 0; one alone has its positive term,
        which needs no negatives.

    Raises:
        As :func:`info_nce`.

    Example:
        >>> import torch, pyloss
        >>> image, text = torch.randn(2, 32, 16)
        >>> bias = torch.tensor(-10.0, requires_grad=True)
        >>> pyloss.siglip_loss(image, text, 10.0, bias).backward()

    Reference:
        Zhai, Mustafa, Kolesnikov, Beyer. arXiv 2303.15343.
    """
    check_siglip(logit_scale, logit_bias, normalize, reduction, group, ring)
    features = Features(normalize, image_features=image_features, text_features=text_features)
    check_same_rows("text_features", text_features, "image_features", image_features)
    scale = features.scale("logit_scale", logit_scale)
    bias = features.scale("logit_bias", logit_bias)
    found = at_once(
        features, image_features, text_features, scale, reduction, group, SIGMOID, bias=bias
    )
    if found is not None:
        return found
    each = pair_sums_over(group, ring)(
        features.of(image_features), features.of(text_features), scale, bias,
        target=torch.arange(image_features.shape[0], device=image_features.device),
    )  # fmt: skip
    return features.reduced(each, reduction, group=group)


def check_siglip(logit_scale, logit_bias, normalize, reduction, group=None, ring=False) -> None:
    check_positive("logit_scale", logit_scale)
    check_finite("logit_bias", logit_bias)
    check_common(normalize, reduction, group, ring)
