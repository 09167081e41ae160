"""The ops of permutahedron on the reference, and their gradient in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._reference import gradients

# The flags of csrc/common/permutahedron.h.
_START = -(2**31)
_FIXED = 2**30
_ELEMENT = _FIXED - 1  # mask; as an element: the row holds a NaN


def _reference():
    """The reference, imported with its first use."""
    from pyloss.reference import permutahedron

    return permutahedron


def packed_blocks(blocks) -> Tensor:
    element = torch.where(blocks.nan, _ELEMENT, blocks.order)
    starts = blocks.starts | blocks.nan
    fixed = blocks.fixed & ~blocks.nan
    return (element + fixed * _FIXED + starts * _START).to(torch.int32)


def _blocks(packed: Tensor):
    element = packed & _ELEMENT
    nan = element[:, :1] == _ELEMENT
    order = torch.where(nan, torch.arange(packed.shape[1], device=packed.device), element.long())
    return _reference().Blocks(order, packed < 0, (packed & _FIXED) != 0, nan)


def forward(
    x: Tensor, rank: bool, kl: bool, strength: float, centred: bool = False
) -> tuple[Tensor, Tensor]:
    options = dict(rank=rank, kl=kl, strength=strength)
    blocks = _reference().find_blocks(x, **options)
    y = _reference().from_blocks(x, blocks, **options, centred=centred)
    return y.contiguous(), packed_blocks(blocks)


def backward(
    g: Tensor, x: Tensor | None, packed: Tensor, rank: bool, kl: bool, strength: float
) -> Tensor:
    return composed_gradient(g, x, packed, rank, kl, strength).detach().contiguous()


def composed(
    x: Tensor, packed: Tensor, rank: bool, kl: bool, strength: float, centred: bool = False
) -> Tensor:
    """y in torch operations, of given blocks."""
    options = dict(rank=rank, kl=kl, strength=strength, centred=centred)
    return _reference().from_blocks(x, _blocks(packed), **options)


def composed_gradient(
    g: Tensor, x: Tensor | None, packed: Tensor, rank: bool, kl: bool, strength: float
) -> Tensor:
    """The gradient in torch operations, with gradients of its own to g and, with kl, x."""
    # Given the blocks, l2 is linear: any point has the same gradient.
    at = torch.zeros(packed.shape, dtype=g.dtype, device=g.device) if x is None else x
    (dx,) = gradients(
        lambda x: composed(x, packed, rank, kl, strength), [at], [g], create_graph=True
    )
    return dx
