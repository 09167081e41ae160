"""Calls of the kernels: buffers, records, results. What a device has of its own comes as `launch`,
which takes (x, problem, kind, address of the result)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.segment import kinds
from pyloss.ops.segment.records import problem


def empty_fold(x: Tensor, offsets: Tensor, kind: int) -> Tensor:
    """For the results of a fold; shared by the kernels and the fake."""
    dtype = torch.int64 if kind == kinds.ARGMAX else accumulator_dtype(x.dtype)
    shape = (kinds.RESULTS.get(kind, 1), offsets.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=dtype)


def empty_map(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def fold(
    launch, x: Tensor, other: Tensor | None, offsets: Tensor, given: Sequence[Tensor], kind: int
) -> Tensor:
    out = empty_fold(x, offsets, kind)
    record, alive = problem(x, other, offsets, given)
    launch(x, record, kind, out.data_ptr())
    del alive
    return out


def map_(
    launch, x: Tensor, other: Tensor | None, offsets: Tensor, given: Sequence[Tensor], kind: int
) -> Tensor:
    out = empty_map(x)
    record, alive = problem(x, other, offsets, given)
    launch(x, record, kind, out.data_ptr())
    del alive
    return out
