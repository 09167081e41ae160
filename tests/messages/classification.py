"""Losses of rows of logits."""

from __future__ import annotations

import torch

import pyloss
from messages._table import refused

X, Y = torch.linspace(-1.0, 2.0, 15).reshape(3, 5), torch.tensor([0, 3, 1])

ROWS = (
    refused(TypeError, "ignore_index must be an integer, got None (NoneType)",
            pyloss.fused_cross_entropy, X, Y, ignore_index=None),
    refused(TypeError, "ignore_index must be an integer, got -100.0 (float)",
            pyloss.fused_cross_entropy, X, Y, ignore_index=-100.0),
    refused(RuntimeError, "class labels must be integers, target.long()",
            pyloss.fused_cross_entropy, X, Y.float()),
)  # fmt: skip
