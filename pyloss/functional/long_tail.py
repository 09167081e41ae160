"""Classes of very different frequency: weights, and margins that are added to the logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional.classification import MixUpTarget, RowStats, fused_cross_entropy
from pyloss.ops._launch import accumulator_dtype


def class_balanced_weight(
    counts: Tensor | Sequence[float], beta: float = 0.999, *, normalize: bool = True
) -> Tensor:
    r"""Weights of classes by their effective numbers of samples.

    .. math:: w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}

    1 for all with beta 0, and :math:`1 / n_c` with beta 1. For ``weight`` of
    :func:`pyloss.fused_cross_entropy`, :func:`pyloss.focal_loss` and every loss that takes one.

    Args:
        counts: samples n of each class, ``(C,)``, such as ``torch.bincount(labels)``. A class
            without any counts as one of a single sample.
        beta: in [0, 1].
        normalize: weights of sum C; else as the formula stands.

    Returns:
        ``(C,)``, of torch's default dtype, or float64 for counts that are; computed in float64.

    Raises:
        TypeError: counts of no numbers, beta no number.
        ValueError: counts that are no vector, negative ones (CPU), beta out of range.

    Example:
        >>> import torch, pyloss
        >>> weight = pyloss.functional.class_balanced_weight([1000, 100, 10], beta=0.99)
        >>> x, y = torch.randn(8, 3), torch.randint(3, (8,))
        >>> loss = pyloss.fused_cross_entropy(x, y, weight=weight)

    Reference:
        Cui, Jia, Lin, Song, Belongie. Class-Balanced Loss Based on Effective Number of Samples.
        arXiv 1901.05555.
    """
    checks.check_range("beta", beta, 0.0)
    if not beta <= 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    normalize = checks.checked_flag("normalize", normalize)
    counts, dtype = _checked_counts(counts)
    if beta == 1:
        weight = 1 / counts
    elif beta == 0:
        weight = torch.ones_like(counts)
    else:
        log_beta = torch.log(torch.full_like(counts, beta))
        weight = (1 - beta) / -torch.expm1(counts * log_beta)
    if normalize:
        weight = weight * (weight.shape[0] / weight.sum())
    return weight.to(dtype)


def logit_adjustment(counts: Tensor | Sequence[float], tau: float = 1.0) -> Tensor:
    r"""Logarithms of the classes' shares, by which logits are adjusted for a long tail.

    .. math:: a_c = \tau \log \frac{n_c}{\sum_k n_k}

    Trained with x + a (:func:`logit_adjusted_cross_entropy`), or predicting with x - a, a model has
    a small error on the average of the classes instead of on that of the samples. The pairwise
    margin between k and the label y is :math:`a_k - a_y`.

    Args:
        counts: samples n of each class, ``(C,)``. A class without any counts as one of a single
            sample.
        tau: strength, >= 0; 1 is consistent with the balanced error.

    Returns:
        ``(C,)``, of torch's default dtype, or float64 for counts that are; computed in float64.

    Raises:
        As :func:`class_balanced_weight`.

    Example:
        >>> import torch, pyloss
        >>> adjustment = pyloss.functional.logit_adjustment([1000, 100, 10])
        >>> logits = torch.randn(8, 3)
        >>> predicted = (logits - adjustment).argmax(1)  # of a model that was trained as usual

    Reference:
        Menon, Jayasumana, Rawat, Jain, Veit, Kumar. Long-tail Learning via Logit Adjustment.
        arXiv 2007.07314.
    """
    checks.check_range("tau", tau, 0.0)
    counts, dtype = _checked_counts(counts)
    return (tau * (counts / counts.sum()).log()).to(dtype)


def logit_adjusted_cross_entropy(
    input: Tensor,
    target: Tensor | MixUpTarget,
    counts: Tensor | Sequence[float],
    adjustment_tau: float = 1.0,
    **kwargs,
) -> Tensor | tuple[Tensor, RowStats]:
    r"""Cross entropy of logits that the classes' shares have been added to.

    .. math:: \ell = \log \Big( 1 + \sum_{k \ne y}
              \Big( \frac{\pi_k}{\pi_y} \Big)^{\tau} e^{x_k - x_y} \Big), \qquad
              \pi_c = \frac{n_c}{\sum_k n_k}

    Predict with x as it is.

    Args:
        input: logits ``(C)``, ``(N, C)`` or ``(N, C, d1, ..)``.
        target: as in :func:`pyloss.fused_cross_entropy`.
        counts: samples n of each class, ``(C,)``.
        adjustment_tau: strength of the adjustment, >= 0; ``tau`` is that of the comp-sum family.
        **kwargs: every other argument of :func:`pyloss.fused_cross_entropy` but ``inplace``.

    Returns:
        As :func:`pyloss.fused_cross_entropy`.

    Raises:
        ValueError: as many counts as classes there are not; and what
            :func:`class_balanced_weight` and :func:`pyloss.fused_cross_entropy` raise.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.randn(8, 3, requires_grad=True), torch.randint(3, (8,))
        >>> pyloss.functional.logit_adjusted_cross_entropy(x, y, [1000, 100, 10]).backward()

    Reference:
        Menon et al. arXiv 2007.07314.
    """
    return with_adjustment(input, target, logit_adjustment(counts, adjustment_tau), **kwargs)


def with_adjustment(input: Tensor, target, adjustment: Tensor, **kwargs):
    """Of an adjustment that is known."""
    if kwargs.get("inplace"):
        raise ValueError("inplace is not for adjusted logits, which are no longer those given")
    checks.check_floating("input", input)
    checks.check_has_dimension("input", input)
    dim = 0 if input.dim() == 1 else 1
    if adjustment.shape[0] != input.shape[dim]:
        raise ValueError(f"counts must be of {input.shape[dim]} classes, got {adjustment.shape[0]}")
    acc = accumulator_dtype(input.dtype)
    shape = [-1] + [1] * (input.dim() - 1 - dim)
    adjusted = input + adjustment.to(input.device, acc).view(shape)
    if kwargs.get("loss_dtype") is None:
        kwargs["loss_dtype"] = checks.result_dtype(input.dtype, input)
    return fused_cross_entropy(adjusted, target, **kwargs)


def _checked_counts(counts) -> tuple[Tensor, torch.dtype]:
    """In float64, at least 1; and the dtype of what is made of them."""
    if not isinstance(counts, Tensor):
        try:
            counts = torch.tensor(counts, dtype=torch.get_default_dtype())
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"counts must be a Tensor or numbers, got {type(counts).__name__}"
            ) from None
    if counts.dtype == torch.bool or counts.is_complex():
        raise TypeError(f"counts must hold numbers, got {counts.dtype}")
    if counts.dim() != 1:
        raise ValueError(f"counts must be (C,), one of each class, got {list(counts.shape)}")
    if checks.can_look_at(counts) and (counts < 0).any():
        raise ValueError(f"counts must be >= 0, got {counts.min().item():g}")
    dtype = torch.float64 if counts.dtype == torch.float64 else torch.get_default_dtype()
    return checks.widened(counts.detach()).clamp(min=1), dtype
