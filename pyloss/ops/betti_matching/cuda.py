"""The CUDA implementations of the ops of betti_matching: allocate the results, call the kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address, queue, scratch
from pyloss.ops.betti_matching import cpu, records, volumes
from pyloss.ops.betti_matching.records import TERMS, WIDTHS, Options, mask_of, pair


def loss(input: Tensor, target: Tensor, options: list[float]) -> tuple[Tensor, Tensor]:
    o = Options(*options)
    x, y = pair(input, target)
    if items_on_host(x, 2, int(o.dims)):
        return cpu.elsewhere(cpu.loss)(input, target, options)
    if x.dim() == 5:
        found, grad = volumes.loss(x, y, o, _loss)
    else:
        found, grad = _loss(x, y, o)
    return found, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


def items_on_host(x: Tensor, lead: int, mask: int) -> bool:
    return x.dim() == lead + 3 and volumes.on_host(math.prod(x.shape[lead:]), mask)


def _loss(x: Tensor, y: Tensor, o: Options) -> tuple[Tensor, Tensor | None]:
    problem = records.problem(x, y, 2, bool(o.superlevel), int(o.dims))
    found = x.new_empty((*x.shape[:2], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    if problem.items and not problem.want:
        found.zero_()
        grad = None if grad is None else grad.zero_()
    elif problem.items:
        with torch.cuda.device_of(x):
            size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
            buffer, start = scratch(x, size, 256)
            _C.cuda_betti_loss(
                problem, records.loss(o), found.data_ptr(), address(grad), start, size, *queue(x)
            )
    return found, grad


# --------------------------------------------------------------------------------------------------
# Rows


def matching(
    input: Tensor, target: Tensor, superlevel: bool, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = pair(input, target)
    mask = mask_of(dims)
    if items_on_host(x, 1, mask):
        return cpu.elsewhere(cpu.matching)(input, target, superlevel, dims)
    if x.dim() < 4 or not mask & volumes.HOST:
        return _rows(x, y, superlevel, mask)
    copies = volumes.Copies(x, y)
    return _rows(
        x, y, superlevel, mask & volumes.DEVICE,
        meanwhile=lambda: cpu.matching(*copies.get(), superlevel, [1]),
    )  # fmt: skip


def pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    x, _ = pair(input, input)
    mask = mask_of(dims)
    if items_on_host(x, 1, mask):
        return cpu.elsewhere(cpu.pairs)(input, superlevel, dims, essential)
    if x.dim() < 4 or not mask & volumes.HOST:
        return _rows(x, None, superlevel, mask, essential)[1]
    copies = volumes.Copies(x)

    def meanwhile() -> tuple[Tensor, Tensor, Tensor]:
        rows = cpu.pairs(*copies.get(), superlevel, [1], False)
        return rows.new_empty((0, WIDTHS[0])), rows, rows[:0]

    return _rows(x, None, superlevel, mask & volumes.DEVICE, essential, meanwhile)[1]


def _rows(
    x: Tensor,
    y: Tensor | None,
    superlevel: bool,
    mask: int,
    essential: bool = False,
    meanwhile: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the CPU's: matched, of the input, of the target; and those that the host finds
    meanwhile."""
    whole = records.problem(x, y, 1, superlevel, mask)
    parts, items = [], whole.items if mask else 0
    with torch.cuda.device_of(x):
        step = _C.cuda_betti_group(whole, x.get_device()) if items else 1
        for first in range(0, items, step):
            images = (None if t is None else t[first : first + step] for t in (x, y))
            write = _started(*images, first, superlevel, mask, essential)
            if meanwhile is not None:
                parts.append([volumes.to_device(rows, x) for rows in meanwhile()])
                meanwhile = None
            parts.append(write())
    if not parts:
        return tuple(x.new_empty((0, width), dtype=torch.int64) for width in WIDTHS)
    voxels = x[:1].numel()
    return tuple(_sorted(torch.cat(tables), voxels) for tables in zip(*parts))


def _started(x, y, first, superlevel, mask, essential) -> Callable[[], tuple[Tensor, ...]]:
    """Of as many items as the kernels take at once, from item `first` on: what gives their rows."""
    problem = records.problem(x, y, 1, superlevel, mask)
    size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
    buffer, start = scratch(x, size, 256)
    counts = x.new_empty((TERMS + 1,), dtype=torch.int32)
    _C.cuda_betti_pairs(problem, essential, counts.data_ptr(), start, size, *queue(x))
    return functools.partial(_written, problem, counts, first, buffer, start, size)


def _written(problem, counts, first, buffer, start, size) -> tuple[Tensor, ...]:
    """Rows in any order, from what lies in the buffer. Waits for the device, once."""
    *found, nan = counts.tolist()
    if nan:
        item, image = divmod(2 * problem.items - nan, 2)
        name = ("input", "target")[image]
        raise ValueError(f"{name} must not contain NaN; item {first + item} does")
    tables = [counts.new_empty(shape, dtype=torch.int64) for shape in zip(found, WIDTHS)]
    rows = records.Rows(tuple(found), tuple(map(address, tables)))
    _C.cuda_betti_rows(problem, rows, start, size, *queue(buffer))
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
