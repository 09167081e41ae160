"""What crosses to csrc/bind/permutahedron.cpp."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyloss.ops._launch import DTYPE_CODES


class Problem(NamedTuple):
    rows: int
    n: int
    dtype: int
    rank: bool  # else sort
    kl: bool  # else l2
    strength: float


RECORDS = (Problem,)


def problem(x: Tensor, rank: bool, kl: bool, strength: float) -> Problem:
    return Problem(*x.shape, DTYPE_CODES[x.dtype], rank, kl, strength)
