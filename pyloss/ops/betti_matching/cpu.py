"""The CPU implementations of the ops of betti_matching: allocate the results, call the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss import _C
from pyloss.ops._launch import address
from pyloss.ops.betti_matching import records
from pyloss.ops.betti_matching.records import TERMS, WIDTHS, Options, mask_of, pair


def loss(input: Tensor, target: Tensor, options: list[float]) -> tuple[Tensor, Tensor]:
    o = Options(*options)
    x, y = pair(input, target)
    problem = records.problem(x, y, 2, bool(o.superlevel), int(o.dims))
    found = x.new_empty((*x.shape[:2], x.dim() - 2, TERMS))
    grad = torch.empty_like(x) if o.want_grad else None
    _C.betti_loss(
        problem, records.loss(o), found.data_ptr(), address(grad), torch.get_num_threads()
    )
    return found, input.new_empty((0,)) if grad is None else grad.to(input.dtype)


def table(data: bytearray, width: int) -> Tensor:
    if not data:
        return torch.empty((0, width), dtype=torch.int64)
    return torch.frombuffer(data, dtype=torch.int64).view(-1, width)


def tables(data: Sequence[bytearray]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(table(rows, width) for rows, width in zip(data, WIDTHS))


def matching(
    input: Tensor, target: Tensor, superlevel: bool, dims: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = pair(input, target)
    problem = records.problem(x, y, 1, superlevel, mask_of(dims))
    found = _C.betti_matching(problem, torch.get_num_threads())
    return tables(found)


def pairs(input: Tensor, superlevel: bool, dims: list[int], essential: bool) -> Tensor:
    x, _ = pair(input, input)
    problem = records.problem(x, None, 1, superlevel, mask_of(dims))
    return table(_C.persistence_pairs(problem, essential, torch.get_num_threads()), 6)


def loops(image: Tensor, squares: list[int]) -> list[list[int]]:
    """Edges of the loop that each square fills, a death of the sublevel sets of one volume."""
    x, _ = pair(image, image)
    problem = records.problem(x, None, 0, False, mask_of([1]))
    wanted = torch.tensor(squares, dtype=torch.int64)
    found: list[list[int]] = [[] for _ in squares]
    for place, edge in table(_C.betti_loops(problem, wanted.data_ptr(), len(squares)), 2).tolist():
        found[place].append(edge)
    return found


def elsewhere(kernel):
    """A kernel of this file for tensors of another device: copied here, and the results back."""

    def call(input, *rest):
        rest = [t.cpu() if isinstance(t, Tensor) else t for t in rest]
        found = kernel(input.cpu(), *rest)
        if isinstance(found, Tensor):
            return found.to(input.device)
        return tuple(t.to(input.device) for t in found)

    return call
