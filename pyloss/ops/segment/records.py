"""What crosses to csrc/bind/segment.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, address


class Problem(NamedTuple):
    sizes: tuple[int, int, int]  # rows, width, segments
    dtype: int
    x: int  # [rows][width], columns adjacent
    x_stride: int
    other: int  # the same, or 0
    other_stride: int
    offsets: int  # [segments + 1]
    offsets_dtype: int
    given: tuple[int, ...]  # [segments][width] each


RECORDS = (Problem,)


def problem(
    x: Tensor, other: Tensor | None, offsets: Tensor, given: Sequence[Tensor]
) -> tuple[Problem, tuple[object, ...]]:
    """The record, and what must outlive the call."""
    x, other, offsets = _rows(x), None if other is None else _rows(other), offsets.contiguous()
    given = [t.contiguous() for t in given]
    record = Problem(
        (*x.shape, offsets.shape[0] - 1), DTYPE_CODES[x.dtype], x.data_ptr(), x.stride(0),
        address(other), 0 if other is None else other.stride(0), offsets.data_ptr(),
        DTYPE_CODES[offsets.dtype], tuple(t.data_ptr() for t in given),
    )  # fmt: skip
    return record, (x, other, offsets, given)


def _rows(x: Tensor) -> Tensor:
    """With adjacent columns. One that is expanded for its shape alone has none to be adjacent."""
    return x if x.shape[1] <= 1 or x.stride(1) == 1 or x.stride() == (0, 0) else x.contiguous()
