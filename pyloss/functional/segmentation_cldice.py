"""Centreline Dice: whether the skeletons of prediction and target lie inside the other."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_range
from pyloss.functional._options import RegionOptions, options_of
from pyloss.functional._regions import check_options, finished, overlaps, read_regions
from pyloss.functional._skeleton import skeleton
from pyloss.functional.segmentation import dice_of, soft_dice_loss
from pyloss.functional.segmentation_focal import check_unit
from pyloss.ops._launch import accumulator_dtype

_NOT_OF_SKELETONS = (
    "squared_pred", "jaccard", "smooth_nr", "smooth_dr", "batch", "weight", "soft_label",
)  # fmt: skip


def soft_skeleton(input: Tensor, iter_: int = 3) -> Tensor:
    r"""Soft skeleton of images or volumes, by repeated erosions and openings.

    .. math::
        E_0 = x,\quad E_{k+1} = \mathrm{erode}(E_k),\quad
        \delta_k = \max(0, E_k - \mathrm{dilate}(E_{k+1})),\quad
        S_k = S_{k-1} + \max(0, \delta_k - S_{k-1} \delta_k)

    Erosion is the minimum over a voxel and its neighbours along the axes, dilation the maximum over
    the 3 x 3 (x 3) voxels around.

    Args:
        input: ``(N, C, H, W)`` or ``(N, C, D, H, W)``, probabilities: float32, bfloat16, float16 or
            float64; or bool, whose skeleton has no gradient.
        iter_: steps after the first; half the width of the widest tube is enough.

    Returns:
        The skeleton, of the shape of ``input`` and of its dtype; float32 for half types under
        autocast.

    Raises:
        TypeError, ValueError: arguments of the wrong type or shape, ``iter_`` negative.
        NotImplementedError: integer ``input``.

    Example:
        >>> import torch, pyloss
        >>> bar = torch.zeros(1, 1, 5, 7)
        >>> bar[..., 1:4, 1:6] = 1
        >>> pyloss.functional.soft_skeleton(bar, 1)[0, 0].int()
        tensor([[0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0],
                [0, 0, 1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)

    Reference:
        Shit, Paetzold et al. clDice. arXiv 2003.07311.
    """
    checks.check_tensor("input", input)
    _check_axes(input)
    steps = checks.checked_count("iter_", iter_)
    if input.dtype == torch.bool:
        return skeleton(input, steps)
    checks.check_supported("soft_skeleton", input)
    found = skeleton(input.to(accumulator_dtype(input.dtype)), steps)
    return found.to(checks.result_dtype(input.dtype, input))


@options_of(soft_dice_loss, without=_NOT_OF_SKELETONS, positional=0)
def cldice_loss(
    input: Tensor,
    target: Tensor,
    *,
    iter_: int = 3,
    smooth_nr: float = 1.0,
    smooth_dr: float = 1.0,
    smooth: float = 1e-4,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""Soft clDice loss of tubular structures; MONAI's argument names (``SoftclDiceLoss``).

    With the soft skeletons :math:`S_p` of the prediction and :math:`S_t` of the target, and sums
    over channels and voxels of one item:

    .. math::
        \ell = 1 - \frac{2\,u\,v}{u + v + \mathrm{smooth}}, \qquad
        u = \frac{\sum S_p\,t + \mathrm{nr}}{\sum S_p + \mathrm{dr}},\quad
        v = \frac{\sum S_t\,p + \mathrm{nr}}{\sum S_t + \mathrm{dr}}

    Args:
        input: ``(N, C, H, W)`` or ``(N, C, D, H, W)``; otherwise as for :func:`soft_dice_loss`.
        target: as for :func:`soft_dice_loss`. The skeleton of class indices and of a bool mask is
            made of bytes.
        iter_: steps of :func:`soft_skeleton`.
        smooth_nr, smooth_dr: added to numerator and denominator of u and v, >= 0.
        smooth: added to the denominator of the harmonic mean, > 0.
        **options: as for :func:`soft_dice_loss`. ``reduction`` runs over items. Voxels of
            ``ignore_index`` are background in both images.

    Returns:
        The loss: 0-d, or ``(N)`` with ``reduction="none"``. Of the dtype of ``input``; float32 for
        half types under autocast.

    Raises:
        ValueError: images of other than two or three spatial axes; ``smooth`` or ``iter_`` out of
        range. Otherwise as :func:`soft_dice_loss`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 1, 16, 16, requires_grad=True)
        >>> vessels = torch.rand(2, 1, 16, 16) > 0.7
        >>> loss = pyloss.functional.cldice_loss(logits, vessels, sigmoid=True)
        >>> loss.backward()

    Reference:
        Shit, Paetzold et al. clDice - a Novel Topology-Preserving Loss Function for Tubular
        Structure Segmentation. arXiv 2003.07311.
    """
    own = dict(iter_=iter_, smooth_nr=smooth_nr, smooth_dr=smooth_dr, smooth=smooth)
    check_skeleton_options(iter_, smooth)
    check_options(smooth_nr=smooth_nr, smooth_dr=smooth_dr, **options)
    checks.check_tensor("input", input)
    _check_axes(input)
    read, p = read_regions(input, target, **options)
    value = _cldice(input, read, p, **own, **options)
    return value.to(checks.result_dtype(input.dtype, input))


@options_of(soft_dice_loss, without=_NOT_OF_SKELETONS, positional=0)
def dice_cldice_loss(
    input: Tensor,
    target: Tensor,
    *,
    iter_: int = 3,
    alpha: float = 0.5,
    smooth_nr: float = 1.0,
    smooth_dr: float = 1.0,
    smooth: float = 1e-4,
    **options: Unpack[RegionOptions],
) -> Tensor:
    r"""Soft Dice and soft clDice; MONAI's argument names (``SoftDiceclDiceLoss``).

    .. math:: \ell = (1 - \alpha)\,\ell_\mathrm{dice} + \alpha\,\ell_\mathrm{cldice}

    Args:
        input, target, iter_, smooth: as for :func:`cldice_loss`.
        alpha: share of clDice, in [0, 1].
        smooth_nr, smooth_dr: of both parts, >= 0.
        **options: as for :func:`cldice_loss`. ``reduction``: ``"mean"`` or ``"sum"``.

    Returns:
        The loss, 0-d, of the dtype of ``input``; float32 for half types under autocast.

    Raises:
        ValueError: ``reduction="none"``: the parts have different shapes; ``alpha`` outside [0, 1].
        Otherwise as :func:`cldice_loss`.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 1, 16, 16, requires_grad=True)
        >>> vessels = torch.rand(2, 1, 16, 16) > 0.7
        >>> loss = pyloss.functional.dice_cldice_loss(logits, vessels, sigmoid=True)
        >>> loss.backward()

    Reference:
        Shit, Paetzold et al. clDice. arXiv 2003.07311.
    """
    own = dict(iter_=iter_, smooth_nr=smooth_nr, smooth_dr=smooth_dr, smooth=smooth)
    check_skeleton_options(iter_, smooth)
    check_options(smooth_nr=smooth_nr, smooth_dr=smooth_dr, **options)
    check_share(alpha, options["reduction"])
    checks.check_tensor("input", input)
    _check_axes(input)
    read, p = read_regions(input, target, **options)
    sums = overlaps(p, read.values, batch=False)
    dice = finished(
        dice_of(*sums, False, smooth_nr, smooth_dr),
        input,
        read,
        batch=False,
        reduction=options["reduction"],
        empty=options["empty"],
    )
    value = (1 - alpha) * dice + alpha * _cldice(input, read, p, **own, **options)
    return value.to(checks.result_dtype(input.dtype, input))


def check_skeleton_options(iter_, smooth) -> None:
    checks.checked_count("iter_", iter_)
    check_range("smooth", smooth, 0.0, open_low=True)


def check_share(alpha, reduction) -> None:
    check_unit("alpha", alpha)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")


def _check_axes(input: Tensor) -> None:
    if input.dim() not in (4, 5):
        raise ValueError(
            f"input must have shape (N, C, H, W) or (N, C, D, H, W), got {list(input.shape)}"
        )


def _cldice(
    input, read, p, *, iter_, smooth_nr, smooth_dr, smooth, reduction, empty, **others
) -> Tensor:
    """In the dtype of the sums."""
    t = read.values
    if t.dtype != torch.bool:
        t = t.to(p.dtype)
    steps = checks.checked_count("iter_", iter_)
    of_p, of_t = skeleton(p, steps), skeleton(t, steps)
    precise = (_total(of_p * t, p) + smooth_nr) / (_total(of_p, p) + smooth_dr)
    sensitive = (_total(of_t * p, p) + smooth_nr) / (_total(of_t, p) + smooth_dr)
    value = 1 - 2 * precise * sensitive / (precise + sensitive + smooth)
    value = finished(value.unsqueeze(1), input, read, batch=False, reduction=reduction, empty=empty)
    return value.squeeze(1) if reduction == "none" else value


def _total(x: Tensor, p: Tensor) -> Tensor:
    return x.flatten(1).sum(1, dtype=accumulator_dtype(p.dtype))
