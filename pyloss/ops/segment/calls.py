"""Calls of the kernels: buffers, records, results."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.segment import kinds


def empty_fold(x: Tensor, offsets: Tensor, kind: int) -> Tensor:
    """For the results of a fold; shared by the kernels and the fake."""
    dtype = torch.int64 if kind == kinds.ARGMAX else accumulator_dtype(x.dtype)
    shape = (kinds.RESULTS.get(kind, 1), offsets.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=dtype)


def empty_map(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
