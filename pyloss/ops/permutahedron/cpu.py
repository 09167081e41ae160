"""The CPU implementations of the ops of permutahedron: allocate the results, call the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address
from pyloss.ops.permutahedron.records import problem


def forward(x: Tensor, rank: bool, kl: bool, strength: float) -> tuple[Tensor, Tensor]:
    y, packed = x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.int32)
    x = x.contiguous()
    _C.permutahedron_fwd(
        problem(x, rank, kl, strength), address(x), address(y), address(packed),
        torch.get_num_threads(),
    )  # fmt: skip
    return y, packed


def backward(
    g: Tensor, x: Tensor | None, packed: Tensor, rank: bool, kl: bool, strength: float
) -> Tensor:
    g, packed = g.contiguous(), packed.contiguous()
    x = None if x is None else x.contiguous()
    dx = torch.empty_like(g)
    _C.permutahedron_bwd(
        problem(g, rank, kl, strength), address(g), address(x), address(packed), address(dx),
        torch.get_num_threads(),
    )  # fmt: skip
    return dx
