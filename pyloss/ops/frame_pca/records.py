"""What crosses to csrc/bind/frame_pca.cpp."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES, accumulator_dtype, address


class Problem(NamedTuple):
    clouds: int
    points: int  # of all clouds
    dim: int
    dtype: int
    x: int  # [points][dim]
    weight: int  # [points], 0: ones
    offsets: int  # [clouds + 1], 0: clouds of equal size
    offsets_dtype: int
    centred: int


class Backward(NamedTuple):
    frames: int  # [clouds][width]
    grad: int  # the same
    dx: int
    dw: int  # 0: none
    tolerance: float


RECORDS = (Problem, Backward)


def problem(
    x: Tensor, weight: Tensor | None, offsets: Tensor | None, clouds: int, centred: bool
) -> tuple[Problem, tuple[Tensor | None, ...]]:
    """The record, and what must outlive the call."""
    x = x.contiguous()
    weight = None if weight is None else weight.to(accumulator_dtype(x.dtype)).contiguous()
    offsets = None if offsets is None else offsets.contiguous()
    index = torch.int64 if offsets is None else offsets.dtype
    record = Problem(
        clouds, *x.shape, DTYPE_CODES[x.dtype], address(x), address(weight), address(offsets),
        DTYPE_CODES[index], int(centred),
    )  # fmt: skip
    return record, (x, weight, offsets)
