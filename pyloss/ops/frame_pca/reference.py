"""The ops of frame_pca on the reference, and their gradient in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._reference import gradients


def composed(
    x: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    clouds: int,
    centred: bool,
    tolerance: float = 0.0,
) -> Tensor:
    """Rows of axes, centre, eigenvalues and total weight, in torch operations."""
    from pyloss.reference import frame_pca  # with its first use

    axes, centre, value, total = frame_pca(
        x, weight, offsets, clouds, centred=centred, tolerance=tolerance
    )
    return torch.cat([axes.flatten(1), centre, value, total.unsqueeze(1)], 1)


def composed_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    clouds: int,
    centred: bool,
    tolerance: float,
    *,
    create_graph: bool = True,
) -> list[Tensor | None]:
    """The gradients of points and weights in torch operations, with gradients of their own."""
    return gradients(
        lambda x, weight: composed(x, weight, offsets, clouds, centred, tolerance),
        [x, weight],
        [grad],
        create_graph=create_graph,
    )


def forward(x, weight, offsets, clouds, centred):
    return composed(x, weight, offsets, clouds, centred).contiguous()


def backward(grad, x, weight, offsets, frames, centred, tolerance):
    dx, dw = composed_gradients(
        grad, x, weight, offsets, frames.shape[0], centred, tolerance, create_graph=False
    )
    if weight is None:
        return [dx.contiguous()]
    return [dx.contiguous(), dw.to(accumulator_dtype(x.dtype)).contiguous()]
