"""Calls of the kernels: buffers, records, results. What a device has of its own comes as `launch`.

It takes (x, problem, frames) for a forward, (x, problem, backward) for a backward.
"""

from __future__ import annotations

from torch import Tensor

from pyloss.ops._launch import accumulator_dtype, address
from pyloss.ops.frame_pca.records import Backward, problem


def width(dim: int) -> int:
    """Numbers of a cloud: axes, centre, eigenvalues, total weight."""
    return dim * dim + 2 * dim + 1


def empty_frames(x: Tensor, clouds: int) -> Tensor:
    """For the results of a forward; shared by the kernels and the fake."""
    return x.new_empty((clouds, width(x.shape[1])), dtype=accumulator_dtype(x.dtype))


def empty_gradients(x: Tensor, weight: Tensor | None) -> list[Tensor]:
    """For the gradients of the points and, where they have some, the weights."""
    found = [x.new_empty(x.shape)]
    if weight is not None:
        found.append(weight.new_empty(weight.shape, dtype=accumulator_dtype(x.dtype)))
    return found


def forward(
    launch, x: Tensor, weight: Tensor | None, offsets: Tensor | None, clouds: int, centred: bool
) -> Tensor:
    frames = empty_frames(x, clouds)
    record, alive = problem(x, weight, offsets, clouds, centred)
    launch(x, record, address(frames))
    del alive
    return frames


def backward(
    launch,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    offsets: Tensor | None,
    frames: Tensor,
    centred: bool,
    tolerance: float,
) -> list[Tensor]:
    found = empty_gradients(x, weight)
    record, alive = problem(x, weight, offsets, frames.shape[0], centred)
    grad, frames = grad.contiguous(), frames.contiguous()
    dx, dw = (*found, None)[:2]
    launch(x, record, Backward(address(frames), address(grad), address(dx), address(dw), tolerance))
    del alive
    return found
