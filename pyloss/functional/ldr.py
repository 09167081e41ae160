"""Label distributionally robust losses: LDR, with one temperature, and ALDR, which finds one for
each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _ldr_rows as rows
from pyloss.functional._rows import check_options as check_row_options
from pyloss.functional._rows import prepare, row_loss
from pyloss.ops._labels import wide
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.aldr import aldr
from pyloss.ops.row_softmax import REDUCTIONS


def check_ldr_options(
    *, lam=1.0, margin=0.0, topk=None, normalize=None, ignore_index=-100, reduction="mean"
) -> None:
    """Those that are numbers and names, also for the modules."""
    rows.check_topk(topk)
    checks.check_range("lam", lam, 0.0, open_low=topk is None)
    rows.check_margin(margin)
    rows.check_normalize(normalize)
    check_row_options(ignore_index=ignore_index, reduction=reduction)


def check_labels_only(function: str, input, target) -> None:
    checks.check_tensor("input", input)
    checks.check_tensor("target", target)
    if target.is_floating_point():
        raise ValueError(f"{function} takes class indices, not probabilities")


def ldr_loss(
    input: Tensor,
    target: Tensor,
    lam: float = 1.0,
    margin: float | Tensor = 0.0,
    *,
    topk: int | None = None,
    normalize: str | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""LDR-KL: the loss under the worst distribution of labels near the uniform one.

    .. math::
        \ell = w_y \max_{p \in \Delta} \sum_k p_k \delta_k - \lambda\, \mathrm{KL}(p, 1/C)
             = w_y\, \lambda \log \frac1C \sum_k e^{\delta_k / \lambda}, \qquad
        \delta_k = x_k - x_y + c\, [k \ne y]

    lam 1 without a margin is cross entropy less log C; towards 0 it becomes the Crammer-Singer
    hinge loss, towards infinity the mean of the :math:`\delta_k`, which is symmetric. With ``topk``
    no label gets more than 1/k: the maximum is over :math:`p_k \le 1/k` (LDR-k-KL), and with lam 0
    the mean of the k largest :math:`\delta_k` (LDR-k, a top-k hinge loss).

    Args:
        input: scores ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating; half types are
            computed in float32.
        target: class indices ``()``, ``(N)`` or ``(N, d1, ..., dk)``; int64, uint8 or int32.
        lam: > 0; with ``topk`` also 0.
        margin: c >= 0, or a table ``(C, C)`` whose row y has those of label y; its diagonal counts
            as 0.
        topk: k in [1, C], or None.
        normalize: what is done to the scores of a row first: ``"l1"`` divides them by their mean
            absolute value, ``"softplus"`` takes softplus(x) over its mean.
        weight: weight of each class, ``(C)``.
        ignore_index: rows with this target add nothing.
        reduction: ``"none" | "mean" | "sum"``; the mean divides by the sum of ``weight[y]``.

    Returns:
        The loss: 0-d, or of the targets' shape with ``reduction="none"``; of the dtype of
        ``input``, float32 under autocast. Differentiable in ``input``.

    Raises:
        TypeError: an argument of the wrong Python type. ValueError: ``lam``, ``margin`` or ``topk``
        out of range, probabilities as target, batch sizes that differ. RuntimeError: shapes or
        dtypes that do not fit. IndexError: a class index out of range (CPU; on CUDA the row becomes
        NaN).

    Example:
        >>> import math, torch, pyloss
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> pyloss.ldr_loss(x, y, lam=10.0, margin=0.1).backward()
        >>> cross_entropy = pyloss.ldr_loss(x, y) + math.log(10)

    Reference:
        Zhu, Ying, Yang. Label Distributionally Robust Losses for Multi-class Classification.
        arXiv 2112.14869.
    """
    check_labels_only("ldr_loss", input, target)
    rows.check_topk(topk)
    checks.check_range("lam", lam, 0.0, open_low=topk is None)
    rows.check_margin(margin)
    rows.check_normalize(normalize)
    options = dict(weight=weight, ignore_index=ignore_index, reduction=reduction)
    composed = topk is not None or normalize is not None or isinstance(margin, Tensor)
    if not composed:
        return row_loss(input, target, ldr=True, temperature=lam, margin=margin, **options)
    input, p = prepare(input, target, **options)
    scores = rows.normalized(input, normalize, p)
    if isinstance(margin, Tensor):
        scores, margin = rows.with_margins(scores, p.labels[0], margin), 0.0
    if topk is None:
        loss = row_loss(scores, target, ldr=True, temperature=lam, margin=margin, **options)
        return loss.to(p.loss_dtype)
    classes = scores.shape[rows.class_dim(scores)]
    if not topk <= classes:
        raise ValueError(f"topk must be at most the {classes} classes, got {topk}")
    if checks.can_look_at(target):
        checks.check_index_values(p.labels[0], classes, ignore_index)
    x = rows.by_rows(scores).to(accumulator_dtype(input.dtype))
    label, each, counts = rows.row_weights(p, classes)
    column = label.unsqueeze(1)
    x = torch.where(counts.unsqueeze(1), x, 0.0)
    delta = x - x.gather(1, column)
    if margin:
        delta = (delta + margin).scatter(1, column, 0.0)
    value = rows.capped_value(delta, float(lam), topk)
    return rows.reduced(value, rows.row_factors(each, p.codes.reduction), p, target.shape)


def check_aldr_options(
    *, lam0=1.0, alpha=2.0, margin=0.0, normalize="l1", ignore_index=-100, reduction="mean"
) -> None:
    """Those that are numbers and names, also for the modules."""
    checks.check_range("lam0", lam0, 0.0, open_low=True)
    checks.check_range("alpha", alpha, 1.0, open_low=True)
    rows.check_margin(margin)
    rows.check_normalize(normalize)
    check_row_options(ignore_index=ignore_index, reduction=reduction)


def aldr_loss(
    input: Tensor,
    target: Tensor,
    lam0: float = 1.0,
    alpha: float = 2.0,
    margin: float | Tensor = 0.0,
    *,
    lam: Tensor | None = None,
    normalize: str | None = "l1",
    return_lambda: bool = False,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""ALDR-KL: LDR-KL whose lam each sample finds for itself, smaller where the scores are far
    from uniform.

    .. math::
        \ell = w_y \max_{\lambda > 0,\, p \in \Delta} \sum_k p_k \delta_k
               - \lambda\, \mathrm{KL}(p, 1/C) - \frac{\kappa}{2} (\lambda - \lambda_0)^2, \qquad
        \kappa = \frac{\alpha \log C}{\lambda_0}, \quad \delta_k = x_k - x_y + c\, [k \ne y]

    At the maximum :math:`\lambda = \lambda_0 - \mathrm{KL}(p, 1/C) / \kappa`, in
    :math:`[\lambda_0 (1 - 1/\alpha), \lambda_0]`. Where there are several such (``alpha`` near 1,
    or many classes with one score far ahead), it is the one that is reached from ``lam0``.

    Args:
        input: scores ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating; half types are
            computed in float32.
        target: class indices ``()``, ``(N)`` or ``(N, d1, ..., dk)``; int64, uint8 or int32.
        lam0: > 0.
        alpha: > 1.
        margin: c >= 0, or a table ``(C, C)`` whose row y has those of label y; its diagonal counts
            as 0.
        lam: of each target so far, of the shape of ``target``: lam is then one step
            :math:`\lambda_0 - \mathrm{KL} / \kappa` from it, as in the paper's algorithm
            (:class:`pyloss.nn.ALDRLoss` keeps it). None: the maximum itself.
        normalize: what is done to the scores of a row first: ``"l1"`` divides them by their mean
            absolute value, ``"softplus"`` takes softplus(x) over its mean.
        return_lambda: also return lam.
        weight: weight of each class, ``(C)``.
        ignore_index: rows with this target add nothing, and their lam stays (``lam0`` without).
        reduction: ``"none" | "mean" | "sum"``; the mean divides by the sum of ``weight[y]``.

    Returns:
        The loss: 0-d, or of the targets' shape with ``reduction="none"``; of the dtype of
        ``input``, float32 under autocast. Differentiable in ``input``, twice without ``lam``. With
        ``return_lambda`` the pair of it and lam, of the targets' shape, float32 or float64.

    Raises:
        TypeError: an argument of the wrong Python type. ValueError: ``lam0``, ``alpha``, ``margin``
        or the shape of ``lam`` out of range, probabilities as target, batch sizes that differ.
        RuntimeError: shapes or dtypes that do not fit. IndexError: a class index out of range (CPU;
        on CUDA the row becomes NaN).

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 10, requires_grad=True), torch.randint(10, (8,))
        >>> loss, lam = pyloss.aldr_loss(x, y, lam0=10.0, margin=0.1, return_lambda=True)
        >>> loss.backward()
        >>> bool((lam >= 5).all() and (lam <= 10).all())
        True

    Reference:
        Zhu, Ying, Yang. Label Distributionally Robust Losses for Multi-class Classification.
        arXiv 2112.14869.
    """
    check_labels_only("aldr_loss", input, target)
    check_aldr_options(
        lam0=lam0, alpha=alpha, margin=margin, normalize=normalize, ignore_index=ignore_index,
        reduction=reduction,
    )  # fmt: skip
    input, p = prepare(input, target, weight=weight, ignore_index=ignore_index, reduction=reduction)
    if lam is not None:
        lam = _checked_lam(lam, input, target)
    scores, l1 = input, normalize == "l1"
    if normalize == "softplus" or isinstance(margin, Tensor):
        scores, l1 = rows.normalized(input, normalize, p), False
    if isinstance(margin, Tensor):
        scores, margin = rows.with_margins(scores, p.labels[0], margin), 0.0
    _, each, _ = rows.row_weights(p, scores.shape[rows.class_dim(scores)])
    scalar = p.codes.reduction != REDUCTIONS["none"]
    options = (float(lam0), float(alpha), float(margin), p.codes.ignore_index, l1)
    loss, found = aldr(
        rows.by_rows(scores), wide(p.labels[0]).reshape(-1),
        rows.row_factors(each, p.codes.reduction), lam, options, scalar,
    )  # fmt: skip
    if each.numel() == 0 and reduction == "mean":
        loss = loss / 0.0
    shape = p.labels[0].shape if input.dim() > 1 else ()
    loss = (loss if scalar else loss.view(shape)).to(p.loss_dtype)
    return (loss, found.view(shape)) if return_lambda else loss


def _checked_lam(lam, input: Tensor, target: Tensor) -> Tensor:
    checks.check_floating("lam", lam)
    if lam.shape != target.shape:
        raise ValueError(
            f"lam must have the shape of target, {list(target.shape)}, got {list(lam.shape)}"
        )
    checks.check_device("lam", lam, input)
    checks.check_constant("lam", lam)
    return lam.detach().reshape(-1)
