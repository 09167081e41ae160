"""The CUDA implementations of the ops of permutahedron: sort, allocate, call the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue
from pyloss.ops.permutahedron.records import problem


def forward(
    x: Tensor, rank: bool, kl: bool, strength: float, centred: bool = False
) -> tuple[Tensor, Tensor]:
    y, packed = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)
    if x.numel() == 0:
        return y, packed
    values, order = x.sort(dim=1, descending=rank, stable=True)
    values, order = values.contiguous(), order.contiguous()
    p = problem(x, rank, kl, strength, centred)
    with torch.cuda.device_of(x):
        size = _C.cuda_permutahedron_scratch_bytes(p, x.get_device())
        buffer = x.new_empty((size,), dtype=torch.uint8)
        _C.cuda_permutahedron_fwd(
            p, address(values), address(order), address(y), address(packed), address(buffer), size,
            *queue(x),
        )  # fmt: skip
    return y, packed


def backward(
    g: Tensor, x: Tensor | None, packed: Tensor, rank: bool, kl: bool, strength: float
) -> Tensor:
    g, packed = g.contiguous(), packed.contiguous()
    x = None if x is None else x.contiguous()
    dx = torch.empty_like(g)
    with torch.cuda.device_of(g):
        _C.cuda_permutahedron_bwd(
            problem(g, rank, kl, strength), address(g), address(x), address(packed), address(dx),
            *queue(g),
        )  # fmt: skip
    return dx
