"""Modules of the region losses; each forward is one call of the functional."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import segmentation as F
from pyloss.functional._checks import check_tensor
from pyloss.functional._options import DiceCrossEntropyOptions, DiceOptions, options_of
from pyloss.functional._regions import check_options, checked_weights
from pyloss.nn._module import WeightedLoss


class SoftDiceLoss(WeightedLoss):
    r"""Module of :func:`pyloss.functional.soft_dice_loss`; stands in for ``monai.losses.DiceLoss``.

    .. math:: \ell = 1 - \frac{2 \sum p\,t + \mathrm{nr}}{\sum p + \sum t + \mathrm{dr}}

    Args:
        As :func:`pyloss.functional.soft_dice_loss`. ``weight``, where given, is a buffer.

    Shape:
        - input: ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N, C')`` with ``reduction="none"``, ``(C')`` with ``batch``

    Raises:
        As :func:`pyloss.functional.soft_dice_loss`, when made if the options alone are wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SoftDiceLoss(sigmoid=True, squared_pred=True)
        >>> criterion(torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8) > 0.5).shape
        torch.Size([])

    Reference:
        Milletari, Navab, Ahmadi. V-Net. arXiv 1606.04797.
    """

    @options_of(F.soft_dice_loss, positional=None)
    def __init__(self, **options: Unpack[DiceOptions]) -> None:
        weight = options.pop("weight")
        check_options(**options)
        if weight is not None and not isinstance(weight, Tensor):
            weight = torch.tensor(checked_weights(weight), dtype=torch.float32)
        super().__init__(weight, **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.soft_dice_loss(input, target, weight=self.weight, **self.options)


class DiceCELoss(WeightedLoss):
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
        As :func:`pyloss.functional.dice_cross_entropy_loss`, when made if the options alone are
        wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.DiceCELoss(softmax=True, lambda_ce=0.5)
        >>> criterion(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))).shape
        torch.Size([])

    Reference:
        Isensee et al. nnU-Net. arXiv 1809.10486.
    """

    @options_of(F.dice_cross_entropy_loss, positional=None)
    def __init__(self, **options: Unpack[DiceCrossEntropyOptions]) -> None:
        weight = options.pop("weight")
        check_options(**options)
        names = ("reduction", "lambda_dice", "lambda_ce", "label_smoothing")
        F.check_sum_options(**{name: options[name] for name in names})
        if weight is not None:
            check_tensor("weight", weight)
        super().__init__(weight, **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.dice_cross_entropy_loss(input, target, weight=self.weight, **self.options)
