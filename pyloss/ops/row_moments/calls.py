"""Calls of the kernels: buffers, records, results. What a device has of its own comes as `launch`.

It takes (input, problem, moments) for a forward, (input, problem, backward) for a backward.
"""

from __future__ import annotations

from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.row_moments.records import Backward, problem
from pyloss.ops.row_softmax.layout import gradient_buffer, row_shape

MOMENTS = 4  # target entry, target entry less mean, mean, variance


def empty_moments(input: Tensor) -> Tensor:
    """For the results of a forward; shared by the kernels and the fake."""
    return input.new_empty((MOMENTS, *row_shape(input)), dtype=accumulator_dtype(input.dtype))


def forward(launch, input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    moments = empty_moments(input)
    if moments.numel():
        record, alive = problem(input, target, ignore_index)
        launch(input, record, moments.data_ptr())
        del alive
    return moments


def backward(
    launch, grad: Tensor, input: Tensor, target: Tensor, moments: Tensor, ignore_index: int
) -> Tensor:
    result, buffer, strides = gradient_buffer(input)
    if input.numel():
        record, alive = problem(input, target, ignore_index)
        grad, moments = grad.contiguous(), moments.contiguous()
        fields = Backward(moments.data_ptr(), grad.data_ptr(), buffer.data_ptr(), strides)
        launch(input, record, fields)
        del alive
    if buffer is not result:
        result.copy_(buffer)
    return result
