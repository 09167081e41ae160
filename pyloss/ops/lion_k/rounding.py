"""Rounding of float32 to half types, in torch operations; the same bits as csrc/common/lion_k.h.

Stochastic rounding goes up with the probability that keeps the mean. Its random bits are a function
of (seed, step, tensor, element).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(h):
    """Of an int or of an int64 tensor, both holding 32 bits."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _MASK
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def tensor_key(seed: int, step: int | Tensor, position: int):
    h = _mix((seed + 0x9E3779B9) & _MASK)
    h = _mix(h ^ ((seed >> 32) & _MASK))
    h = _mix((h + position) & _MASK)
    return _mix((h + step) & _MASK)


def random_bits(n: int, key, device: torch.device) -> Tensor:
    """(n,) int64, each 32 random bits."""
    element = torch.arange(n, device=device)
    if n > _MASK:
        key = torch.where(element > _MASK, _mix((key + (element >> 32)) & _MASK), key)
    return _mix((((element & _MASK) * 0x9E3779B9) & _MASK) ^ key)


def round_stochastic(x: Tensor, dtype: torch.dtype, key) -> Tensor:
    """float32 `x` as bfloat16 or float16."""
    random = random_bits(x.numel(), key, x.device).view(x.shape)
    bits = x.view(torch.int32).long() & _MASK
    sign, size = bits & 0x80000000, bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        rounded = (size + (random & 0xFFFF)) >> 16
    else:
        normal = (size + (random & 0x1FFF) - (112 << 23)) >> 13
        scaled = x.abs() * 2.0**24 + (random & 0x1FFF).float() * 2.0**-13
        tiny = scaled.nan_to_num(0.0).clamp(max=2048.0).long()
        rounded = torch.where(size < (113 << 23), tiny, normal).clamp(max=0x7C00)
    found = (rounded | (sign >> 16)).to(torch.int16).view(dtype)
    beyond = size >= (0x7F800000 if dtype == torch.bfloat16 else 0x47800000)
    return torch.where(beyond, x.to(dtype), found)


def round_compensated(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(`x` rounded to nearest, what was rounded away), both of `dtype`."""
    kept = x.to(dtype)
    lost = x - kept.float()
    return kept, lost.nan_to_num(0.0, 0.0, 0.0).to(dtype)
