"""What crosses to csrc/bind/row_moments.cpp."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops.row_softmax.layout import layout


class Problem(NamedTuple):
    sizes: tuple[int, int, int]  # outer, classes, inner
    dtype: int
    x: int
    x_strides: tuple[int, int, int]
    target: int  # [rows]
    target_dtype: int
    ignore_index: int


class Backward(NamedTuple):
    moments: int  # [4][rows]
    grad: int  # the same
    out: int
    out_strides: tuple[int, int, int]


RECORDS = (Problem, Backward)


def problem(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Problem, tuple[Tensor, ...]]:
    """The record, and what must outlive the call."""
    x, sizes, strides = layout(input)
    target = target.contiguous()
    record = Problem(
        sizes, DTYPE_CODES[x.dtype], x.data_ptr(), strides, target.data_ptr(),
        DTYPE_CODES[target.dtype], ignore_index,
    )  # fmt: skip
    return record, (x, target)
