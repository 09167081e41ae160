"""Logits of any shape as (outer, classes, inner)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _merged_inner(x: Tensor) -> int | None:
    """The stride of dimensions 2.. taken as one, or None when they do not lie evenly."""
    stride, expected = 0, None
    for size, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride if expected is not None else 1


def layout(x: Tensor) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """x, copied only when its trailing dimensions do not lie evenly; its sizes; its strides."""
    if x.dim() == 2:
        (rows, classes), (row_step, class_step) = x.shape, x.stride()
        return x, (1, classes, rows), (0, class_step, row_step)
    if x.dim() == 1:
        return x, (1, x.shape[0], 1), (0, x.stride(0), 0)
    inner = _merged_inner(x)
    if inner is None:
        x = x.contiguous()
        inner = 1
    return x, (x.shape[0], x.shape[1], math.prod(x.shape[2:])), (x.stride(0), x.stride(1), inner)


def _by_vectors(x: Tensor) -> bool:
    """Whether the kernel of x's device moves 16 bytes at a time."""
    return x.is_cuda


def gradient_like(input: Tensor) -> Tensor:
    """Empty gradient of the logits.

    Rows of a slice, which lie apart, stay apart on a GPU: by as many bytes, modulo 16, as those of
    the logits, so that a vector of the one is a vector of the other.
    """
    if input.dim() == 2 and input.stride(1) == 1 and _by_vectors(input):
        (rows, classes), pitch = input.shape, input.stride(0)
        vector = 16 // input.element_size()
        if rows > 1 and pitch >= classes and (pitch - classes) % vector:
            begin = input.storage_offset() % vector
            pitch = classes + (pitch - classes) % vector
            return input.new_empty((rows * pitch + begin,)).as_strided(
                (rows, classes), (pitch, 1), begin
            )
    return torch.empty_like(input)


def gradient_buffer(input: Tensor) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """The result tensor, and the tensor and strides that the kernel writes (often the same)."""
    result = gradient_like(input)
    buffer, _, strides = layout(result)
    if buffer is not result:
        buffer = torch.empty_like(buffer)
    return result, buffer, strides


def extent(x: Tensor) -> int:
    """Elements from the first to the last, those between the rows of a slice included."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0


def row_count(input: Tensor) -> int:
    if input.dim() == 2:
        return input.shape[0]
    return 1 if input.dim() == 1 else input.shape[0] * math.prod(input.shape[2:])


def row_shape(input: Tensor) -> tuple[int, ...]:
    return () if input.dim() == 1 else (input.shape[0], *input.shape[2:])
