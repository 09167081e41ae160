"""Spherical losses and their factored layer."""

from __future__ import annotations

import numpy as np
import torch

import pyloss.functional as F
from messages._table import accepted, refused
from pyloss.nn import OneHotMSELoss, SphericalLinear, SphericalLoss, SphericalSoftmaxLoss
from pyloss.nn import SphericalZLoss as ZLoss

X, Y = torch.linspace(-1.0, 2.0, 15).reshape(3, 5), torch.tensor([0, 3, 1])


def made(**options) -> SphericalLinear:
    torch.manual_seed(0)
    return SphericalLinear(5, 9, **options)


def stepped(**options) -> torch.Tensor:
    layer = made()
    layer(X, Y).backward()
    layer.step(**options)
    return layer.weight


ROWS = (
    refused(ValueError, "a must be finite and > 0, got -1", ZLoss, -1),
    refused(TypeError, "a must be a number, got Tensor", ZLoss, torch.tensor(1.0)),
    refused(ValueError, "b must be finite, got inf", ZLoss, b=float("inf")),
    refused(ValueError, "eps must be finite and > 0, got 0", SphericalSoftmaxLoss, 0),
    refused(TypeError, "fn must be a function of (o_t, s, q), got str", SphericalLoss, "z"),
    refused(ValueError, "avg is not a valid value for reduction", OneHotMSELoss, reduction="avg"),
    refused(RuntimeError, "weight must have one entry for each class, (C), got shape [1, 5]",
            OneHotMSELoss, torch.ones(1, 5)),
    refused(RuntimeError, "expected target dtype to be Long or Byte, but got Float; class labels "
            "must be integers, target.long()", F.one_hot_mse_loss, X, X),
    refused(ValueError, "fn must return a loss of each row, [3], got float",
            F.spherical_loss, X, Y, lambda o, s, q: 1.0),
    refused(TypeError, "num_classes must be an integer, got float", SphericalLinear, 5, 9.0),
    refused(ValueError, "in_features must be at least 1, got 0", SphericalLinear, 0, 9),
    refused(ValueError, "loss must be one of 'z', 'mse', 'taylor', 'spherical' or a function, got "
            "'ce'", SphericalLinear, 5, 9, "ce"),
    refused(TypeError, "h must be floating, got torch.int64", made(), Y, Y),
    refused(ValueError, "h must have 5 features, got [3]", made().logits, X[:, 0]),
    refused(RuntimeError, "h is on meta and the layer on cpu", made(), X.to("meta"), Y.to("meta")),
    refused(TypeError, "lr must be a number, got str", stepped, lr="0.1"),
    accepted(F.spherical_z_loss, X, Y, a=(np.float32(0.5), 0.5), b=(np.int64(2), 2)),
    accepted(F.spherical_softmax_loss, X, Y, eps=(np.float64(0.1), 0.1)),
    accepted(lambda **o: made(**o)(X, Y), refresh_every=(np.int64(7), 7), a=(np.float64(2), 2)),
    accepted(stepped, lr=(np.float64(0.5), 0.5), weight_decay=(np.float32(0.5), 0.5)),
)  # fmt: skip
