"""Layers in the sense of the format: a forward for modules that are there already.

They have no state and no constructor: ``kernels.kernelize`` puts their forward in place of that of
the module whose attributes they name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional.classification import fused_cross_entropy


class CrossEntropyLoss(torch.nn.Module):
    """For :class:`torch.nn.CrossEntropyLoss`."""

    has_backward: bool = True
    can_torch_compile: bool = True
    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return fused_cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
