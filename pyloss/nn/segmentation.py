"""Modules of the region losses; each forward is one call of the functional."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyloss.functional import segmentation as F
from pyloss.nn.classification import _RowLoss


class SoftDiceLoss(_RowLoss):
    r"""Module of :func:`pyloss.functional.soft_dice_loss`; stands in for ``monai.losses.DiceLoss``.

    .. math:: \ell = 1 - \frac{2 \sum p\,t + \mathrm{nr}}{\sum p + \sum t + \mathrm{dr}}

    Args:
        As :func:`pyloss.functional.soft_dice_loss`. ``weight``, where given, is a buffer.

    Shape:
        - input: ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N, C')`` with ``reduction="none"``, ``(C')`` with ``batch``

    Raises:
        As :func:`pyloss.functional.soft_dice_loss`, when called.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SoftDiceLoss(sigmoid=True, squared_pred=True)
        >>> criterion(torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8) > 0.5).shape
        torch.Size([])

    Reference:
        Milletari, Navab, Ahmadi. V-Net. arXiv 1606.04797.
    """

    def __init__(
        self,
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
    ) -> None:
        if weight is not None and not isinstance(weight, Tensor):
            weight = torch.tensor(weight, dtype=torch.float32)
        super().__init__(
            weight,
            dict(
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
                soft_label=soft_label,
                ignore_index=ignore_index,
            ),
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.soft_dice_loss(input, target, weight=self.weight, **self.options)


class DiceCELoss(_RowLoss):
    r"""Module of :func:`pyloss.functional.dice_cross_entropy_loss`; as ``monai.losses.DiceCELoss``.

    .. math:: \ell = \lambda_\mathrm{dice}\, \ell_\mathrm{dice}
              + \lambda_\mathrm{ce}\, \ell_\mathrm{ce}

    Args:
        As :func:`pyloss.functional.dice_cross_entropy_loss`. ``weight``, where given, is a buffer.

    Shape:
        - input: logits ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar

    Raises:
        As :func:`pyloss.functional.dice_cross_entropy_loss`, when called.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.DiceCELoss(softmax=True, lambda_ce=0.5)
        >>> criterion(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))).shape
        torch.Size([])

    Reference:
        Isensee et al. nnU-Net. arXiv 1809.10486.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__(
            weight,
            dict(
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
                lambda_dice=lambda_dice,
                lambda_ce=lambda_ce,
                label_smoothing=label_smoothing,
                soft_label=soft_label,
                ignore_index=ignore_index,
            ),
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.dice_cross_entropy_loss(input, target, weight=self.weight, **self.options)
