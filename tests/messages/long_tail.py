"""Long-tailed classes."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import class_balanced_weight, logit_adjusted_cross_entropy
from pyloss.nn import LogitAdjustedCrossEntropyLoss

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])

ROWS = (
    refused(ValueError, "tau must be finite and >= 0, got -1",
            LogitAdjustedCrossEntropyLoss, [1, 2, 3], -1),
    refused(ValueError, "counts must be >= 0, got -2", LogitAdjustedCrossEntropyLoss, [1, -2]),
    refused(TypeError, "unexpected keyword argument 'inplace'",
            LogitAdjustedCrossEntropyLoss, [1, 2, 3], inplace=True),
    refused(ValueError, "counts must be of 3 classes, got 2",
            LogitAdjustedCrossEntropyLoss([1, 2]), X, Y),
    accepted(class_balanced_weight,
             counts=(np.array([3.0, 5.0], dtype=np.float32), torch.tensor([3, 5])),
             beta=(np.float32(0.5), 0.5)),
    accepted(logit_adjusted_cross_entropy, X, Y,
             counts=([5, 2, 1], torch.tensor([5, 2, 1])), adjustment_tau=(np.int64(1), 1.0)),
)  # fmt: skip
