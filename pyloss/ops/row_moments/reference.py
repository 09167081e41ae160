"""The ops of row_moments on the reference, and their gradient in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._labels import outside, wide
from pyloss.ops._reference import gradients


def composed(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The moments in torch operations."""
    from pyloss.reference import row_moments  # with its first use

    return row_moments(input, target, ignore_index)


def composed_gradient(
    grad: Tensor, input: Tensor, target: Tensor, ignore_index: int, *, create_graph: bool = True
) -> Tensor:
    """The gradient in torch operations, with gradients of its own to `grad` and the input."""
    return gradients(
        lambda x: composed(x, target, ignore_index), [input], [grad], create_graph=create_graph
    )[0]


def forward(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    if input.is_cpu:
        classes = input.shape[0 if input.dim() == 1 else 1]
        bad = target[outside(target, classes) & (wide(target) != ignore_index)]
        if bad.numel():
            raise IndexError(f"Target {int(bad[0])} is out of bounds.")
    return composed(input, target, ignore_index).contiguous()


def backward(
    grad: Tensor, input: Tensor, target: Tensor, moments: Tensor, ignore_index: int
) -> Tensor:
    found = composed_gradient(grad, input, target, ignore_index, create_graph=False)
    return torch.empty_like(input).copy_(found)
