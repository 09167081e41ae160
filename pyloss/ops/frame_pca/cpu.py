"""The CPU implementations of the ops of frame_pca."""

from __future__ import annotations

from functools import partial

import torch

from pyloss import _C
from pyloss.ops.frame_pca import calls


def _forward(x, problem, frames):
    _C.frame_pca_fwd(problem, frames, torch.get_num_threads())


def _backward(x, problem, backward):
    _C.frame_pca_bwd(problem, backward, torch.get_num_threads())


forward = partial(calls.forward, _forward)
backward = partial(calls.backward, _backward)
