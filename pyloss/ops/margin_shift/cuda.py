"""The CUDA implementations of the ops of margin_shift."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import queue
from pyloss.ops.margin_shift import calls


def _launch_on(x: Tensor):
    def launch(kernel, *records):
        run = _C.cuda_margin_shift_fwd if kernel == "fwd" else _C.cuda_margin_shift_bwd
        with torch.cuda.device_of(x):
            run(*records, *queue(x))

    return launch


def forward(x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return calls.forward(_launch_on(x), x, *rest)


def backward(g: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return calls.backward(_launch_on(g), g, *rest)
