"""The CUDA implementation of the step. What lies on the device is read there."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue
from pyloss.ops.lion_k.call import Arranged, Lists, problem
from pyloss.ops.lion_k.records import Options


def step(
    params, grads, momenta, given, compensation, lr, found_inf, step, codes, numbers, positions
) -> None:
    if not params:
        return
    options = Options(*codes[:2], bool(codes[2]), *numbers, *codes[3:])
    scalars = [_scalar(t, params[0]) for t in (lr, found_inf, step)]
    with (
        torch.cuda.device_of(params[0]),
        Arranged(Lists(params, grads, momenta, given, compensation)) as lists,
    ):
        _C.cuda_lion_k_step(
            problem(lists, options, positions), *map(address, scalars), *queue(params[0])
        )


def _scalar(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.device, torch.float32, non_blocking=True)
