"""Class indices compared with numbers.

torch compares a tensor with a number in the tensor's own dtype, where the number wraps: as uint8,
257 classes are 1, and the label 156 equals -100. Whoever compares labels asks here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(labels: Tensor) -> Tensor:
    """As int64; no copy of what is that already."""
    return labels.long()


def outside(labels: Tensor, classes: int) -> Tensor:
    """Which labels are none of the classes."""
    labels = wide(labels)
    return (labels < 0) | (labels >= classes)


def equals(labels: Tensor, number: int) -> Tensor:
    """Where labels are a number; masks of bools and floats, which do not wrap, pass too."""
    return (labels if _never_wraps(labels) else wide(labels)) == number


def at_least(labels: Tensor, number: float) -> Tensor:
    """Where labels are a number or more."""
    if not _never_wraps(labels):
        labels = labels.double() if isinstance(number, float) else wide(labels)
    return labels >= number


def _never_wraps(labels: Tensor) -> bool:
    return labels.is_floating_point() or labels.dtype == torch.bool
