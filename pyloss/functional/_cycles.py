"""Cycles that stand for bars: components just before they die, borders of holes."""

from __future__ import annotations

import torch
from torch import Tensor


def representatives(image: Tensor, dim: int, bars: list[list[int]]) -> list[Tensor]:
    """Voxels (n, D) of each bar (birth cell, death cell), the voxel of death last.

    Args:
        image: filtration values ``(n)`` or ``(rows, cols)``; cells as in the reference.
    """
    shape = tuple(image.shape)
    rows, cols = shape if len(shape) == 2 else (shape[0], 1)
    f = image.flatten().tolist()
    find = _component if dim == 0 else _hole
    found = []
    for birth, death in bars:
        voxels = find(f, rows, cols, birth, death)
        at = torch.tensor(voxels, dtype=torch.int64)
        place = torch.stack([at // cols, at % cols], 1) if len(shape) == 2 else at[:, None]
        found.append(place)
    return found


def _ends(e: int, cols: int) -> tuple[int, int]:
    return e >> 1, (e >> 1) + (1 if e & 1 else cols)


def _edge_order(f, e: int, cols: int) -> tuple[float, int]:
    p, q = _ends(e, cols)
    return max(f[p], f[q]), e


def _component(f, rows, cols, birth, death):
    """What edges before `death` connect with the vertex `birth`; then the voxel of death."""
    limit = _edge_order(f, death, cols)
    seen, stack = {birth}, [birth]
    while stack:
        p = stack.pop()
        row, col = divmod(p, cols)
        for exists, q, e in (
            (row > 0, p - cols, 2 * (p - cols)),
            (row + 1 < rows, p + cols, 2 * p),
            (col > 0, p - 1, 2 * (p - 1) + 1),
            (col + 1 < cols, p + 1, 2 * p + 1),
        ):
            if exists and q not in seen and _edge_order(f, e, cols) < limit:
                seen.add(q)
                stack.append(q)
    p, q = _ends(death, cols)
    last = p if f[p] > f[q] else q
    return [*sorted(seen - {last}), last]


def _hole(f, rows, cols, birth, death):
    """The voxels around the squares that edges after `birth` connect with the square `death`."""
    limit = _edge_order(f, birth, cols)
    seen, stack = {death}, [death]
    while stack:
        s = stack.pop()
        row, col = divmod(s, cols)
        for exists, t, e in (
            (row > 0, s - cols, 2 * s + 1),
            (row + 2 < rows, s + cols, 2 * (s + cols) + 1),
            (col > 0, s - 1, 2 * s),
            (col + 2 < cols, s + 1, 2 * (s + 1)),
        ):
            if exists and t not in seen and _edge_order(f, e, cols) > limit:
                seen.add(t)
                stack.append(t)
    touched: dict[int, int] = {}
    for s in seen:
        for p in (s, s + 1, s + cols, s + cols + 1):
            touched[p] = touched.get(p, 0) + 1
    corners = (death, death + 1, death + cols, death + cols + 1)
    last = max(corners, key=lambda p: (f[p], p))
    return [*sorted(p for p, n in touched.items() if n < 4 and p != last), last]
