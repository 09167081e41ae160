"""Region losses: Dice and its family, focal losses, clDice."""

from __future__ import annotations

import numpy as np
import torch

import pyloss
from messages._table import accepted, refused
from pyloss.functional import (
    dice_cross_entropy_loss,
    dice_focal_loss,
    segmentation_focal_loss,
    sigmoid_focal_loss,
    soft_dice_loss,
    soft_skeleton,
    tversky_loss,
)
from pyloss.metrics import cl_dice
from pyloss.nn import (
    DiceCELoss,
    DiceFocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    SegmentationFocalLoss,
    SoftclDiceLoss,
    SoftDiceclDiceLoss,
    SoftDiceLoss,
    TverskyLoss,
)

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 3, 4, 5, generator=G), torch.randint(3, (2, 4, 5), generator=G)
P, MASK = torch.rand(2, 1, 4, 5, generator=G), torch.rand(2, 1, 4, 5, generator=G) > 0.5
BYTES = "target must lie in [0, 1], got values from 0 to 255"

ROWS = (
    # Found when the module is made
    refused(ValueError, "averaged is not a valid value for reduction",
            SoftDiceLoss, reduction="averaged"),
    refused(ValueError, "reduction must be 'mean' or 'sum', got 'none'",
            DiceCELoss, reduction="none"),
    refused(ValueError, "at most one of sigmoid, softmax and other_act",
            SoftDiceLoss, sigmoid=True, softmax=True),
    refused(ValueError, "at most one of sigmoid, softmax and other_act",
            DiceCELoss, softmax=True, other_act=torch.sigmoid),
    refused(TypeError, "other_act must be callable, got str", SoftDiceLoss, other_act="sigmoid"),
    refused(ValueError, "smooth_nr must be finite and >= 0, got -1.0",
            SoftDiceLoss, smooth_nr=-1.0),
    refused(TypeError, "ignore_index must be an integer", SoftDiceLoss, ignore_index=1.5),
    refused(TypeError, "ignore_index must be an integer", DiceCELoss, ignore_index=True),
    refused(ValueError, "empty must be 'nan' or 'zero', got 'none'", DiceCELoss, empty="none"),
    refused(ValueError, "validate must be True, False or None, got 'once'",
            SoftDiceLoss, validate="once"),
    refused(ValueError, "lambda_ce must be finite and >= 0, got -1.0", DiceCELoss, lambda_ce=-1.0),
    refused(RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5",
            DiceCELoss, label_smoothing=1.5),
    refused(ValueError, "weight must be finite and >= 0, got -1.0", SoftDiceLoss, weight=[-1.0]),
    refused(TypeError, "weight must be a Tensor, got list", DiceCELoss, weight=[1.0, 2.0]),
    refused(TypeError, "unexpected keyword argument 'ignored_index'",
            SoftDiceLoss, ignored_index=1),
    # Ranges
    refused(ValueError, BYTES, soft_dice_loss, P, MASK.to(torch.uint8) * 255),
    refused(ValueError, BYTES, soft_dice_loss, P, MASK[:, 0] * 255),
    refused(ValueError, BYTES, dice_cross_entropy_loss, P, MASK * 255.0, sigmoid=True),
    refused(ValueError, BYTES, pyloss.nn.SoftDiceLoss(validate=True), P, MASK * 255),
    refused(UserWarning, "for logits set sigmoid=True or softmax=True", soft_dice_loss, X, Y),
    refused(UserWarning, "for logits set sigmoid=True or softmax=True", DiceCELoss(), X, Y),
    refused(ValueError, "input has values outside [0, 1]", soft_dice_loss, X, Y, validate=True),
    refused(UserWarning, "include_background=False has no effect: input has one channel",
            soft_dice_loss, P, MASK, include_background=False),
    # Numbers and bools of numpy
    accepted(soft_dice_loss, X, Y, softmax=(np.True_, True), batch=(np.True_, True),
             smooth_nr=(np.float32(0.25), 0.25), smooth_dr=(np.float64(0.5), 0.5),
             ignore_index=(np.int64(1), 1), include_background=(np.False_, False),
             weight=(np.array([0.5, 2.0]), [0.5, 2.0]), validate=(np.False_, False)),
    accepted(soft_dice_loss, P, MASK, to_onehot_y=(np.False_, False), weight=(np.float32(2), 2.0),
             squared_pred=(np.True_, True), jaccard=(np.bool_(1), True)),
    accepted(dice_cross_entropy_loss, X, Y, softmax=(np.True_, True),
             lambda_dice=(np.float32(0.5), 0.5), lambda_ce=(np.int64(2), 2),
             label_smoothing=(np.float32(0.25), 0.25), ignore_index=(np.uint8(1), 1)),
    # The family
    refused(ValueError, "w_type must be one of square, simple, uniform, got 'cube'",
            GeneralizedDiceLoss, w_type="cube"),
    refused(ValueError, "beta must be finite and >= 0, got -1.0", TverskyLoss, beta=-1.0),
    refused(ValueError, "gamma must be finite and > 0, got 0.0", TverskyLoss, gamma=0.0),
    refused(ValueError, "alpha must be in [0, 1], got 25", SegmentationFocalLoss, alpha=25),
    refused(ValueError, "alpha must be finite and >= 0, got -1.0",
            DiceFocalLoss, alpha=[0.5, -1.0]),
    refused(ValueError, "lambda_focal must be finite and >= 0, got -1.0",
            DiceFocalLoss, lambda_focal=-1.0),
    refused(ValueError, "lambda_gdl must be finite and >= 0, got -1.0",
            GeneralizedDiceFocalLoss, lambda_gdl=-1.0),
    refused(TypeError, "iter_ must be an integer, got float", SoftclDiceLoss, iter_=2.0),
    refused(ValueError, "smooth must be finite and > 0, got 0.0", SoftclDiceLoss, smooth=0.0),
    refused(ValueError, "alpha must be in [0, 1], got 2.0", SoftDiceclDiceLoss, alpha=2.0),
    refused(ValueError, "reduction must be 'mean' or 'sum', got 'none'",
            SoftDiceclDiceLoss, reduction="none"),
    refused(ValueError, "input must have shape (N, C, H, W) or (N, C, D, H, W), got [3, 4, 5]",
            soft_skeleton, X[0]),
    refused(ValueError, "alpha must be one number or one for each of the 3 classes that count, "
            "got 2", segmentation_focal_loss, X, Y, alpha=[0.5, 0.5]),
    refused(ValueError, "softmax over one channel is 1 everywhere: set use_softmax=False",
            segmentation_focal_loss, P, MASK, use_softmax=True),
    refused(ValueError, BYTES, segmentation_focal_loss, P, MASK * 255),
    refused(ValueError, "target must have the shape of input; got input [2, 3, 4, 5] and target "
            "[2, 4, 5]", sigmoid_focal_loss, X, Y),
    refused(TypeError, "threshold must be a number, got str", cl_dice, P, MASK, "half"),
    accepted(segmentation_focal_loss, X, Y, gamma=(np.float32(0.5), 0.5),
             alpha=(np.array([0.5, 0.25, 1.0]), [0.5, 0.25, 1.0]), use_softmax=(np.True_, True)),
    accepted(tversky_loss, X, Y, softmax=(np.True_, True), alpha=(np.float32(0.25), 0.25),
             beta=(np.int64(1), 1), gamma=(np.float64(2.0), 2.0)),
    accepted(dice_focal_loss, X, Y, softmax=(np.True_, True), lambda_dice=(np.float32(0.5), 0.5)),
    accepted(soft_skeleton, P, iter_=(np.int64(2), 2)),
)  # fmt: skip
