"""Region losses of segmentation: soft Dice, soft Jaccard, and their sums with cross entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_range
from pyloss.functional._regions import (
    check_options,
    checked_channels,
    checked_weight,
    finished,
    overlaps,
    read_regions,
    split_target,
)
from pyloss.functional._rows import row_loss
from pyloss.ops._launch import accumulator_dtype


def soft_dice_loss(
    input: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool | None = None,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: float | Sequence[float] | Tensor | None = None,
    soft_label: bool = False,
    ignore_index: int | None = None,
    empty: str = "nan",
    validate: bool | None = None,
) -> Tensor:
    r"""Soft Dice loss, or soft Jaccard, of each item and class; MONAI's argument names.

    With p the prediction, t the target, and sums over the voxels of one channel of one item:

    .. math::
        \ell = 1 - \frac{2\,I + \mathrm{nr}}{P + T + \mathrm{dr}}, \qquad
        \mathrm{jaccard}:\ \ell = 1 - \frac{2\,I + \mathrm{nr}}{2 (P + T - I) + \mathrm{dr}}, \qquad
        I = \sum p\,t,\quad P = \sum p^k,\quad T = \sum t^k

    with k = 2 for ``squared_pred``, else 1.

    Args:
        input: ``(N, C, *)`` with any number of spatial axes; probabilities, or logits together with
            ``sigmoid``, ``softmax`` or ``other_act``. float32, bfloat16, float16 or float64; half
            types are computed in float32.
        target: one of

            - one-hot or soft, ``(N, C, *)``: floating, bool or integer
            - class indices ``(N, *)`` or ``(N, 1, *)``, C > 1: int64, int32, int16, int8 or uint8
            - a mask ``(N, *)`` or ``(N, 1, *)``, C = 1
        include_background: False leaves channel 0 out, where C > 1.
        to_onehot_y: True: ``target`` holds class indices; False: it has the shape of ``input``;
            None: its shape says which.
        sigmoid, softmax, other_act: applied to ``input``, at most one of them.
        squared_pred: squares in the denominator.
        jaccard: Jaccard index in place of Dice.
        reduction: ``"none" | "mean" | "sum"`` over items and classes.
        smooth_nr, smooth_dr: added to numerator and denominator, >= 0. A class that is neither in
            the target nor predicted has loss ``1 - smooth_nr / smooth_dr``.
        batch: sums run over the items too, so that there is one value per class.
        weight: factor of each class that counts (without the background where it is left out), or
            one number, >= 0. The mean does not divide by it.
        soft_label: ``I = (P + T - sum |p - t|) / 2``, which is smallest at p = t for soft targets
            too; the same for hard targets, and where ``squared_pred`` is set.
        ignore_index: voxels of this class add nothing. Class indices and masks only.
        empty: what an item and class (with ``batch`` a class) without any voxel that counts gives:
            ``"nan"``, the formula, whose sums are 0; ``"zero"``, 0. Likewise the mean of nothing.
        validate: None: on the CPU, outside of compiled code and transforms, a target outside [0, 1]
            raises, as a mask of 0 and 255 is, and ``input`` outside [0, 1] without an activation
            warns. True: both raise, and a GPU is waited for. False: no look.

    Returns:
        The loss: 0-d, or ``(N, C')`` with ``reduction="none"``, ``(C')`` with ``batch``; C' classes
        count. Of the dtype of ``input``; float32 for half types under autocast.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: shapes that do not fit, an unknown ``reduction``, more than one activation,
            softmax of one channel, a negative weight or smoothing, values outside [0, 1]
            (``validate``).
        RuntimeError: class indices or weights of the wrong dtype; different devices.
        IndexError: a class index out of range (CPU). On CUDA and in compiled code, where raising
            would need a synchronisation, loss and gradient of that item are NaN.
        NotImplementedError: integer ``input``.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.soft_dice_loss(logits, target, softmax=True)
        >>> loss.backward()

    Reference:
        Milletari, Navab, Ahmadi. V-Net. arXiv 1606.04797 (``squared_pred``). Soft labels: Wang,
        Ning, Blaschko. Jaccard Metric Losses. arXiv 2302.05666.
    """
    value = _dice(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        squared_pred=squared_pred,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        weight=weight,
        soft_label=soft_label,
        ignore_index=ignore_index,
        empty=empty,
        validate=validate,
    )
    return value.to(checks.result_dtype(input.dtype, input))


def dice_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool | None = None,
    sigmoid: bool = False,
    softmax: bool = False,
    other_act: Callable[[Tensor], Tensor] | None = None,
    squared_pred: bool = False,
    jaccard: bool = False,
    reduction: str = "mean",
    smooth_nr: float = 1e-5,
    smooth_dr: float = 1e-5,
    batch: bool = False,
    weight: Tensor | None = None,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    soft_label: bool = False,
    ignore_index: int | None = None,
    empty: str = "nan",
    validate: bool | None = None,
) -> Tensor:
    r"""Soft Dice plus cross entropy of the same logits; MONAI's argument names.

    .. math:: \ell = \lambda_\mathrm{dice}\, \ell_\mathrm{dice}(\mathrm{act}(x), t)
              + \lambda_\mathrm{ce}\, \ell_\mathrm{ce}(x, t)

    The cross entropy is :func:`pyloss.fused_cross_entropy` over the C channels, background
    included; with one channel it is the binary cross entropy of logits.

    Args:
        input: logits ``(N, C, *)``.
        target: as in :func:`soft_dice_loss`.
        include_background, to_onehot_y, other_act, squared_pred, jaccard, smooth_nr, smooth_dr,
            batch, soft_label: as there; the Dice part only.
        sigmoid, softmax: activation of the Dice part.
        reduction: ``"mean" | "sum"``.
        weight: weight of each class ``(C)`` in both parts; with one channel the weight of the
            positive voxels ``(1)``, in the cross entropy alone.
        lambda_dice, lambda_ce: factors of the parts, >= 0.
        label_smoothing: of the cross entropy, in [0, 1]; C > 1 only.
        ignore_index: voxels of this class add nothing to either part. Class indices and masks only.
        empty: ``"zero"``: where no voxel counts both parts are 0, and so are their gradients;
            ``"nan"``: the mean of the cross entropy is NaN, as in torch.
        validate: as in :func:`soft_dice_loss`.

    Returns:
        The loss, 0-d, of the dtype of ``input``; float32 for half types under autocast.

    Raises:
        ValueError: ``reduction="none"``: the parts have different shapes; a negative factor; label
            smoothing with one channel.
        Otherwise as :func:`soft_dice_loss` and :func:`pyloss.fused_cross_entropy`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.dice_cross_entropy_loss(logits, target, softmax=True)
        >>> loss.backward()

    Reference:
        Isensee et al. nnU-Net. arXiv 1809.10486. Cross entropy: see
        :func:`pyloss.fused_cross_entropy`.
    """
    check_sum_options(reduction, lambda_dice, lambda_ce, label_smoothing)
    if weight is not None:
        checks.check_tensor("weight", weight)
    # What is wrong with the tensors is found here, before they are indexed below.
    channels = checked_channels(input)
    if weight is not None and tuple(weight.shape) != (channels,):
        raise ValueError(
            f"weight must have one entry for each of the {channels} channels, background included, "
            f"got shape {list(weight.shape)}"
        )
    dice_weight = weight if channels > 1 else None
    if dice_weight is not None and not include_background:
        dice_weight = dice_weight[1:]
    dice = _dice(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        squared_pred=squared_pred,
        jaccard=jaccard,
        reduction=reduction,
        smooth_nr=smooth_nr,
        smooth_dr=smooth_dr,
        batch=batch,
        weight=dice_weight,
        soft_label=soft_label,
        ignore_index=ignore_index,
        empty=empty,
        validate=validate,
    )
    labels, is_index = split_target(input, target, to_onehot_y)
    if channels == 1:
        if label_smoothing:
            raise ValueError("label_smoothing needs at least 2 channels, input has 1")
        ce = _binary_cross_entropy(input, labels, weight, reduction, ignore_index, empty)
    else:
        if is_index:
            # The class numbers were checked above; the op takes three of the integer dtypes, and a
            # narrow one does not hold every ignored class.
            labels = labels if labels.dtype in (torch.int64, torch.int32) else labels.long()
            # Without an ignored class nothing may be: a negative label is an error above.
            ignored = -100 if ignore_index is None else ignore_index
        else:
            labels = labels if labels.is_floating_point() else labels.to(input.dtype)
            ignored = -100
        ce = row_loss(
            input,
            labels,
            weight=weight,
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=ignored,
            empty=empty,
            loss_dtype=accumulator_dtype(input.dtype),
        )
    return (lambda_dice * dice + lambda_ce * ce).to(checks.result_dtype(input.dtype, input))


def check_sum_options(reduction, lambda_dice, lambda_ce, label_smoothing) -> None:
    """Those of the sum with cross entropy alone."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    for name, value in (("lambda_dice", lambda_dice), ("lambda_ce", lambda_ce)):
        check_range(name, value, 0.0)
    checks.check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:  # torch's words and type
        raise RuntimeError(
            f"label_smoothing must be between 0.0 and 1.0. Got: {float(label_smoothing)}"
        )


def _dice(
    input,
    target,
    *,
    include_background,
    to_onehot_y,
    sigmoid,
    softmax,
    other_act,
    squared_pred,
    jaccard,
    reduction,
    smooth_nr,
    smooth_dr,
    batch,
    weight,
    soft_label,
    ignore_index,
    empty,
    validate,
) -> Tensor:
    """The Dice loss in the dtype of the sums."""
    check_options(
        sigmoid=sigmoid, softmax=softmax, other_act=other_act, reduction=reduction,
        smooth_nr=smooth_nr, smooth_dr=smooth_dr, ignore_index=ignore_index, empty=empty,
        validate=validate,
    )  # fmt: skip
    read, p = read_regions(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        sigmoid=sigmoid,
        softmax=softmax,
        other_act=other_act,
        ignore_index=ignore_index,
        validate=validate,
    )
    weight = checked_weight(weight, read.values.shape[1], input)
    value = dice_of(
        *overlaps(p, read.values, batch=batch, squared=squared_pred, soft_label=soft_label),
        jaccard,
        smooth_nr,
        smooth_dr,
    )
    return finished(
        value, input, read, batch=batch, reduction=reduction, empty=empty, weight=weight
    )


def dice_of(inside, total_p, total_t, jaccard, smooth_nr, smooth_dr) -> Tensor:
    """Of the sums of :func:`overlaps`."""
    if jaccard:
        outside = 2 * (total_p + total_t - inside) + smooth_dr
    else:
        outside = total_p + (total_t + smooth_dr)  # the sum in brackets seldom has a gradient
    # 1 - 2 (I + nr / 2) / ..., whose factor costs no operation of its own.
    return torch.rsub((inside + 0.5 * smooth_nr) / outside, 1, alpha=2)


def _binary_cross_entropy(input, mask, pos_weight, reduction, ignore_index, empty):
    dtype = accumulator_dtype(input.dtype)
    if pos_weight is not None:
        pos_weight = pos_weight.to(dtype).view([-1] + [1] * (input.dim() - 2))
    counted = None
    if ignore_index is not None:
        ignored = checks.equals(mask, ignore_index)
        counted = ~ignored
        mask = mask.masked_fill(ignored, 0)
    if empty == "zero" and input.numel() == 0:
        reduction = "sum"
    value = F.binary_cross_entropy_with_logits(
        input.to(dtype),
        mask.to(dtype),
        weight=None if counted is None else counted.to(dtype),
        pos_weight=pos_weight,
        reduction="sum" if counted is not None else reduction,
    )
    if counted is None or reduction != "mean":
        return value
    # Over no voxel the mean is NaN, and its gradient 0, as that of F.cross_entropy.
    count = counted.sum()
    none = 0.0 if empty == "zero" else torch.nan
    return torch.where(count == 0, none, value / count.clamp(min=1))
