"""Normalized logistic loss and the perceptrons."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import normalized_logistic_loss
from pyloss.nn import NormalizedLogisticLoss
from pyloss.research.perceptron import batch_perceptron

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])

ROWS = (
    refused(ValueError, "input must have at least two classes, got [4, 0]",
            normalized_logistic_loss, X[:, :0], Y),
    refused(ValueError, "input must have at least one dimension", normalized_logistic_loss,
            X[0, 0], Y),
    refused(ValueError, "target must have the shape [4, 5], got [4]",
            NormalizedLogisticLoss(), torch.randn(4, 3, 5), Y),
    refused(IndexError, "Target 3 is out of bounds", NormalizedLogisticLoss(), X, Y + 1),
    refused(ValueError, "target must hold 0 and 1, got -1", normalized_logistic_loss, X[:, 0],
            torch.tensor([-1, 1, 1, -1])),
    refused(TypeError, "z must be a floating Tensor, got list", batch_perceptron, [[1.0]]),
    accepted(normalized_logistic_loss, X, target=(Y.to(torch.uint8), Y),
             ignore_index=(np.int64(1), 1)),
)  # fmt: skip
