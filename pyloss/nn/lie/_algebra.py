"""Orthonormal coordinates of the matrices whose exponentials make a group.

Made of positions and sums alone: no table of matrices has to come from the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Algebra(NamedTuple):
    """Symmetric matrices, of trace 0 or not, or none, and skew ones. Coordinates are inner products
    tr(B^T X) with the diagonal matrices, then (E_ij + E_ji) / sqrt 2, then (E_ji - E_ij) / sqrt 2,
    i < j: of trace 0 the k-th diagonal one is (1, ..., 1, -k) / sqrt(k (k + 1))."""

    n: int
    symmetric: bool = True
    traceless: bool = False

    @property
    def diagonals(self) -> int:
        return self.n - self.traceless if self.symmetric else 0

    @property
    def pairs(self) -> int:
        return self.n * (self.n - 1) // 2

    @property
    def symmetric_dim(self) -> int:
        return self.diagonals + self.pairs if self.symmetric else 0

    @property
    def dim(self) -> int:
        return self.symmetric_dim + self.pairs

    def matrices(self, coords: Tensor) -> tuple[Tensor, Tensor]:
        """The symmetric and the skew matrix with coordinates (..., dim)."""
        rest = [self.diagonals, self.symmetric_dim - self.diagonals, self.pairs]
        on, off, turn = coords.split(rest, -1)
        half = self._upper(turn)
        skew = half.mT - half
        if not self.symmetric:
            return torch.zeros_like(skew), skew
        half = self._upper(off)
        return torch.diag_embed(self._diagonal(on)) + half + half.mT, skew

    def coordinates(self, symmetric: Tensor, skew: Tensor) -> Tensor:
        """The inverse."""
        i, j = self._places(skew)
        turn = math.sqrt(2) * skew[..., j, i]
        if not self.symmetric:
            return turn
        on = torch.diagonal(symmetric, dim1=-2, dim2=-1)
        if self.traceless:
            k, length = self._steps(on)
            on = (on.cumsum(-1)[..., :-1] - k * on[..., 1:]) / length
        return torch.cat([on, math.sqrt(2) * symmetric[..., i, j], turn], -1)

    def _upper(self, entries: Tensor) -> Tensor:
        i, j = self._places(entries)
        flat = entries.new_zeros(*entries.shape[:-1], self.n * self.n)
        flat = flat.index_copy(-1, i * self.n + j, math.sqrt(0.5) * entries)
        return flat.unflatten(-1, (self.n, self.n))

    def _diagonal(self, on: Tensor) -> Tensor:
        if not self.traceless:
            return on
        k, length = self._steps(on)
        s = on / length
        return F.pad(s.flip(-1).cumsum(-1).flip(-1), (0, 1)) - F.pad(k * s, (1, 0))

    def _places(self, like: Tensor) -> Tensor:
        return torch.triu_indices(self.n, self.n, 1, device=like.device)

    def _steps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.arange(1, self.n, dtype=like.dtype, device=like.device)
        return k, (k * (k + 1)).sqrt()
