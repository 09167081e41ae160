"""The monomials of a tile on the device, and the tables that say which they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .._launch import refuse_capture


@triton.jit
def column_of(index_ptr, f, rank, d, T: tl.constexpr, DEGREE: tl.constexpr):
    """Factor T of the features f; d, the factor 1, beyond the last one."""
    return tl.load(index_ptr + f * DEGREE + T, mask=f < rank, other=d)


@triton.jit
def factor(row_ptrs, kept, column, d):
    at = row_ptrs[:, None] + column[None, :]
    return tl.load(at, mask=kept[:, None] & (column < d)[None, :], other=1.0)


@triton.jit
def features(row_ptrs, kept, index_ptr, f, rank, d, DEGREE: tl.constexpr):
    """A tile [tokens, features]; 0 for tokens that are not kept, which are never read."""
    u = tl.where(kept[:, None] & (f < rank)[None, :], 1.0, 0.0)
    for t in tl.static_range(DEGREE):
        u *= factor(row_ptrs, kept, column_of(index_ptr, f, rank, d, t, DEGREE), d)
    return u


@triton.jit
def dot_with_exact(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b for numbers b that tf32 holds as they are: two products do what tf32x3 does."""
    if PRECISION == "tf32x3":
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(a - high, b, acc, input_precision="tf32")
        return tl.dot(high, b, acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@functools.cache  # never dropped: a CUDA graph reads the tables by address
def monomials(d: int, degree: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices [r, degree], d for no factor; |a|! / prod a_l! [r]) of the monomials by degree."""
    refuse_capture(device, f"low-rank attention of degree {degree} and head dimension {d}")
    level: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    rows, counts = [(d,) * degree], [1.0]
    for t in range(1, degree + 1):
        following = []
        for index, count in level:
            for v in range(index[-1] if index else 0, d):
                exponent = index.count(v) + 1
                following.append(((*index, v), count * t / exponent))
        level = following
        rows += [(*(d,) * (degree - t), *index) for index, _ in level]
        counts += [count for _, count in level]
    indices = torch.tensor(rows, dtype=torch.int32, device=device).reshape(len(rows), degree)
    return indices, torch.tensor(counts, dtype=torch.float32, device=device)


def feature_weights(coefficients: Sequence[float], d: int, device: torch.device) -> torch.Tensor:
    """w_a without a copy from the host: the coefficients come in as numbers of small kernels."""
    degree = len(coefficients) - 1
    counts = monomials(d, degree, device)[1]
    sizes = [math.comb(d + t - 1, t) for t in range(degree + 1)]
    return torch.cat([part * c for part, c in zip(counts.split(sizes), coefficients)])


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
