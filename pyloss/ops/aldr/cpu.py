"""The CPU implementations of the ops of aldr: allocate the results, call the kernels."""

from __future__ import annotations

import torch

from pyloss import _C
from pyloss.ops._launch import address
from pyloss.ops.aldr.records import problem, stats_of


def forward(x, target, factor, start, lam0, alpha, margin, ignore_index, l1):
    stats = stats_of(x)
    record, alive = problem(x, target, start, (lam0, alpha, margin), ignore_index, l1)
    grad = None if factor is None else x.new_empty(x.shape)
    factor = None if factor is None else factor.contiguous()
    _C.aldr_fwd(record, address(stats), address(factor), address(grad), torch.get_num_threads())
    del alive
    return [stats] if grad is None else [stats, grad]


def backward(x, target, stats, factor, lam0, alpha, margin, ignore_index, l1):
    grad, stats, factor = x.new_empty(x.shape), stats.contiguous(), factor.contiguous()
    record, alive = problem(x, target, None, (lam0, alpha, margin), ignore_index, l1)
    _C.aldr_bwd(record, address(stats), address(factor), address(grad), torch.get_num_threads())
    del alive
    return grad
