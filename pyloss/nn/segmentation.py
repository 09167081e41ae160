"""Modules of the region losses; each forward is one call of the functional."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch has imported it

from pyloss.functional import segmentation as F
from pyloss.functional import segmentation_cldice as skeletons
from pyloss.functional import segmentation_focal as focal
from pyloss.functional import segmentation_overlap as overlap
from pyloss.functional._checks import check_tensor
from pyloss.functional._options import (
    ClDiceOptions,
    DiceClDiceOptions,
    DiceCrossEntropyOptions,
    DiceFocalOptions,
    DiceOptions,
    GeneralizedDiceFocalOptions,
    GeneralizedDiceOptions,
    SegmentationFocalOptions,
    TverskyOptions,
    options_of,
)
from pyloss.functional._regions import check_options, check_target_options, checked_weights
from pyloss.nn._module import LossModule, WeightedLoss


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
        super().__init__(_buffer(weight), **options)

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


class GeneralizedDiceLoss(LossModule):
    r"""Module of :func:`pyloss.functional.generalized_dice_loss`; stands in for
    ``monai.losses.GeneralizedDiceLoss``.

    .. math::
        \ell = 1 - \frac{2 \sum_c w_c \sum p_c\,t_c + \mathrm{nr}}
        {\sum_c w_c \sum (p_c + t_c) + \mathrm{dr}}

    Args:
        As :func:`pyloss.functional.generalized_dice_loss`.

    Shape:
        - input: ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.generalized_dice_loss`, when made if the options alone are
        wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.GeneralizedDiceLoss(softmax=True, w_type="simple")
        >>> criterion(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))).shape
        torch.Size([])

    Reference:
        Sudre et al. arXiv 1707.03237.
    """

    @options_of(overlap.generalized_dice_loss, positional=None)
    def __init__(self, **options: Unpack[GeneralizedDiceOptions]) -> None:
        overlap.check_weight_type(options["w_type"])
        check_options(**options)
        super().__init__(**options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return overlap.generalized_dice_loss(input, target, **self.options)


class TverskyLoss(LossModule):
    r"""Module of :func:`pyloss.functional.tversky_loss`; stands in for
    ``monai.losses.TverskyLoss``.

    .. math::
        \ell = \Big( 1 - \frac{I + \mathrm{nr}}
        {I + \alpha\,(P - I) + \beta\,(T - I) + \mathrm{dr}} \Big)^{\gamma}

    Args:
        As :func:`pyloss.functional.tversky_loss`.

    Shape:
        - input: ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N, C')`` with ``reduction="none"``, ``(C')`` with ``batch``

    Raises:
        As :func:`pyloss.functional.tversky_loss`, when made if the options alone are wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7)
        >>> criterion(torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8) > 0.5).shape
        torch.Size([])

    Reference:
        Salehi, Erdogmus, Gholipour. arXiv 1706.05721. Abraham, Khan. arXiv 1810.07842.
    """

    @options_of(overlap.tversky_loss, positional=None)
    def __init__(self, **options: Unpack[TverskyOptions]) -> None:
        overlap.check_tversky(options["alpha"], options["beta"], options["gamma"])
        check_options(**options)
        super().__init__(**options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return overlap.tversky_loss(input, target, **self.options)


class SegmentationFocalLoss(WeightedLoss):
    r"""Module of :func:`pyloss.functional.segmentation_focal_loss`; stands in for
    ``monai.losses.FocalLoss``.

    .. math:: \ell = \alpha_t\,(1 - p_t)^\gamma\,(-\log p_t)

    Args:
        As :func:`pyloss.functional.segmentation_focal_loss`. ``weight``, where given, is a buffer.

    Shape:
        - input: logits ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N, C', *)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.segmentation_focal_loss`, when made if the options alone are
        wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SegmentationFocalLoss(gamma=2.0, alpha=0.25)
        >>> criterion(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))).shape
        torch.Size([])

    Reference:
        Lin, Goyal, Girshick, He, Dollar. arXiv 1708.02002.
    """

    @options_of(focal.segmentation_focal_loss, positional=None)
    def __init__(self, **options: Unpack[SegmentationFocalOptions]) -> None:
        weight = options.pop("weight")
        focal.check_focal(options["gamma"], options["alpha"])
        names = ("reduction", "ignore_index", "empty", "validate")
        check_target_options(**{name: options[name] for name in names})
        super().__init__(_buffer(weight), **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return focal.segmentation_focal_loss(input, target, weight=self.weight, **self.options)


class DiceFocalLoss(WeightedLoss):
    r"""Module of :func:`pyloss.functional.dice_focal_loss`; as ``monai.losses.DiceFocalLoss``.

    .. math:: \ell = \lambda_\mathrm{dice}\, \ell_\mathrm{dice}
              + \lambda_\mathrm{focal}\, \ell_\mathrm{focal}

    Args:
        As :func:`pyloss.functional.dice_focal_loss`. ``weight``, where given, is a buffer.

    Shape:
        - input: logits ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N, C', *)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.dice_focal_loss`, when made if the options alone are wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.DiceFocalLoss(softmax=True, lambda_focal=0.5)
        >>> criterion(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))).shape
        torch.Size([])

    Reference:
        Zhu et al. AnatomyNet. arXiv 1808.05238.
    """

    @options_of(focal.dice_focal_loss, positional=None)
    def __init__(self, **options: Unpack[DiceFocalOptions]) -> None:
        weight = options.pop("weight")
        check_options(**options)
        focal.check_focal(options["gamma"], options["alpha"])
        names = ("lambda_dice", "lambda_focal")
        focal.check_factors(**{name: options[name] for name in names})
        super().__init__(_buffer(weight), **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return focal.dice_focal_loss(input, target, weight=self.weight, **self.options)


class GeneralizedDiceFocalLoss(WeightedLoss):
    r"""Module of :func:`pyloss.functional.generalized_dice_focal_loss`; as
    ``monai.losses.GeneralizedDiceFocalLoss``.

    .. math:: \ell = \lambda_\mathrm{gdl}\, \ell_\mathrm{gdl}
              + \lambda_\mathrm{focal}\, \ell_\mathrm{focal}

    Args:
        As :func:`pyloss.functional.generalized_dice_focal_loss`. ``weight``, where given, is a
        buffer.

    Shape:
        - input: logits ``(N, C, *)``
        - target: ``(N, C, *)``, or class indices ``(N, *)`` or ``(N, 1, *)``
        - output: scalar, or ``(N, C', *)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.generalized_dice_focal_loss`, when made if the options alone are
        wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.GeneralizedDiceFocalLoss(softmax=True, lambda_focal=0.5)
        >>> criterion(torch.randn(2, 3, 8, 8), torch.randint(3, (2, 1, 8, 8))).shape
        torch.Size([])

    Reference:
        Sudre et al. arXiv 1707.03237. Lin et al. arXiv 1708.02002.
    """

    @options_of(focal.generalized_dice_focal_loss, positional=None)
    def __init__(self, **options: Unpack[GeneralizedDiceFocalOptions]) -> None:
        weight = options.pop("weight")
        overlap.check_weight_type(options["w_type"])
        check_options(**options)
        focal.check_focal(options["gamma"], options["alpha"])
        names = ("lambda_gdl", "lambda_focal")
        focal.check_factors(**{name: options[name] for name in names})
        super().__init__(_buffer(weight), **options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return focal.generalized_dice_focal_loss(input, target, weight=self.weight, **self.options)


class SoftclDiceLoss(LossModule):
    r"""Module of :func:`pyloss.functional.cldice_loss`; stands in for
    ``monai.losses.SoftclDiceLoss``.

    .. math:: \ell = 1 - \frac{2\,u\,v}{u + v + \mathrm{smooth}}

    Args:
        As :func:`pyloss.functional.cldice_loss`.

    Shape:
        - input: ``(N, C, H, W)`` or ``(N, C, D, H, W)``
        - target: of the same shape, or class indices without C or with C = 1
        - output: scalar, or ``(N)`` with ``reduction="none"``

    Raises:
        As :func:`pyloss.functional.cldice_loss`, when made if the options alone are wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SoftclDiceLoss(iter_=5, sigmoid=True)
        >>> criterion(torch.randn(2, 1, 16, 16), torch.rand(2, 1, 16, 16) > 0.7).shape
        torch.Size([])

    Reference:
        Shit, Paetzold et al. arXiv 2003.07311.
    """

    @options_of(skeletons.cldice_loss, positional=None)
    def __init__(self, **options: Unpack[ClDiceOptions]) -> None:
        skeletons.check_skeleton_options(options["iter_"], options["smooth"])
        check_options(**options)
        super().__init__(**options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return skeletons.cldice_loss(input, target, **self.options)


class SoftDiceclDiceLoss(LossModule):
    r"""Module of :func:`pyloss.functional.dice_cldice_loss`; stands in for
    ``monai.losses.SoftDiceclDiceLoss``.

    .. math:: \ell = (1 - \alpha)\,\ell_\mathrm{dice} + \alpha\,\ell_\mathrm{cldice}

    Args:
        As :func:`pyloss.functional.dice_cldice_loss`.

    Shape:
        - input: ``(N, C, H, W)`` or ``(N, C, D, H, W)``
        - target: of the same shape, or class indices without C or with C = 1
        - output: scalar

    Raises:
        As :func:`pyloss.functional.dice_cldice_loss`, when made if the options alone are wrong.

    Example:
        >>> import torch, pyloss
        >>> criterion = pyloss.nn.SoftDiceclDiceLoss(alpha=0.3, sigmoid=True)
        >>> criterion(torch.randn(2, 1, 16, 16), torch.rand(2, 1, 16, 16) > 0.7).shape
        torch.Size([])

    Reference:
        Shit, Paetzold et al. arXiv 2003.07311.
    """

    @options_of(skeletons.dice_cldice_loss, positional=None)
    def __init__(self, **options: Unpack[DiceClDiceOptions]) -> None:
        skeletons.check_skeleton_options(options["iter_"], options["smooth"])
        check_options(**options)
        skeletons.check_share(options["alpha"], options["reduction"])
        super().__init__(**options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return skeletons.dice_cldice_loss(input, target, **self.options)


def _buffer(weight) -> Tensor | None:
    if weight is None or isinstance(weight, Tensor):
        return weight
    return torch.tensor(checked_weights(weight), dtype=torch.float32)
