"""The CUDA implementations of the ops of segment."""

from __future__ import annotations

import math
from functools import partial

import torch

from pyloss import _C
from pyloss.ops._launch import accumulator_dtype, queue
from pyloss.ops.segment import calls


def _fold(x, problem, kind, out):
    scratch = None
    if size := _C.segment_scratch_numbers(*x.shape):
        scratch = x.new_full((size,), math.nan, dtype=accumulator_dtype(x.dtype))
    with torch.cuda.device_of(x):
        _C.cuda_segment_fold(
            problem, kind, out, 0 if scratch is None else scratch.data_ptr(), *queue(x)
        )


def _map(x, problem, kind, out):
    with torch.cuda.device_of(x):
        _C.cuda_segment_map(problem, kind, out, *queue(x))


fold = partial(calls.fold, _fold)
map_ = partial(calls.map_, _map)
