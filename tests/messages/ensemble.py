"""EnsLoss."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import ens_loss
from pyloss.nn import EnsLoss

X, Y = torch.randn(4), torch.tensor([0, 1, 1, 0])
E = torch.randn(4)

ROWS = (
    refused(ValueError, "bc_lambda must be finite, got nan", EnsLoss, float("nan")),
    refused(TypeError, "bc_lambda must be a number, got Tensor", EnsLoss, torch.zeros(())),
    refused(ValueError, "period must be at least 1, got 0", EnsLoss, period=0),
    refused(TypeError, "period must be an integer, got float", EnsLoss, period=1.5),
    refused(ValueError, "avg is not a valid value for reduction", EnsLoss, reduction="avg"),
    refused(ValueError, "target must hold 0 and 1, got 2", EnsLoss(), X, Y + 1),
    refused(ValueError, "input must be (N,) or (N, 1), got [4, 1, 1]", EnsLoss().eval(),
            X[:, None, None], Y),
    refused(TypeError, "input must be a Tensor, got list", EnsLoss(), [1.0], Y),
    accepted(lambda target: ens_loss(X, target, noise=E), target=(Y.bool(), Y)),
    accepted(lambda target: ens_loss(X[:, None], target, noise=E[:, None]),
             target=(Y.float()[:, None], Y)),
    accepted(lambda bc_lambda, tail: ens_loss(X, Y, noise=E, bc_lambda=bc_lambda, tail=tail),
             bc_lambda=(np.float64(0.5), 0.5), tail=(np.False_, False)),
)  # fmt: skip
