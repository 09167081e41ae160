"""Region losses whose overlap is weighed otherwise than that of Dice."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_range
from pyloss.functional._options import OverlapOptions, options_of
from pyloss.functional._regions import check_options, finished, overlaps, read_regions
from pyloss.functional.segmentation import soft_dice_loss

WEIGHT_TYPES = ("square", "simple", "uniform")


@options_of(
    soft_dice_loss,
    without=("squared_pred", "jaccard", "weight"),
    positional=0,
    after={"w_type": "other_act"},
)
def generalized_dice_loss(
    input: Tensor, target: Tensor, *, w_type: str = "square", **options: Unpack[OverlapOptions]
) -> Tensor:
    r"""Generalised Dice loss: one Dice over all classes, each weighted by its rarity; MONAI's
    argument names.

    .. math::
        \ell = 1 - \frac{2 \sum_c w_c I_c + \mathrm{nr}}{\sum_c w_c (P_c + T_c) + \mathrm{dr}},
        \qquad w_c = T_c^{-2},\ T_c^{-1} \text{ or } 1

    with the sums of :func:`soft_dice_loss`. A class that the target does not have gets the largest
    weight of those that it has.

    Args:
        input, target: as for :func:`soft_dice_loss`.
        w_type: ``"square" | "simple" | "uniform"``: the weights in this order.
        **options: as for :func:`soft_dice_loss`. ``batch``: one loss of the whole batch.

    Returns:
        The loss: 0-d, or ``(N)`` with ``reduction="none"``, 0-d with ``batch``. Of the dtype of
        ``input``; float32 for half types under autocast.

    Raises:
        ValueError: an unknown ``w_type``.
        Otherwise as :func:`soft_dice_loss`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.generalized_dice_loss(logits, target, softmax=True)
        >>> loss.backward()

    Reference:
        Sudre, Li, Vercauteren, Ourselin, Cardoso. Generalised Dice overlap as a deep learning loss
        function for highly unbalanced segmentations. arXiv 1707.03237.
    """
    check_weight_type(w_type)
    check_options(**options)
    read, p = read_regions(input, target, **options)
    value = generalized_dice_of(input, read, p, w_type, **options)
    return value.to(checks.result_dtype(input.dtype, input))


@options_of(
    soft_dice_loss,
    without=("squared_pred", "jaccard", "weight"),
    positional=0,
    after={"alpha": "other_act", "beta": "alpha", "gamma": "ignore_index"},
)
def tversky_loss(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    **options: Unpack[OverlapOptions],
) -> Tensor:
    r"""Tversky loss: Dice with factors of its own for false positives and false negatives; MONAI's
    argument names.

    .. math::
        \ell = \Big( 1 - \frac{I + \mathrm{nr}}
        {I + \alpha\,(P - I) + \beta\,(T - I) + \mathrm{dr}} \Big)^{\gamma}

    with the sums of :func:`soft_dice_loss` over each item and class. alpha = beta = 1/2 is Dice,
    alpha = beta = 1 Jaccard; beta > alpha finds more, at the cost of false alarms.

    Args:
        input, target: as for :func:`soft_dice_loss`.
        alpha: factor of the false positives, >= 0.
        beta: factor of the false negatives, >= 0.
        gamma: exponent of each loss, > 0; the focal Tversky loss, whose paper writes 1 / gamma and
            takes 3/4.
        **options: as for :func:`soft_dice_loss`.

    Returns:
        As :func:`soft_dice_loss`.

    Raises:
        ValueError: ``alpha``, ``beta`` or ``gamma`` out of range.
        Otherwise as :func:`soft_dice_loss`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(3, (2, 8, 8))
        >>> loss = pyloss.functional.tversky_loss(
        ...     logits, target, softmax=True, alpha=0.3, beta=0.7
        ... )
        >>> loss.backward()

    Reference:
        Salehi, Erdogmus, Gholipour. Tversky loss function for image segmentation using 3D fully
        convolutional deep networks. arXiv 1706.05721. Exponent: Abraham, Khan. A novel focal
        Tversky loss function. arXiv 1810.07842.
    """
    check_tversky(alpha, beta, gamma)
    check_options(**options)
    batch = options["batch"]
    read, p = read_regions(input, target, **options)
    inside, of_p, of_t = overlaps(p, read.values, batch=batch, soft_label=options["soft_label"])
    whole = inside + alpha * (of_p - inside) + beta * (of_t - inside)
    value = 1 - (inside + options["smooth_nr"]) / (whole + options["smooth_dr"])
    if gamma != 1:
        # The root's slope at 0 is infinite; what rounding has made negative has no root.
        done = value <= 0
        value = value.masked_fill(done, 1).pow(gamma).masked_fill(done, 0)
    reduced = finished(
        value, input, read, batch=batch, reduction=options["reduction"], empty=options["empty"]
    )
    return reduced.to(checks.result_dtype(input.dtype, input))


def check_weight_type(w_type) -> None:
    checks.check_one_of("w_type", w_type, WEIGHT_TYPES)


def check_tversky(alpha, beta, gamma) -> None:
    check_range("alpha", alpha, 0.0)
    check_range("beta", beta, 0.0)
    check_range("gamma", gamma, 0.0, open_low=True)


def generalized_dice_of(
    input, read, p, w_type, *, batch, soft_label, smooth_nr, smooth_dr, reduction, empty, **others
) -> Tensor:
    """In the dtype of the sums."""
    inside, of_p, of_t = overlaps(p, read.values, batch=batch, soft_label=soft_label)
    weight = _rarity(of_t, w_type)
    above = 2 * (weight * inside).sum(-1, keepdim=True) + smooth_nr
    below = (weight * (of_p + of_t)).sum(-1, keepdim=True) + smooth_dr
    value = finished(1 - above / below, input, read, batch=batch, reduction=reduction, empty=empty)
    return value.squeeze(-1) if reduction == "none" else value


def _rarity(volume: Tensor, w_type: str) -> Tensor:
    """Weights (N, C') or (C') of the volumes; an infinite one is the largest that is not."""
    if w_type == "uniform":
        return torch.ones_like(volume)
    power = volume * volume if w_type == "square" else volume
    missing = power.detach().reciprocal().isinf()
    weight = power.masked_fill(missing, torch.inf).reciprocal()  # 0, with a slope that is not NaN
    return torch.where(missing, weight.amax(-1, keepdim=True), weight)
