"""The CUDA implementations of the ops of betti_matching: allocate the results, call the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue, scratch
from pyloss.ops.betti_matching import records
from pyloss.ops.betti_matching.records import TERMS, WIDTHS, Options, mask_of, pair


def loss(input: Tensor, target: Tensor, options: list[float]) -> tuple[Tensor, Tensor]:
    if input.dim() == 5:  # volumes have no kernel
        return cpu.elsewhere(cpu.loss)(input, target, options)
    o = Options(*options)
    x, y = pair(input, target)
    problem = records.problem(x, y, 2, bool(o.superlevel), int(o.dims))
    found = x.new_empty((*x.shape[:2], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    if problem.items:
        with torch.cuda.device_of(x):
            size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
            buffer, start = scratch(x, size, 256)
            _C.cuda_betti_loss(
                problem, records.loss(o), found.data_ptr(), address(grad), start, size, *queue(x)
            )
    return found, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


# --------------------------------------------------------------------------------------------------
# Rows


def matching(
    input: Tensor, target: Tensor, superlevel: bool, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(*pair(input, target), superlevel, dims, False)


def pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    return _rows(pair(input, input)[0], None, superlevel, dims, essential)[1]


def _rows(
    x: Tensor, y: Tensor | None, superlevel: bool, dims: list[int], essential: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the CPU's: matched, of the input, of the target."""
    whole = records.problem(x, y, 1, superlevel, mask_of(dims))
    parts = [tuple(x.new_empty((0, width), dtype=torch.int64) for width in WIDTHS)]
    with torch.cuda.device_of(x):
        step = _C.cuda_betti_group(whole, x.get_device()) if whole.items and dims else 1
        for first in range(0, whole.items if dims else 0, step):
            images = (None if t is None else t[first : first + step] for t in (x, y))
            parts.append(_rows_of_group(*images, first, superlevel, dims, essential))
    voxels = x[:1].numel()
    tables = parts[-1] if len(parts) == 2 else [torch.cat(tables) for tables in zip(*parts)]
    return tuple(_sorted(rows, voxels) for rows in tables)


def _rows_of_group(x, y, first, superlevel, dims, essential) -> tuple[Tensor, ...]:
    """Of as many items as the kernels take at once, in any order. Waits for the device, once."""
    problem = records.problem(x, y, 1, superlevel, mask_of(dims))
    size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
    buffer, start = scratch(x, size, 256)
    counts = x.new_empty((TERMS + 1,), dtype=torch.int32)
    _C.cuda_betti_pairs(problem, essential, counts.data_ptr(), start, size, *queue(x))
    *found, nan = counts.tolist()
    if nan:
        item, image = divmod(2 * problem.items - nan, 2)
        name = ("input", "target")[image]
        raise ValueError(f"{name} must not contain NaN; item {first + item} does")
    tables = [x.new_empty(shape, dtype=torch.int64) for shape in zip(found, WIDTHS)]
    rows = records.Rows(tuple(found), tuple(map(address, tables)))
    _C.cuda_betti_rows(problem, rows, start, size, *queue(x))
    if first:
        for table in tables:
            table[:, 0] += first
    return tuple(tables)


def _sorted(rows: Tensor, voxels: int) -> Tensor:
    """Rows in the order of their numbers, which the first voxels and the cell of birth decide."""
    ids = 3 * voxels + 1  # of cells
    if rows.shape[1] == WIDTHS[0]:
        keys = [rows[:, 5] * ids + rows[:, 6], rows[:, 3] * voxels + rows[:, 4]]
    else:
        keys = [rows[:, 3] * ids + rows[:, 4]]
    keys.append((rows[:, 0] * 3 + rows[:, 1]) * voxels + rows[:, 2])
    order = keys[0].argsort(stable=True)
    for key in keys[1:]:
        order = order[key[order].argsort(stable=True)]
    return rows[order]
