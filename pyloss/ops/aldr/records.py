"""What crosses to csrc/bind/aldr.cpp. Formulas: csrc/common/aldr.h."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype, address

# Rows of the statistics that others than the kernels read, and how many there are.
VALUE, LAMBDA = 0, 1
STATS = 8


class Problem(NamedTuple):
    rows: int
    classes: int
    dtype: int
    x: int
    target: int
    start: int  # 0: to the fixed point
    lambda0: float
    alpha: float
    margin: float
    ignore_index: int
    l1: int


RECORDS = (Problem,)


def problem(
    x: Tensor, target: Tensor, start: Tensor | None, numbers, ignore_index: int, l1: bool
) -> tuple[Problem, tuple[Tensor | None, ...]]:
    """The record of a call; and the tensors that must outlive it."""
    x, target = x.contiguous(), target.contiguous()
    start = None if start is None else start.contiguous()
    record = Problem(
        *x.shape, DTYPE_CODES[x.dtype], address(x), address(target), address(start), *numbers,
        ignore_index, int(l1),
    )  # fmt: skip
    return record, (x, target, start)


def stats_of(x: Tensor) -> Tensor:
    """Empty."""
    return x.new_empty((STATS, x.shape[0]), dtype=accumulator_dtype(x.dtype))
