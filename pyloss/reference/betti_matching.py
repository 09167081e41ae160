"""Betti matching by its definition: boundary matrices over Z/2, reduced column by column.

Cubical complex of an image of 1 to 3 dimensions: a vertex per voxel, a k-cell per unit cube spanned
by 2^k voxels, the value of a cell the largest of its voxels (sublevel; superlevel negates). Cells
of one dimension are ordered by (value, corner, type), which makes every result unique. With
``P(R, C)`` the pairs (lowest row, column) after reducing the boundary matrix whose rows are in
order R and whose columns are in order C:

    bars of I            P(I, I) without pairs of equal values
    image persistence    P(I, M), M = min(I, T)
    matching             a bar (b, c) of M matches the bars of I and T that are born at the partners
                         of c in P(I, M) and P(T, M), where both are bars

Time and memory grow with the cube of the number of cells: for images of some hundred voxels.
Papers: arXiv 2211.15272, 2407.04683.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

# The last axis of the loss, as in csrc/common/betti_matching.h.
TERMS = ("matched", "unmatched_input", "unmatched_target")


class Cell(NamedTuple):
    """A cell by its place in the total order of equal values."""

    corner: tuple[int, ...]
    type: int
    axes: tuple[int, ...]


class Bar(NamedTuple):
    """Cells that give birth and death; with `essential`, no cell gives death."""

    birth: Cell
    death: Cell | None


class Matching(NamedTuple):
    """Per dimension. `matched` holds the bars of input, target and comparison image."""

    matched: list[list[tuple[Bar, Bar, Bar]]]
    unmatched_input: list[list[Bar]]
    unmatched_target: list[list[Bar]]


# --------------------------------------------------------------------------------------------------
# The complex


@functools.lru_cache(maxsize=64)
def cells(shape: tuple[int, ...], k: int) -> tuple[Cell, ...]:
    """The k-cells, in the order of equal values."""
    dims = len(shape)
    found = []
    for corner in itertools.product(*map(range, shape)):
        for axes in itertools.combinations(range(dims), k):
            if any(corner[a] + 1 >= shape[a] for a in axes):
                continue
            kind = 0
            if k == 1 and dims > 1:
                kind = axes[0]
            elif k == 2 and dims == 3:  # the axis that it is normal to
                kind = next(a for a in range(dims) if a not in axes)
            found.append(Cell(corner, kind, axes))
    return tuple(sorted(found))


def voxels(cell: Cell) -> list[tuple[int, ...]]:
    """The voxels that span a cell, ascending."""
    steps = [(0, 1) if a in cell.axes else (0,) for a in range(len(cell.corner))]
    return [tuple(c + s for c, s in zip(cell.corner, step)) for step in itertools.product(*steps)]


def _faces(cell: Cell) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(corner, axes) of the cells in the boundary."""
    found = []
    for axis in cell.axes:
        rest = tuple(a for a in cell.axes if a != axis)
        for step in (0, 1):
            corner = tuple(c + step * (a == axis) for a, c in enumerate(cell.corner))
            found.append((corner, rest))
    return found


@functools.lru_cache(maxsize=64)
def _boundary(shape: tuple[int, ...], k: int) -> tuple[tuple[Cell, ...], ...]:
    """The boundary of each k-cell."""
    by_place = {(c.corner, c.axes): c for c in cells(shape, k - 1)}
    return tuple(tuple(by_place[f] for f in _faces(cell)) for cell in cells(shape, k))


class Filtration:
    """An image, as values of cells and orders of cells."""

    def __init__(self, values: Tensor) -> None:
        self.shape = tuple(values.shape)
        self._orders: dict[int, list[int]] = {}
        places = itertools.product(*map(range, self.shape))
        self.voxel = dict(zip(places, values.double().flatten().tolist()))

    def value(self, cell: Cell) -> float:
        return max(self.voxel[v] for v in voxels(cell))

    def order(self, k: int) -> list[int]:
        """Indices into cells(shape, k), ascending."""
        if k not in self._orders:
            found = [(self.value(c), i) for i, c in enumerate(cells(self.shape, k))]
            self._orders[k] = [i for _, i in sorted(found)]
        return self._orders[k]

    def birth_voxel(self, cell: Cell) -> tuple[int, ...]:
        """The voxel that carries the value: the last of equals, in a 3-cube the first."""
        value = self.value(cell)
        carriers = [v for v in voxels(cell) if self.voxel[v] == value]
        return carriers[0] if len(cell.axes) == 3 else carriers[-1]


def reduced_columns(
    rows: Filtration, columns: Filtration, dim: int
) -> dict[Cell, tuple[Cell, ...]]:
    """The reduced boundaries of the (dim + 1)-cells that are not 0: column -> rows, lowest first.

    Which pairs they have is P(R, C) whatever the algorithm; the rest of a column is not unique.
    """
    shape = rows.shape
    if dim + 1 > len(shape):
        return {}
    row_cells, column_cells = cells(shape, dim), cells(shape, dim + 1)
    by_rank = rows.order(dim)
    row_rank = {row_cells[i]: rank for rank, i in enumerate(by_rank)}
    boundary = _boundary(shape, dim + 1)
    reduced: dict[int, set[int]] = {}  # lowest row -> reduced column
    found = {}
    for j in columns.order(dim + 1):
        column = {row_rank[face] for face in boundary[j]}
        while column and max(column) in reduced:
            column ^= reduced[max(column)]
        if column:
            reduced[max(column)] = column
            lowest_first = sorted(column, reverse=True)
            found[column_cells[j]] = tuple(row_cells[by_rank[r]] for r in lowest_first)
    return found


def reduce(rows: Filtration, columns: Filtration, dim: int) -> dict[Cell, Cell]:
    """P(R, C) of the (dim + 1)-cells: column -> row."""
    return {column: found[0] for column, found in reduced_columns(rows, columns, dim).items()}


# --------------------------------------------------------------------------------------------------
# Bars and matching


def bars(f: Filtration, dim: int) -> list[Bar]:
    """Bars of positive length."""
    pairs = reduce(f, f, dim)
    return [Bar(row, col) for col, row in pairs.items() if f.value(row) != f.value(col)]


def oldest(f: Filtration) -> Bar:
    """The essential class of dimension 0."""
    return Bar(cells(f.shape, 0)[f.order(0)[0]], None)


def match(f_input: Filtration, f_target: Filtration, dims: list[int]) -> Matching:
    """The Betti matching of two images in the given dimensions; empty lists in the others."""
    comparison = Filtration(torch.zeros(f_input.shape))
    comparison.voxel = {v: min(x, f_target.voxel[v]) for v, x in f_input.voxel.items()}
    count = len(f_input.shape)
    result = Matching(
        [[] for _ in range(count)], [[] for _ in range(count)], [[] for _ in range(count)]
    )
    for dim in dims:
        of_input = {bar.birth: bar for bar in bars(f_input, dim)}
        of_target = {bar.birth: bar for bar in bars(f_target, dim)}
        image_input = reduce(f_input, comparison, dim)
        image_target = reduce(f_target, comparison, dim)
        for bar in bars(comparison, dim):
            a, b = image_input[bar.death], image_target[bar.death]
            if a in of_input and b in of_target:
                result.matched[dim].append((of_input.pop(a), of_target.pop(b), bar))
        result.unmatched_input[dim].extend(of_input.values())
        result.unmatched_target[dim].extend(of_target.values())
    return result


def filtration(image: Tensor, superlevel: bool) -> Filtration:
    return Filtration(-image if superlevel else image)


# --------------------------------------------------------------------------------------------------
# Rows of indices


def cell_id(shape: tuple[int, ...], cell: Cell | None) -> int:
    """Number of a cell, with v the flat index of its corner; -1 for none.

    Vertices and top cells v; edges ``2 v + axis`` in 1D and 2D, ``3 v + axis`` in 3D; squares of 3D
    ``3 v +`` the axis that they are normal to. In 1D an edge is the top cell too, and ``2 v``.
    """
    if cell is None:
        return -1
    corner = flat_index(shape, cell.corner)
    if not cell.axes or len(cell.axes) == len(shape) > 1:
        return corner
    return max(2, len(shape)) * corner + cell.type


def flat_index(shape: tuple[int, ...], voxel: tuple[int, ...]) -> int:
    index = 0
    for size, x in zip(shape, voxel):
        index = index * size + x
    return index


def _voxel_row(f: Filtration, bar: Bar) -> list[int]:
    return [-1 if cell is None else flat_index(f.shape, f.birth_voxel(cell)) for cell in bar]


def _cell_row(f: Filtration, bar: Bar) -> list[int]:
    return [cell_id(f.shape, cell) for cell in bar]


def _table(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, width)


def persistence_pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    """Rows (item, dim, birth voxel, death voxel, birth cell, death cell), sorted.

    Args:
        input: ``(N, *spatial)``.
    """
    rows = []
    for item, image in enumerate(input):
        f = filtration(image, superlevel)
        for dim in dims:
            found = bars(f, dim) + ([oldest(f)] if essential and dim == 0 else [])
            rows += [[item, dim, *_voxel_row(f, b), *_cell_row(f, b)] for b in found]
    return _table(rows, 6)


def betti_matching(
    input: Tensor, target: Tensor, superlevel: bool, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the matched and the unmatched bars, sorted; voxels, then cells.

    Args:
        input, target: ``(N, *spatial)``.

    Returns:
        matched ``(M, 12)``: item, dim, birth and death voxel of the input, of the target, birth and
        death cell of the input, of the target, of the comparison image. Unmatched of the input and
        of the target ``(U, 6)``: as from :func:`persistence_pairs`.
    """
    matched, left_input, left_target = [], [], []
    for item, images in enumerate(zip(input, target)):
        f, g = (filtration(image, superlevel) for image in images)
        found = match(f, g, dims)
        for dim in dims:
            for a, b, c in found.matched[dim]:
                voxel = [*_voxel_row(f, a), *_voxel_row(g, b)]
                cell = [*_cell_row(f, a), *_cell_row(g, b), *_cell_row(f, c)]
                matched.append([item, dim, *voxel, *cell])
            for rows, h, kind in (
                (left_input, f, found.unmatched_input), (left_target, g, found.unmatched_target)
            ):  # fmt: skip
                rows += [[item, dim, *_voxel_row(h, b), *_cell_row(h, b)] for b in kind[dim]]
    return _table(matched, 12), _table(left_input, 6), _table(left_target, 6)


# --------------------------------------------------------------------------------------------------
# Loss


def loss_terms(
    input: Tensor,
    target: Tensor,
    matched: Tensor,
    unmatched_input: Tensor,
    unmatched_target: Tensor,
    *,
    dim_count: int,
    superlevel: bool = True,
    unmatched: str = "diagonal",
    min_persistence: float = 0.0,
) -> Tensor:
    """The terms of :data:`TERMS` per item and dimension ``(N, D, 3)``, differentiable.

    Args:
        input, target: ``(N, voxels)``.
        matched: rows that begin with (item, dim, birth, death of the input, of the target); a death
            of -1 counts as equal on both sides.
        unmatched_input, unmatched_target: rows that begin with (item, dim, birth, death).
    """
    terms = input.new_zeros(input.shape[0] * dim_count * len(TERMS))

    def take(image, rows, column):
        return image[rows[:, 0], rows[:, column].clamp(min=0)]

    def add(terms, rows, column, values):
        at = (rows[:, 0] * dim_count + rows[:, 1]) * len(TERMS) + column
        return terms.index_add(0, at, values)

    ends = [take(input, matched, 2), take(input, matched, 3)]
    ends += [take(target, matched, 4), take(target, matched, 5)]
    terms = add(terms, matched, 0, _matched_cost(*ends, matched[:, 3] < 0))
    for column, image, rows in ((1, input, unmatched_input), (2, target, unmatched_target)):
        least = min_persistence if column == 1 else None
        b, d = take(image, rows, 2), take(image, rows, 3)
        terms = add(terms, rows, column, _unmatched_cost(b, d, superlevel, unmatched, least))
    return terms.view(input.shape[0], dim_count, len(TERMS))


def _difference(a, b):
    return torch.where(a == b, 0.0, a - b)  # of equal infinities too


def _matched_cost(birth, death, target_birth, target_death, endless):
    births = _difference(birth, target_birth)
    deaths = torch.where(endless, 0.0, _difference(death, target_death))
    return 2 * (births**2 + deaths**2)


def _unmatched_cost(birth, death, superlevel, unmatched, least):
    """Of bars longer than `least`; None: of all."""
    length = _difference(birth, death)
    if unmatched == "diagonal":
        values = length**2
    elif superlevel:
        values = 2 * (birth**2 + (1 - death) ** 2)
    else:
        values = 2 * ((birth - 1) ** 2 + death**2)
    return values if least is None else torch.where(length.abs() > least, values, 0.0)


def dense_loss_terms(
    input: Tensor,
    target: Tensor,
    matched: Tensor,
    unmatched_input: Tensor,
    unmatched_target: Tensor,
    *,
    dim_count: int,
    superlevel: bool = True,
    unmatched: str = "diagonal",
    min_persistence: float = 0.0,
) -> Tensor:
    """:func:`loss_terms` of rows by item ``(N, K, 5 or 3)`` that begin with dim, -1 for no row."""

    def take(image, rows, column):
        found = image.gather(1, rows[..., column].clamp(min=0))
        return torch.where(rows[..., 0] < 0, 0.0, found)  # nothing infinite where no row is

    def by_dim(rows, values):
        # No mask by dimension: 0 times an infinite slope would be NaN. Column 0 is of no row.
        zeros = values.new_zeros(values.shape[0], dim_count + 1)
        return zeros.scatter_add(1, rows[..., 0] + 1, values)[:, 1:]

    ends = [take(input, matched, 1), take(input, matched, 2)]
    ends += [take(target, matched, 3), take(target, matched, 4)]
    terms = [by_dim(matched, _matched_cost(*ends, matched[..., 2] < 0))]
    for image, rows, least in (
        (input, unmatched_input, min_persistence), (target, unmatched_target, None)
    ):  # fmt: skip
        b, d = take(image, rows, 1), take(image, rows, 2)
        terms.append(by_dim(rows, _unmatched_cost(b, d, superlevel, unmatched, least)))
    return torch.stack(terms, -1)


def betti_matching_loss(
    input: Tensor,
    target: Tensor,
    *,
    superlevel: bool = True,
    dims: list[int] | None = None,
    essential: bool = False,
    **options,
) -> Tensor:
    """:func:`loss_terms` of images ``(N, *spatial)``."""
    dim_count = input.dim() - 1
    dims = list(range(dim_count)) if dims is None else dims
    with torch.no_grad():
        matched, left_input, left_target = betti_matching(input, target, superlevel, dims)
        if essential and 0 in dims:
            rows = essential_rows(input, target, superlevel)
            matched = torch.cat([matched, rows.to(matched.device)])
    return loss_terms(
        input.flatten(1), target.flatten(1), matched.to(input.device), left_input.to(input.device),
        left_target.to(input.device), dim_count=dim_count, superlevel=superlevel, **options,
    )  # fmt: skip


def essential_rows(input: Tensor, target: Tensor, superlevel: bool) -> Tensor:
    """Rows that match the oldest vertex of each input to that of its target."""

    def first(image):
        f = image.flatten(1)
        f = -f if superlevel else f
        # argmin does not promise the first of equals.
        return (f == f.amin(1, keepdim=True)).int().argmax(1)

    a, b = first(input), first(target)
    item = torch.arange(len(a), device=a.device)
    none = torch.full_like(item, -1)
    voxel = [item, torch.zeros_like(item), a, none, b, none]
    return torch.stack([*voxel, a, none, b, none, none, none], 1)


def loops(image: Tensor, squares: list[int]) -> list[list[int]]:
    """Edges of the reduced boundaries of 3D squares, each the death of a bar of dimension 1."""
    f = Filtration(image)
    found = {
        cell_id(f.shape, square): [cell_id(f.shape, edge) for edge in edges]
        for square, edges in reduced_columns(f, f, 1).items()
    }
    return [found[square] for square in squares]


def betti_numbers(mask: Tensor) -> list[int]:
    """Betti numbers of one mask by counting cells and reducing boundary matrices."""
    f = Filtration(torch.where(mask.bool(), 0.0, math.inf))
    counts = []
    for dim in range(mask.dim()):
        alive = [c for c in cells(f.shape, dim) if f.value(c) == 0]
        inside = _rank(f, dim)
        outside = _rank(f, dim + 1)
        counts.append(len(alive) - inside - outside)
    return counts


def _rank(f: Filtration, k: int) -> int:
    """Rank of the boundary map of the k-cells of the mask."""
    if k == 0:
        return 0
    return sum(f.value(column) == 0 for column in reduce(f, f, k - 1))
