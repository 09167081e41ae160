"""The CPU implementation of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops.lion_k.call import Arranged, Lists, problem
from pyloss.ops.lion_k.records import Options


def step(
    params, grads, momenta, given, compensation, lr, found_inf, step, codes, numbers, positions
) -> None:
    options = Options(*codes[:2], bool(codes[2]), *numbers, *codes[3:])
    if not params or (found_inf is not None and _number(found_inf)):
        return
    if lr is not None:
        options = options._replace(lr=_number(lr))
    if step is not None:
        options = options._replace(step=int(_number(step)))
    with Arranged(Lists(params, grads, momenta, given, compensation)) as lists:
        _C.lion_k_step(problem(lists, options, positions), torch.get_num_threads())


def _number(t: Tensor) -> float:
    return float(t)
