"""Moments of rows of class scores, in plain PyTorch.

    target entry x_t,  x_t - mean,  mean = sum_j x_j / C,  var = sum_j (x_j - mean)^2 / C

A loss is spherical when it is a function of x_t, sum_j x_j = C mean and
sum_j x_j^2 = C (var + mean^2).

Paper: de Brebisson, Vincent. arXiv 1604.08859.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_moments(input: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """The moments of each row.

    Args:
        input: ``(C)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating; half types are summed in
            float32.
        target: class indices, ``()``, ``(N)`` or ``(N, d1, ..., dk)``. A row whose label is no
            class has NaN.
        ignore_index: label of the rows whose moments are 0.

    Returns:
        ``(4, *target.shape)``: target entry, target entry less mean, mean, variance.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[1.0, 2.0, 6.0]])
        >>> pyloss.reference.row_moments(x, torch.tensor([2])).flatten()
        tensor([6.0000, 3.0000, 3.0000, 4.6667])
    """
    dim = 0 if input.dim() == 1 else 1
    x = input if input.dtype == torch.float64 else input.float()
    labels = target.long().unsqueeze(dim)
    ignored = labels == ignore_index
    outside = ((labels < 0) | (labels >= x.shape[dim])) & ~ignored
    x = torch.where(ignored, 0.0, x)
    own = x.gather(dim, torch.where(ignored | outside, 0, labels))
    mean = x.mean(dim, keepdim=True)
    var = (x - mean).square().mean(dim, keepdim=True)
    moments = torch.stack([own, own - mean, mean, var]).squeeze(dim + 1)
    return torch.where(outside.squeeze(dim), float("nan"), moments)
