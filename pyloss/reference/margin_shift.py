"""How far the margins of the label's class moved between two sets of logits, in plain PyTorch.

    Q = || ((x'_y - x'_j) - (x_y - x_j))_{j != y} ||_2

Paper: Mao, Mohri, Zhong. arXiv 2304.07288.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def margin_shift(
    logits: Tensor,
    logits_adv: Tensor,
    target: Tensor,
    *,
    squared: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Q, or Q^2, of each row; 0 of ignored rows, NaN of labels that are no class.

    Args:
        logits, logits_adv: ``(N, C, ...)``.
        target: ``(N, ...)``, class indices.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(1, 3), torch.tensor([0])
        >>> margin_shift(x, torch.tensor([[1.0, -2.0, -3.0]]), y)
        tensor([5.])
    """
    y = target.long()
    ignored = y == ignore_index
    sick = ((y < 0) | (y >= logits.shape[1])) & ~ignored
    y = torch.where(ignored | sick, 0, y).unsqueeze(1)
    moved = logits_adv - logits
    if moved.shape[1] == 0:
        return moved.sum(1)
    # Not where(ignored, 0, .) after the sum: what an ignored row holds must not reach a gradient.
    moved = torch.where(ignored.unsqueeze(1), 0.0, moved)
    square = (moved.gather(1, y) - moved).square().sum(1)
    square = square * torch.where(sick, math.nan, 1.0).to(square.dtype)
    if squared:
        return square
    none = square == 0  # where the norm has no gradient, 0 is taken
    return torch.where(none, 0.0, torch.where(none, 1.0, square).sqrt())
