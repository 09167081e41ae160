"""Low-rank tensor attention of entries of very different sizes.

Features are powers of entries. Where q is 1e8 and a key 1e-16, the scores are of order 1, but the
third power of that key is 0 in float32 and takes a term of the polynomial with it. So each feature
of a key is divided by its largest entry, a power of two, and q multiplied by it: the same scores,
bit for bit, of keys up to 1. The largest |q_l| is then what the feature adds to the bound of the
scores, so that neither q nor the powers of anything leave the range of the dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype


def even(q: Tensor, keys, largest, scale: float) -> tuple[Tensor, list[Tensor]]:
    """(q, keys) for a scale of 1; `largest` has the entries of each key, (B, G, d)."""
    acc, heads = accumulator_dtype(q.dtype), q.shape[1]
    group = heads // max(keys[0].shape[1], 1)
    exponents = [_exponents(most) for most in largest]
    total = sum(exponents)
    q = q.double() * scale
    # Where all keys are 0, none of them tells how large q may stay: a part of its size is theirs.
    most = q.detach().abs().amax(2) if q.shape[2] else q.new_zeros((*q.shape[:2], q.shape[3]))
    most = most.unflatten(1, (-1, group)).amax(2) if group else most
    left = (_exponents(most) + total).clamp_min(0.0)
    for at, entries in enumerate(largest):
        taken = torch.where(entries == 0, left, 0.0)
        exponents[at], total, left = exponents[at] - taken, total - taken, left - taken
    evened = [_times_power(k, -e.unsqueeze(2)).to(acc) for k, e in zip(keys, exponents)]
    return _times_power(q, total.repeat_interleave(group, 1).unsqueeze(2)).to(acc), evened


def _exponents(most: Tensor) -> Tensor:
    """e with 2^(e - 1) <= most < 2^e; 0 for 0, infinity and NaN."""
    most = torch.where(torch.isfinite(most), most, 0.0).double()
    return torch.frexp(most).exponent.double()


def _times_power(t: Tensor, exponents: Tensor) -> Tensor:
    """t 2^exponents in float64; in two halves, as 2^1074 is no number."""
    half = torch.floor(exponents / 2)
    return t.double() * torch.exp2(half) * torch.exp2(exponents - half)
