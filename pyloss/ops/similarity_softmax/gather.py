"""Rows of all ranks of a process group, with their gradients. Batches may differ in size."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.linear_cross_entropy.vocab_parallel.group import all_gather

# Renamed in torch 2.13, where the old name warns.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Layout(NamedTuple):
    """Which rank holds which rows, in the order of the ranks."""

    counts: tuple[int, ...]
    rank: int

    @property
    def first(self) -> int:
        """Of this rank's rows."""
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def even(self) -> bool:
        return len(set(self.counts)) == 1


def layout_of(name: str, x: Tensor, group) -> Layout:
    """One gather of three integers, which every rank then reads: on CUDA it waits for the device.

    Rows that no rank could put together are the same error on each of them.
    """
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError("this process is not in the group")
    code = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else len(_DTYPES)
    mine = torch.tensor([len(x), x.numel() // max(len(x), 1), code], device=x.device)
    if not len(x):
        mine[1] = x[:0].new_empty((1, *x.shape[1:]), device="meta").numel()
    counts, widths, codes = zip(*all_gather(mine, group).tolist())
    if len(set(widths)) > 1 or len(set(codes)) > 1:
        held = [
            f"{_DTYPES[c] if c < len(_DTYPES) else 'another dtype'} of {w} numbers a row"
            for w, c in zip(widths, codes)
        ]
        raise ValueError(f"{name} must be alike on every rank of the group, got {held}")
    return Layout(tuple(counts), rank)


def _padded(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros((rows - len(x), *x.shape[1:]))])


def joined(x: Tensor, layout: Layout, group) -> Tensor:
    """The rows of all ranks, without a gradient."""
    most = max(layout.counts)
    every = all_gather(_padded(x, most), group)
    if layout.even:
        return every.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(every, layout.counts)])


def _summed(x: Tensor, layout: Layout, group) -> Tensor:
    """Of rows for all ranks: this rank's, as the sum of what the ranks have; half types by float32.
    Never in place: autograd may hold x elsewhere."""
    wide = accumulator_dtype(x.dtype)
    mine = slice(layout.first, layout.first + layout.counts[layout.rank])
    if x.device.type == "cpu":  # gloo scatters no faster than it sums
        total = x.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total[mine].to(x.dtype)
    most = max(layout.counts)
    parts = x.to(wide).split(layout.counts)
    total = parts[0].new_empty((most, *x.shape[1:]))
    _reduce_scatter(total, torch.cat([_padded(p, most) for p in parts]), group=group)
    return total[: layout.counts[layout.rank]].to(x.dtype)


class _GatherRows(torch.autograd.Function):
    """A row gets the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx, x, layout, group):
        ctx.where = layout, group
        return joined(x, layout, group)

    @staticmethod
    def backward(ctx, grad):
        return _SumOverProcesses.apply(grad, *ctx.where), None, None


class _SumOverProcesses(torch.autograd.Function):
    """Adjoint of _GatherRows, and so its own derivative is _GatherRows."""

    @staticmethod
    def forward(ctx, x, layout, group):
        ctx.where = layout, group
        return _summed(x, layout, group)

    @staticmethod
    def backward(ctx, grad):
        return _GatherRows.apply(grad, *ctx.where), None, None


def gathered(x: Tensor, layout: Layout, group) -> Tensor:
    """(B_r, ...) of each rank r as (sum of B_r, ...); with its gradient where x has one."""
    return _GatherRows.apply(x, layout, group)


def summed_over(x: Tensor, group) -> Tensor:
    """The sum of what the ranks have, without a gradient."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total
