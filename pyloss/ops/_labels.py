"""Class indices compared with numbers.

torch compares a tensor with a number in the tensor's own dtype, where the number wraps: as uint8,
257 classes are 1, and the label 156 equals -100. Whoever compares labels asks here.
"""

from __future__ import annotations

from torch import Tensor


def wide(labels: Tensor) -> Tensor:
    """As int64; no copy of what is that already."""
    return labels.long()


def outside(labels: Tensor, classes: int) -> Tensor:
    """Which labels are none of the classes."""
    labels = wide(labels)
    return (labels < 0) | (labels >= classes)
