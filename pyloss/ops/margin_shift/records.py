"""What crosses to csrc/bind/margin_shift.cpp."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops.row_softmax.layout import layout

Three = tuple[int, int, int]


class Problem(NamedTuple):
    """Addresses, and strides in elements."""

    sizes: Three  # outer, classes, inner
    dtype: int
    x: int
    x_strides: Three
    adv: int
    adv_strides: Three
    target: int
    target_dtype: int
    squared: bool
    ignore_index: int


class Backward(NamedTuple):
    """What is not wanted is the address 0."""

    g: int
    shift: int
    total: int
    dx: int
    dx_strides: Three
    dadv: int
    dadv_strides: Three


RECORDS = (Problem, Backward)


def problem(
    x: Tensor, x_adv: Tensor, target: Tensor, squared: bool, ignore_index: int
) -> tuple[Problem, tuple[Tensor, ...]]:
    """The record, and the tensors that must outlive the call."""
    x, sizes, strides = layout(x)
    x_adv, _, adv_strides = layout(x_adv)
    target = target.contiguous()
    found = Problem(
        sizes, DTYPE_CODES[x.dtype], x.data_ptr(), strides, x_adv.data_ptr(), adv_strides,
        target.data_ptr(), DTYPE_CODES[target.dtype], squared, ignore_index,
    )  # fmt: skip
    return found, (x, x_adv, target)
