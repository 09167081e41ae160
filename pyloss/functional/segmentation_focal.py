"""Focal losses of independent channels and of voxels, alone and beside Dice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import _checks as checks
from pyloss.functional._binary_focal import binary_focal
from pyloss.functional._checks import check_range
from pyloss.functional._options import DiceOptions, GeneralizedDiceOptions, options_of
from pyloss.functional._ranges import warn
from pyloss.functional._regions import (
    Target,
    check_options,
    check_ranges,
    check_target_options,
    checked_weight,
    finished,
    overlaps,
    read_regions,
    read_target,
)
from pyloss.functional.segmentation import dice_of, soft_dice_loss
from pyloss.functional.segmentation_overlap import (
    check_weight_type,
    generalized_dice_loss,
    generalized_dice_of,
)
from pyloss.ops._launch import accumulator_dtype, constants


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    r"""Focal loss of independent binary decisions, as ``torchvision.ops.sigmoid_focal_loss``.

    .. math::
        \ell = \alpha_t\,(1 - p_t)^\gamma\,(-\log p_t), \qquad
        p_t = p\,t + (1 - p)(1 - t),\quad \alpha_t = \alpha\,t + (1 - \alpha)(1 - t)

    with p = sigmoid(x). Beside input and target the backward keeps one tensor of their size.

    Args:
        input: logits of any shape; float32, bfloat16, float16 or float64.
        target: of the same shape: 0 or 1, bool, integer or floating. In between, the first factor
            is :math:`\mathrm{sigmoid}(x (1 - 2 t))^\gamma`, as MONAI has it.
        alpha: weight of the ones in [0, 1]; None or -1: no balance.
        gamma: focusing exponent, >= 0.
        reduction: ``"none" | "mean" | "sum"``.

    Returns:
        The loss, of the dtype of ``input``; float32 for half types under autocast.

    Raises:
        TypeError: arguments of the wrong Python type.
        ValueError: different shapes; ``alpha``, ``gamma`` or ``reduction`` out of range.
        RuntimeError: different devices.
        NotImplementedError: integer ``input``.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(8, 20, requires_grad=True)
        >>> boxes = torch.rand(8, 20) > 0.9
        >>> pyloss.functional.sigmoid_focal_loss(logits, boxes, reduction="sum").backward()

    Reference:
        Lin, Goyal, Girshick, He, Dollar. Focal Loss for Dense Object Detection. arXiv 1708.02002.
    """
    checks.check_tensor("input", input)
    checks.check_tensor("target", target)
    checks.check_supported("sigmoid_focal_loss", input)
    checks.check_device("target", target, input)
    if target.shape != input.shape:
        raise ValueError(
            "target must have the shape of input; "
            f"got input {list(input.shape)} and target {list(target.shape)}"
        )
    check_range("gamma", gamma, 0.0)
    checks.check_reduction(reduction)
    if alpha is not None and alpha != -1:
        check_unit("alpha", alpha)
    else:
        alpha = None
    each = binary_focal(input, target, gamma, alpha)
    value = each if reduction == "none" else getattr(each, reduction)()
    return value.to(checks.result_dtype(input.dtype, input))


def segmentation_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    include_background: bool = True,
    to_onehot_y: bool | None = None,
    gamma: float = 2.0,
    alpha: float | Sequence[float] | None = None,
    weight: float | Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    use_softmax: bool = False,
    ignore_index: int | None = None,
    empty: str = "nan",
    validate: bool | None = None,
) -> Tensor:
    r"""Focal loss of the channels of each voxel; MONAI's argument names (``FocalLoss``).

    .. math::
        \ell_{c} = \alpha_t\,(1 - p_t)^\gamma\,(-\log p_t), \qquad
        \mathrm{softmax}:\ \ell_{c} = \alpha_c\,t_c\,(1 - p_c)^\gamma\,(-\log p_c)

    Each channel by its own sigmoid (:func:`sigmoid_focal_loss`), or all by their softmax, which for
    class indices is :func:`pyloss.focal_loss` over C' times as many terms.

    Args:
        input: logits ``(N, C, *)``.
        target: as for :func:`soft_dice_loss`.
        include_background: False leaves channel 0 out, also out of the softmax, as in MONAI.
        to_onehot_y: as for :func:`soft_dice_loss`.
        gamma: focusing exponent, >= 0.
        alpha: None, or

            - a number in [0, 1]: weight of the ones, 1 - alpha that of the zeros; with
              ``use_softmax`` weight of the foreground classes, 1 - alpha that of class 0
            - one for each class that counts: weight of its ones
        weight: factor of each class that counts, or one number, >= 0.
        reduction: ``"none"``; ``"mean"`` over items, classes and voxels that count; ``"sum"`` over
            items and classes of the mean over voxels.
        use_softmax: softmax over the channels instead of a sigmoid of each.
        ignore_index: voxels of this class count nowhere. Class indices and masks only.
        empty: ``"zero"``: a mean over no voxel is 0, and so is its gradient; ``"nan"``: NaN.
        validate: as for :func:`soft_dice_loss`, of the target.

    Returns:
        The loss: 0-d, or ``(N, C', *)`` with ``reduction="none"``. Of the dtype of ``input``;
        float32 for half types under autocast.

    Raises:
        As :func:`soft_dice_loss`; ValueError for ``gamma`` and ``alpha`` out of range.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.segmentation_focal_loss(logits, target, use_softmax=True)
        >>> loss.backward()

    Reference:
        Lin, Goyal, Girshick, He, Dollar. Focal Loss for Dense Object Detection. arXiv 1708.02002.
    """
    check_focal(gamma, alpha)
    check_target_options(reduction, ignore_index, empty, validate)
    read = read_target(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
    )
    check_ranges(None, None if read.is_index else read.values, validate)
    weight = checked_weight(weight, read.values.shape[1], input)
    value = focal_of(
        input, read, gamma=gamma, alpha=alpha, weight=weight, use_softmax=use_softmax,
        reduction=reduction, empty=empty,
    )  # fmt: skip
    return value.to(checks.result_dtype(input.dtype, input))


@options_of(
    soft_dice_loss,
    positional=0,
    after={
        "gamma": "batch",
        "lambda_dice": "weight",
        "lambda_focal": "lambda_dice",
        "alpha": "lambda_focal",
        "use_softmax": "ignore_index",
    },
)
def dice_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    alpha: float | Sequence[float] | None = None,
    use_softmax: bool = False,
    **options: Unpack[DiceOptions],
) -> Tensor:
    r"""Soft Dice plus the focal loss of the same logits; MONAI's argument names.

    .. math:: \ell = \lambda_\mathrm{dice}\, \ell_\mathrm{dice}(\mathrm{act}(x), t)
              + \lambda_\mathrm{focal}\, \ell_\mathrm{focal}(x, t)

    Args:
        input: logits ``(N, C, *)``.
        target: as for :func:`soft_dice_loss`.
        gamma, alpha, use_softmax: of :func:`segmentation_focal_loss`. Its channels are independent
            unless ``use_softmax`` is set, whatever the activation of the Dice part.
        lambda_dice, lambda_focal: factors of the parts, >= 0.
        **options: as for :func:`soft_dice_loss`. ``include_background``, ``weight``,
            ``reduction``, ``ignore_index``, ``empty`` and ``validate`` hold for both parts, the
            others for Dice.

    Returns:
        The loss, 0-d; ``(N, C', *)`` with ``reduction="none"``: the focal loss of each voxel plus
        the Dice loss of its item and class. Of the dtype of ``input``; float32 for half types under
        autocast.

    Raises:
        ValueError: a negative factor.
        Otherwise as :func:`soft_dice_loss` and :func:`segmentation_focal_loss`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.dice_focal_loss(logits, target, softmax=True)
        >>> loss.backward()

    Reference:
        Zhu et al. AnatomyNet. arXiv 1808.05238. See also :func:`soft_dice_loss` and
        :func:`segmentation_focal_loss`.
    """
    check_focal(gamma, alpha)
    check_factors(lambda_dice=lambda_dice, lambda_focal=lambda_focal)
    check_options(**options)
    read, p = read_regions(input, target, **options)
    weight = checked_weight(options["weight"], read.values.shape[1], input)
    common = dict(reduction=options["reduction"], empty=options["empty"], weight=weight)
    batch, squared = options["batch"], options["squared_pred"]
    sums = overlaps(p, read.values, batch=batch, squared=squared, soft_label=options["soft_label"])
    dice = dice_of(*sums, options["jaccard"], options["smooth_nr"], options["smooth_dr"])
    dice = finished(dice, input, read, batch=batch, **common)
    if options["reduction"] == "none":
        dice = dice.view(*dice.shape, *[1] * (input.dim() - 2))
    focal = focal_of(input, read, gamma=gamma, alpha=alpha, use_softmax=use_softmax, **common)
    value = lambda_dice * dice + lambda_focal * focal
    return value.to(checks.result_dtype(input.dtype, input))


@options_of(
    generalized_dice_loss,
    positional=0,
    after={
        "gamma": "batch",
        "weight": "gamma",
        "lambda_gdl": "weight",
        "lambda_focal": "lambda_gdl",
        "alpha": "lambda_focal",
        "use_softmax": "ignore_index",
    },
)
def generalized_dice_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: float | Sequence[float] | Tensor | None = None,
    lambda_gdl: float = 1.0,
    lambda_focal: float = 1.0,
    alpha: float | Sequence[float] | None = None,
    use_softmax: bool = False,
    **options: Unpack[GeneralizedDiceOptions],
) -> Tensor:
    r"""Generalised Dice plus the focal loss of the same logits; MONAI's argument names.

    .. math:: \ell = \lambda_\mathrm{gdl}\, \ell_\mathrm{gdl}(\mathrm{act}(x), t)
              + \lambda_\mathrm{focal}\, \ell_\mathrm{focal}(x, t)

    Args:
        input: logits ``(N, C, *)``.
        target: as for :func:`soft_dice_loss`.
        gamma, weight, alpha, use_softmax: of :func:`segmentation_focal_loss`.
        lambda_gdl, lambda_focal: factors of the parts, >= 0.
        **options: as for :func:`generalized_dice_loss`. ``include_background``, ``reduction``,
            ``ignore_index``, ``empty`` and ``validate`` hold for both parts.

    Returns:
        As :func:`dice_focal_loss`.

    Raises:
        ValueError: a negative factor.
        Otherwise as :func:`generalized_dice_loss` and :func:`segmentation_focal_loss`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.generalized_dice_focal_loss(logits, target, softmax=True)
        >>> loss.backward()

    Reference:
        See :func:`generalized_dice_loss` and :func:`segmentation_focal_loss`.
    """
    check_focal(gamma, alpha)
    check_factors(lambda_gdl=lambda_gdl, lambda_focal=lambda_focal)
    check_weight_type(options["w_type"])
    check_options(**options)
    read, p = read_regions(input, target, **options)
    weight = checked_weight(weight, read.values.shape[1], input)
    dice = generalized_dice_of(input, read, p, **options)
    if options["reduction"] == "none":
        dice = dice.view(*dice.shape, *[1] * (input.dim() - 1))
    focal = focal_of(
        input, read, gamma=gamma, alpha=alpha, weight=weight, use_softmax=use_softmax,
        reduction=options["reduction"], empty=options["empty"],
    )  # fmt: skip
    value = lambda_gdl * dice + lambda_focal * focal
    return value.to(checks.result_dtype(input.dtype, input))


def check_unit(name: str, value) -> None:
    checks.check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def check_focal(gamma, alpha) -> None:
    check_range("gamma", gamma, 0.0)
    if alpha is None:
        return
    if not _is_several(alpha):
        check_unit("alpha", alpha)
        return
    for value in alpha:
        check_range("alpha", value, 0.0)


def _is_several(alpha) -> bool:
    """A list of numbers, numpy's too."""
    return isinstance(alpha, Iterable) and not isinstance(alpha, (str, Tensor))


def check_factors(**factors) -> None:
    for name, value in factors.items():
        check_range(name, value, 0.0)


def focal_of(input, read: Target, *, gamma, alpha, weight, use_softmax, reduction, empty) -> Tensor:
    """In the dtype of the sums."""
    classes = read.values.shape[1]
    if use_softmax and classes == 1:
        raise ValueError("softmax over one channel is 1 everywhere: set use_softmax=False")
    alpha = _checked_alpha(alpha, classes, input)
    if use_softmax and isinstance(alpha, float):
        alpha = _foreground(alpha, classes, read, input)
    if use_softmax and read.is_index and reduction != "none":
        each, weight = _of_labels(input, read, gamma, alpha, weight), None
    else:
        logits = input[:, read.first :]
        factors = _along(alpha, input) if isinstance(alpha, Tensor) else alpha
        if use_softmax:
            each = _of_softmax(logits, read.values, gamma, factors)
        else:
            each = binary_focal(logits, read.values, gamma, factors)
    return _reduced(each, read, weight, classes, reduction, empty)


def _of_labels(input, read: Target, gamma, alpha, weight) -> Tensor:
    """(N, 1, *), weights included: of a softmax of class indices only the label's term is not 0."""
    classes = read.values.shape[1]
    labels = read.labels.long() - read.first
    background = (labels < 0).unsqueeze(1) if read.first else None
    # What is ignored is set to 0 later, and what is out of range to NaN.
    labels = labels.clamp(0, classes - 1).unsqueeze(1)
    logits = input[:, read.first :]
    logp = torch.log_softmax(logits, 1, dtype=accumulator_dtype(input.dtype)).gather(1, labels)
    each = _modulated(logp, gamma)
    factor = alpha
    if weight is not None:
        weight = weight.to(logp.dtype)
        factor = weight if alpha is None else alpha * weight
    if factor is not None:
        each = each * (factor[labels] if factor.dim() else factor)
    return each if background is None else each.masked_fill(background, 0)


def _of_softmax(logits, t, gamma, factors) -> Tensor:
    logp = torch.log_softmax(logits, 1, dtype=accumulator_dtype(logits.dtype))
    each = _modulated(logp, gamma)
    each = torch.where(t, each, 0.0) if t.dtype == torch.bool else each * t
    return each if factors is None else each * factors


def _modulated(logp, gamma) -> Tensor:
    if gamma == 0:
        return -logp
    # 1 - p without cancellation, and with a finite slope where it is 0.
    miss = (-torch.expm1(logp)).clamp(min=torch.finfo(logp.dtype).tiny)
    return -logp * miss.pow(gamma)


def _reduced(each, read: Target, weight, classes, reduction, empty) -> Tensor:
    """Of (N, K, *) with K = `classes`, or 1 where the classes are summed up and weighted."""
    if read.ignored is not None:
        each = each.masked_fill(read.ignored, 0)
    spatial = each.dim() - 2
    if read.poison is not None:
        each = each * read.poison.view(-1, *[1] * (spatial + 1))
    if reduction == "none":
        return each if weight is None else each * (_along(weight, each) if weight.dim() else weight)
    items = each.shape[0]
    if weight is None and read.ignored is None and each.numel():
        # Few operations: of a small image they are the time.
        voxels = each.numel() // (items * each.shape[1])
        return each.sum() / (voxels * (items * classes if reduction == "mean" else 1))
    sums = each.flatten(2).sum(2) if spatial else each
    sums = sums if weight is None else sums * weight.to(sums.dtype)
    if read.ignored is None:
        voxels = math.prod(each.shape[2:])
        counts = sums.new_full((), voxels * (items if reduction == "mean" else 1))
    else:
        counted = ~read.ignored
        counts = counted.sum() if reduction == "mean" else counted.flatten(1).sum(1, keepdim=True)
    none = 0.0 if empty == "zero" else torch.nan
    if reduction == "mean":
        sums, counts = sums.sum(), counts * classes
    # Over no voxel the mean is NaN, and its gradient 0, as that of F.cross_entropy.
    value = torch.where(counts == 0, none, sums / counts.clamp(min=1))
    return value if reduction == "mean" else value.sum()


def _checked_alpha(alpha, classes, input) -> float | Tensor | None:
    if alpha is None or not _is_several(alpha):
        return None if alpha is None else float(alpha)
    values = [float(value) for value in alpha]
    if len(values) != classes:
        raise ValueError(
            f"alpha must be one number or one for each of the {classes} classes that count, got "
            f"{len(values)}"
        )
    return constants(values, accumulator_dtype(input.dtype), input.device)


def _foreground(alpha: float, classes: int, read: Target, input) -> Tensor | None:
    """The number of a softmax, as one for each class."""
    if read.first:
        warn("alpha has no effect: with use_softmax it weighs the background, which is left out")
        return None
    values = [1 - alpha, *[alpha] * (classes - 1)]
    return constants(values, accumulator_dtype(input.dtype), input.device)


def _along(factors: Tensor, input: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (input.dim() - 2))
