"""The CUDA implementations of the ops of betti_matching: allocate the results, call the kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

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
    found, grad = (_volumes_loss if x.dim() == 5 else _loss)(x, y, o)
    return found, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


def items_on_host(x: Tensor, lead: int, mask: int) -> bool:
    return x.dim() == lead + 3 and volumes.on_host(math.prod(x.shape[lead:]), mask)


def _loss(x: Tensor, y: Tensor, o: Options) -> tuple[Tensor, Tensor | None]:
    new = torch.empty if o.dims else torch.zeros  # no dimension: nothing to launch
    found = new((*x.shape[:2], x.dim() - 2, TERMS), dtype=x.dtype, device=x.device)
    grad = new(x.shape, dtype=x.dtype, device=x.device) if o.want_grad else None
    if x.numel() and o.dims:
        _launch_loss(x.flatten(0, 1), y.flatten(0, 1), o, found, grad)
    return found, grad


def _launch_loss(x, y, o: Options, found: Tensor, grad: Tensor | None):
    """Of images (K, *spatial); what the kernels worked on: problem, buffer, its start and size."""
    problem = records.problem(x, y, 1, bool(o.superlevel), int(o.dims))
    with torch.cuda.device_of(x):
        size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
        buffer, start = scratch(x, size, 256)
        to = (address(found), address(grad))
        _C.cuda_betti_loss(problem, records.loss(o), *to, start, size, *queue(x))
    return problem, buffer, start, size


def _volumes_loss(x: Tensor, y: Tensor, o: Options) -> tuple[Tensor, Tensor | None]:
    """By groups of items; dimension 1 of one on the host while the device works on the next."""
    mask = int(o.dims) & volumes.DEVICE
    if mask == int(o.dims):
        return _loss(x, y, o)
    found = x.new_empty((x.shape[0] * x.shape[1], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    images = [None if t is None else t.flatten(0, 1) for t in (x, y, grad)]
    o, pending = o._replace(dims=mask), None
    for first, group in _groups(images[:2], bool(o.superlevel), mask):
        a, b, slope = (None if t is None else t[group] for t in images)
        loops = volumes.Loops(a, b, first, bool(o.superlevel), mask)
        loops.launched(*_launch_loss(a, b, o, found[group], slope))
        if pending is not None:
            volumes.finish(*pending)
        pending = loops, o, found[group], slope
    if pending is not None:
        volumes.finish(*pending)
    return found.view(*x.shape[:2], x.dim() - 2, TERMS), grad


def _groups(images, superlevel: bool, mask: int) -> Iterator[tuple[int, slice]]:
    """(first item, items) of what the kernels take at once, of images (K, *spatial)."""
    whole = records.problem(*images, 1, superlevel, mask)
    if whole.items and mask:
        with torch.cuda.device_of(images[0]):
            step = _C.cuda_betti_group(whole, images[0].get_device())
        for first in range(0, whole.items, step):
            yield first, slice(first, first + step)


# --------------------------------------------------------------------------------------------------
# Rows


def matching(
    input: Tensor, target: Tensor, superlevel: bool, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = pair(input, target)
    mask = mask_of(dims)
    if items_on_host(x, 1, mask):
        return cpu.elsewhere(cpu.matching)(input, target, superlevel, dims)
    return _rows(x, y, superlevel, mask)


def pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    x, _ = pair(input, input)
    mask = mask_of(dims)
    if items_on_host(x, 1, mask):
        return cpu.elsewhere(cpu.pairs)(input, superlevel, dims, essential)
    return _rows(x, None, superlevel, mask, essential)[1]


def _rows(
    x: Tensor, y: Tensor | None, superlevel: bool, mask: int, essential: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As the CPU's: matched, of the input, of the target."""
    parts, pending, own = [], None, mask & volumes.DEVICE if x.dim() == 4 else mask
    for first, group in _groups((x, y), superlevel, own):
        a, b = (None if t is None else t[group] for t in (x, y))
        loops = None if own == mask else volumes.Loops(a, b, first, superlevel, own)
        launched = _launch_rows(a, b, superlevel, own, essential)
        if loops is not None:
            loops.launched(*launched[1:])
        if pending is not None:
            parts += _written(*pending)
        pending = first, loops, *launched
    if pending is not None:
        parts += _written(*pending)
    if not parts:
        return tuple(x.new_empty((0, width), dtype=torch.int64) for width in WIDTHS)
    voxels = x[:1].numel()
    return tuple(_sorted(torch.cat(tables), voxels) for tables in zip(*parts))


def _launch_rows(x, y, superlevel: bool, mask: int, essential: bool):
    """The number of rows on the device, and what the kernels worked on."""
    problem = records.problem(x, y, 1, superlevel, mask)
    counts = x.new_empty((TERMS + 1,), dtype=torch.int32)
    with torch.cuda.device_of(x):
        size = _C.cuda_betti_matching_scratch_bytes(problem, x.get_device())
        buffer, start = scratch(x, size, 256)
        _C.cuda_betti_pairs(problem, essential, address(counts), start, size, *queue(x))
    return counts, problem, buffer, start, size


def _written(first, loops, counts, problem, buffer, start, size) -> list[Sequence[Tensor]]:
    """The tables of a group in any order, and those of its dimension 1. Waits for the device."""
    *found, nan = counts.tolist()
    records.raise_nan(nan, problem.items, first)
    tables = [counts.new_empty(shape, dtype=torch.int64) for shape in zip(found, WIDTHS)]
    rows = records.Rows(tuple(found), tuple(map(address, tables)))
    with torch.cuda.device_of(counts):
        _C.cuda_betti_rows(problem, rows, start, size, *queue(buffer))
    for table in tables:
        table[:, 0] += first
    if loops is None:
        return [tables]
    return [tables, [volumes.to_device(t, counts) for t in loops.rows()]]


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
