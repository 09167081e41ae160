"""The CUDA implementations of the ops of betti_matching: allocate the results, call the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue, scratch
from pyloss.ops.betti_matching import cpu, records
from pyloss.ops.betti_matching.records import TERMS, Options, pair


def loss(input: Tensor, target: Tensor, options: list[float]) -> tuple[Tensor, Tensor]:
    if input.dim() == 5:  # volumes have no kernel
        return cpu.elsewhere(cpu.loss)(input, target, options)
    o = Options(*options)
    x, y = pair(input, target)
    problem = records.problem(x, y, 2, bool(o.superlevel), int(o.dims))
    found = x.new_empty((*x.shape[:2], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    if problem.items:
        with torch.cuda.device_of(x):
            size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
            buffer, start = scratch(x, size, 256)
            _C.cuda_betti_loss(
                problem, records.loss(o), found.data_ptr(), address(grad), start, size, *queue(x)
            )
    return found, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


# Tables have a size that the host must learn anyway, and their cells come from the CPU.
matching = cpu.elsewhere(cpu.matching)
pairs = cpu.elsewhere(cpu.pairs)
