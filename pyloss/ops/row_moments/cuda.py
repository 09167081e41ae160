"""The CUDA implementations of the ops of row_moments."""

from __future__ import annotations

from functools import partial

import torch

from pyloss import _C
from pyloss.ops._launch import queue
from pyloss.ops.row_moments import calls


def _forward(input, problem, moments):
    with torch.cuda.device_of(input):
        _C.cuda_row_moments_fwd(problem, moments, *queue(input))


def _backward(input, problem, backward):
    with torch.cuda.device_of(input):
        _C.cuda_row_moments_bwd(problem, backward, *queue(input))


forward = partial(calls.forward, _forward)
backward = partial(calls.backward, _backward)
