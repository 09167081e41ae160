"""What a linear layer's loss takes for its numbers of rows."""

from __future__ import annotations

import numpy
import torch

import pyloss
from messages._table import accepted, refused

LINEAR = pyloss.fused_linear_cross_entropy
LAYER = (torch.linspace(-1.0, 1.0, 12).reshape(4, 3), torch.linspace(-2.0, 1.0, 15).reshape(5, 3))
Y = torch.tensor([0, 3, 1, 4])

ROWS = (
    accepted(LINEAR, *LAYER, Y, chunk=(numpy.int64(2), 2), shift=(numpy.int32(1), 1)),
    refused(TypeError, "chunk must be 'auto' or a number of rows, got 2.0",
            LINEAR, *LAYER, Y, chunk=2.0),
    refused(TypeError, "chunk must be 'auto' or a number of rows, got True",
            LINEAR, *LAYER, Y, chunk=True),
    refused(TypeError, "shift must be an integer, got float", LINEAR, *LAYER, Y, shift=1.0),
    refused(TypeError, "shift must be an integer, got bool",
            LINEAR, *LAYER, Y, shift=numpy.True_),
)  # fmt: skip
