"""The CPU implementations of the ops of row_moments."""

from __future__ import annotations

from functools import partial

import torch

from pyloss import _C
from pyloss.ops.row_moments import calls


def _forward(input, problem, moments):
    _C.row_moments_fwd(problem, moments, torch.get_num_threads())


def _backward(input, problem, backward):
    _C.row_moments_bwd(problem, backward, torch.get_num_threads())


forward = partial(calls.forward, _forward)
backward = partial(calls.backward, _backward)
