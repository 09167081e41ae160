"""Masks of channels, gates and gated convolutions."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from messages._table import accepted, refused
from pyloss.functional import mask_prediction_loss, mass_topk_mask
from pyloss.nn import DynamicGate, GatedConv, gated_flops

ACT = torch.arange(24.0).reshape(2, 3, 2, 2)
CONV = nn.Conv2d(3, 4, 1)
ROWS = (
    refused(TypeError, "act must be a Tensor, got list", mass_topk_mask, [1.0], 0.5),
    refused(ValueError, "r must be at most 1, got 90", mass_topk_mask, ACT, 90),
    refused(TypeError, "r must be a number, got Tensor", mass_topk_mask, ACT, torch.tensor(0.5)),
    refused(ValueError, "min_channels must be in [0, 3], got 4",
            mass_topk_mask, ACT, 0.5, min_channels=4),
    refused(TypeError, "min_channels must be an integer, got float",
            mass_topk_mask, ACT, 0.5, min_channels=0.5),
    refused(ValueError, "logits and masks must be of as many layers, of one or more, got 2 and 1",
            mask_prediction_loss, [ACT[0, 0], ACT[0, 0]], [ACT[0, 0]]),
    refused(ValueError, "logits of layer 1 must be (B, C) and masks of layer 1 of its shape, got "
            "[2, 2] and [2]", mask_prediction_loss, [ACT[0, 0]] * 2, [ACT[0, 0], ACT[0, 0, 0]]),
    refused(ValueError, "in_channels must be at least 1, got 0", DynamicGate, 0, 3),
    refused(TypeError, "out_channels must be an integer, got float", DynamicGate, 2, 3.0),
    refused(ValueError, "x must be (B, 2, *), got [2, 3, 2, 2]", DynamicGate(2, 3), ACT),
    refused(ValueError, "x must be (B, 3, H, W), got [2, 3]",
            DynamicGate(3, 3, embedding=12), ACT[..., 0, 0]),
    refused(TypeError, "conv must be a convolution of torch.nn, got str", GatedConv, "conv"),
    refused(TypeError, "r must be a number, got NoneType", GatedConv, CONV, ratio=None),
    refused(TypeError, "inclusive must be a bool, got str", GatedConv, CONV, inclusive="no"),
    refused(TypeError, "model must be a Module, got str", gated_flops, "model", ACT),
    # Numbers and bools of numpy
    accepted(lambda **o: mass_topk_mask(ACT, **o), r=(np.float32(0.5), 0.5),
             min_channels=(np.int64(2), 2), inclusive=(np.True_, True)),
    accepted(lambda **o: DynamicGate(3, **o)(ACT), out_channels=(np.int64(4), 4),
             embedding=(np.int32(12), 12)),
    accepted(mask_prediction_loss, logits=([ACT[0, 0]], ACT[0, 0]),
             masks=((ACT[0, 0],), ACT[0, 0])),
)  # fmt: skip
