"""Cycles that stand for bars: components just before they die, loops, borders of holes."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyloss.functional._images import unravelled
from pyloss.ops import betti_matching as op


def representatives(image: Tensor, dim: int, bars: list[list[int]]) -> list[Tensor]:
    """Voxels (n, D) of each bar (birth cell, death cell), the voxel of death last.

    Args:
        image: filtration values, of 1 to 3 dimensions; cells as in the reference.
    """
    grid = _Grid(image)
    if dim == 0:
        found = [grid.component(*bar) for bar in bars]
    elif dim == image.dim() - 1:
        found = [grid.hole(*bar) for bar in bars]
    else:
        loops = op.loops(image, [death for _, death in bars])
        found = [grid.loop(edges, death) for edges, (_, death) in zip(loops, bars)]
    return [unravelled(torch.tensor(voxels, dtype=torch.int64), grid.shape) for voxels in found]


class _Grid:
    """Values of an image, and its cells by their numbers."""

    def __init__(self, image: Tensor) -> None:
        self.shape = tuple(image.shape)
        self.f = image.flatten().tolist()
        self.dims = len(self.shape)
        self.strides = [math.prod(self.shape[axis + 1 :]) for axis in range(self.dims)]
        self.kinds = max(2, self.dims)  # edges, squares in 3D: so many numbers for a voxel

    def span(self, corner: int, axes) -> list[int]:
        """The voxels of the cell at `corner` along `axes`, ascending."""
        steps = ((0, self.strides[axis]) for axis in axes)
        return [corner + sum(step) for step in itertools.product(*steps)]

    def across(self, axis: int) -> list[int]:
        return [a for a in range(self.dims) if a != axis]

    def carrier(self, voxels: list[int]) -> int:
        """The voxel that carries a cell's value: of equals the last, in a cube of 3D the first."""
        sign = -1 if len(voxels) == 8 else 1
        return max(voxels, key=lambda p: (self.f[p], sign * p))

    def edge(self, corner: int, axis: int) -> tuple[float, int]:
        """Its place in the order of edges."""
        p, q = self.span(corner, [axis])
        return max(self.f[p], self.f[q]), self.kinds * corner + axis

    def facet(self, corner: int, axis: int) -> tuple[float, int]:
        """Its place in the order of the cells that part two top cells, normal to `axis`."""
        number = self.kinds * corner + (axis if self.dims == 3 else 1 - axis)
        return max(self.f[p] for p in self.span(corner, self.across(axis))), number

    def component(self, birth: int, death: int) -> list[int]:
        """What edges before `death` connect with the vertex `birth`; then the voxel of death."""
        corner, axis = divmod(death, self.kinds)
        limit = self.edge(corner, axis)
        seen = self._flood(birth, self.shape, lambda low, a: self.edge(low, a) < limit)
        last = self.carrier(self.span(corner, [axis]))
        return [*sorted(seen - {last}), last]

    def hole(self, birth: int, death: int) -> list[int]:
        """The voxels around the top cells that facets after `birth` connect with `death`."""
        corner, kind = divmod(birth, self.kinds)
        limit = self.facet(corner, kind if self.dims == 3 else 1 - kind)
        shape = [size - 1 for size in self.shape]  # of the top cells
        seen = self._flood(
            death, shape, lambda low, a: self.facet(low + self.strides[a], a) > limit
        )
        touched: dict[int, int] = {}
        for cell in seen:
            for p in self.span(cell, range(self.dims)):
                touched[p] = touched.get(p, 0) + 1
        last = self.carrier(self.span(death, range(self.dims)))
        border = (p for p, count in touched.items() if count < 2**self.dims and p != last)
        return [*sorted(border), last]

    def loop(self, edges: list[int], death: int) -> list[int]:
        """The ends of edges; then the voxel of the square `death`."""
        ends = {p for e in edges for p in self.span(e // 3, [e % 3])}
        last = self.carrier(self.span(death // 3, self.across(death % 3)))
        return [*sorted(ends - {last}), last]

    def _flood(self, start: int, shape, passes) -> set[int]:
        """What is reached from `start` by steps along the axes, where ``passes(lower, axis)``;
        `shape` bounds the places, which are numbered as voxels are."""
        seen, stack = {start}, [start]
        while stack:
            p = stack.pop()
            for axis, (stride, size, whole) in enumerate(zip(self.strides, shape, self.shape)):
                at = p // stride % whole
                for q, low, exists in (
                    (p - stride, p - stride, at > 0),
                    (p + stride, p, at + 1 < size),
                ):
                    if exists and q not in seen and passes(low, axis):
                        seen.add(q)
                        stack.append(q)
        return seen
