"""The CPU implementations of the ops of row_softmax."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import DTYPE_CODES
from pyloss.ops.row_softmax import calls


def _forward(input, problem, forward):
    _C.row_softmax_fwd(problem, forward, torch.get_num_threads())


def _backward(input, problem, backward):
    _C.row_softmax_bwd(problem, backward, torch.get_num_threads())


def _hvp(input, problem, backward, hvp):
    _C.row_softmax_hvp(problem, backward, hvp, torch.get_num_threads())


run_forward = partial(calls.run_forward, _forward)
run_backward = partial(calls.run_backward, _backward)
forward = partial(calls.forward, _forward)
backward = partial(calls.backward, _backward)
backward_ = partial(calls.backward_, _backward)
hvp = partial(calls.hvp, _hvp)


def scale_(data: Tensor, factor: Tensor) -> None:
    # Only ever the gradient that the forward has just allocated: dense, in some order.
    code, threads = DTYPE_CODES[data.dtype], torch.get_num_threads()
    _C.scale_inplace(data.data_ptr(), code, data.numel(), factor.data_ptr(), threads)
