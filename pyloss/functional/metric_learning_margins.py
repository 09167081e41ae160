"""Softmax losses on cosines whose target is made harder by a margin."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._embeddings import alike
from pyloss.functional._rows import check_class_weight, checked_smoothing
from pyloss.functional.classification import fused_cross_entropy
from pyloss.ops._labels import outside, wide
from pyloss.ops._launch import accumulator_dtype, without_autocast


def check_margin_options(
    *, margin=0.35, scale=64.0, weight=None, ignore_index=-100, label_smoothing=0.0,
    reduction="mean", most=math.inf,
) -> None:  # fmt: skip
    """Those that are numbers and names, also for the modules."""
    checks.check_range("margin", margin, 0.0)
    if margin > most:
        raise ValueError(f"margin must be an angle of at most pi, got {margin}")
    checks.check_range("scale", scale, 0.0, open_low=True)
    if weight is not None:
        check_class_weight(weight)
    checks.checked_integer("ignore_index", ignore_index)
    checked_smoothing(label_smoothing)
    checks.check_reduction(reduction)


def arcface_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    margin: float = 0.5,
    scale: float = 64.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""ArcFace: cross entropy of cosines, with an angle added to that of the target.

    .. math:: \ell = -\log \frac{e^{s \cos(\theta_y + m)}}{e^{s \cos(\theta_y + m)}
              + \sum_{c \ne y} e^{s \cos \theta_c}}, \qquad \cos \theta_c = \cos(x, w_c)

    Beyond :math:`\theta_y = \pi - m`, where the cosine would grow again, the target has
    :math:`\cos \theta_y - m \sin m`.

    Args:
        input: x ``(N, D)``, floating; computed in float32 at least, under autocast too.
        linear_weight: w ``(C, D)``, one direction a class; of the same dtype, or under autocast
            float32.
        target: y ``(N,)``, class indices.
        margin: m, in radians, from 0 to pi.
        scale: s, > 0.
        weight, ignore_index, label_smoothing, reduction: as for
            :func:`pyloss.fused_cross_entropy`.

    Returns:
        As :func:`pyloss.fused_cross_entropy`; of the dtype of ``input``, float32 for half types
        under autocast. Differentiable in ``input`` and ``linear_weight``. A NaN makes its row NaN.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range. RuntimeError: shapes,
            dtypes or devices that do not fit, ``label_smoothing`` outside [0, 1].
            IndexError: a target out of range.

    Example:
        >>> import torch, pyloss
        >>> x, w = torch.randn(8, 16), torch.randn(10, 16, requires_grad=True)
        >>> pyloss.functional.arcface_loss(x, w, torch.arange(8)).backward()
        >>> w.grad.shape
        torch.Size([10, 16])

    Reference:
        Deng et al. ArcFace: Additive Angular Margin Loss for Deep Face Recognition. arXiv
        1801.07698.
    """
    options = dict(
        weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip
    check_margin_options(margin=margin, scale=scale, most=math.pi, **options)
    cos_m, sin_m = math.cos(margin), math.sin(margin)

    def harder(cosine: Tensor) -> Tensor:
        square = 1 - cosine * cosine
        # At an angle of 0 or pi its derivative is infinite: none is taken.
        flat = square <= 0
        sine = torch.where(flat, 0.0, torch.where(flat, 1.0, square).sqrt())
        # Not "cosine >= -cos_m", which a NaN would not be.
        beyond = cosine < -cos_m
        return torch.where(beyond, cosine - margin * sin_m, cosine * cos_m - sine * sin_m)

    return _with_margin(input, linear_weight, target, harder, scale, options)


def cosface_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 64.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""CosFace: cross entropy of cosines, with a margin taken off that of the target.

    .. math:: \ell = -\log \frac{e^{s (\cos \theta_y - m)}}{e^{s (\cos \theta_y - m)}
              + \sum_{c \ne y} e^{s \cos \theta_c}}, \qquad \cos \theta_c = \cos(x, w_c)

    Args:
        input, linear_weight, target, scale, weight, ignore_index, label_smoothing, reduction: as
            for :func:`arcface_loss`.
        margin: m, >= 0.

    Returns:
        As :func:`arcface_loss`.

    Raises:
        As :func:`arcface_loss`.

    Example:
        >>> import torch, pyloss
        >>> x, w = torch.randn(8, 16), torch.randn(10, 16, requires_grad=True)
        >>> pyloss.functional.cosface_loss(x, w, torch.arange(8)).backward()
        >>> w.grad.shape
        torch.Size([10, 16])

    Reference:
        Wang et al. CosFace: Large Margin Cosine Loss for Deep Face Recognition. arXiv 1801.09414.
    """
    options = dict(
        weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip
    check_margin_options(margin=margin, scale=scale, **options)
    return _with_margin(input, linear_weight, target, lambda c: c - margin, scale, options)


def _with_margin(input, linear_weight, target, harder, scale, options) -> Tensor:
    _check_layer(input, linear_weight, target)
    dtype = checks.result_dtype(input.dtype, input)
    classes, work = linear_weight.shape[0], accumulator_dtype(input.dtype)
    with without_autocast(input):
        x, w = (F.normalize(t.to(work), dim=1) for t in (input, linear_weight))
        cosines = x @ w.mT
        if classes:
            # Of a row that is left out, or that the loss refuses, another column: nobody reads it.
            column = wide(target).masked_fill(outside(target, classes), 0).unsqueeze(1)
            cosines = cosines.scatter(1, column, harder(cosines.gather(1, column)))
        if options["weight"] is not None:
            options["weight"] = options["weight"].to(work)
        return fused_cross_entropy(cosines, target, logit_scale=scale, **options).to(dtype)


def _check_layer(input, linear_weight, target) -> None:
    for name, t in (("input", input), ("linear_weight", linear_weight)):
        checks.check_floating(name, t)
        checks.check_dense(name, t)
        if t.dim() != 2:
            raise RuntimeError(f"{name} must be 2-D, got {list(t.shape)}")
    if linear_weight.shape[1] != input.shape[1] or not alike(linear_weight, input):
        raise RuntimeError(
            f"linear_weight must be {input.dtype} (C, {input.shape[1]}) as input, got "
            f"{linear_weight.dtype} {list(linear_weight.shape)}"
        )
    checks.check_tensor("target", target)
    checks.check_index_dtype("target", target)
    if target.shape != input.shape[:1]:
        raise RuntimeError(
            f"target must have the shape {[input.shape[0]]}, got {list(target.shape)}"
        )
    checks.check_device("linear_weight", linear_weight, input)
    checks.check_device("target", target, input)
