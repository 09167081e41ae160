"""The CUDA implementations of the ops of row_softmax."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES, queue
from pyloss.ops.row_softmax import calls
from pyloss.ops.row_softmax.layout import extent


def _forward(input, problem, forward):
    with torch.cuda.device_of(input):
        size = _C.cuda_row_softmax_scratch_bytes(problem, input.get_device())
        scratch = input.new_empty((size,), dtype=torch.uint8)
        _C.cuda_row_softmax_fwd(problem, forward, scratch.data_ptr(), size, *queue(input))


def _backward(input, problem, backward):
    with torch.cuda.device_of(input):
        _C.cuda_row_softmax_bwd(problem, backward, *queue(input))


def _hvp(input, problem, backward, hvp):
    with torch.cuda.device_of(input):
        _C.cuda_row_softmax_hvp(problem, backward, hvp, *queue(input))


run_forward = partial(calls.run_forward, _forward)
run_backward = partial(calls.run_backward, _backward)
forward = partial(calls.forward, _forward)
backward = partial(calls.backward, _backward)
backward_ = partial(calls.backward_, _backward)
hvp = partial(calls.hvp, _hvp)


def scale_(data: Tensor, factor: Tensor) -> None:
    # Only ever the gradient that the forward has just allocated: dense in some order, or with rows
    # apart, whose gaps nobody reads.
    code = DTYPE_CODES[data.dtype]
    with torch.cuda.device_of(data):
        _C.cuda_scale_inplace(data.data_ptr(), code, extent(data), factor.data_ptr(), *queue(data))
