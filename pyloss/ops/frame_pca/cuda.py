"""The CUDA implementations of the ops of frame_pca."""

from __future__ import annotations

from functools import partial

import torch

from pyloss import _C
from pyloss.ops._launch import queue
from pyloss.ops.frame_pca import calls


def _forward(x, problem, frames):
    with torch.cuda.device_of(x):
        _C.cuda_frame_pca_fwd(problem, frames, *queue(x))


def _backward(x, problem, backward):
    with torch.cuda.device_of(x):
        _C.cuda_frame_pca_bwd(problem, backward, *queue(x))


forward = partial(calls.forward, _forward)
backward = partial(calls.backward, _backward)
