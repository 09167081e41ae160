"""similarity_softmax and pair_sums over the keys of all ranks, none of which ever holds them all.

Blocks of keys go around: a rank works on its own, then on that of the rank before it, and so on,
while the next block is on its way. With them go, where there are any, the statistics of the keys
over the queries that have seen them (forward) and the gradients of the keys (backward), until they
are home. Memory: two blocks of keys, one of gradients, and one number for each query and rank.

Of the block b, with lse_b over its keys alone, sum exp of all is the sum of exp(lse_b), and the
gradient of its logits is that of lse_b with the cotangent exp(lse_b - lse) g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.similarity_softmax.call import (
    COLUMNS,
    SIGMOID,
    SOURCES,
    WANTS,
    Stats,
    split_softmax,
)
from pyloss.ops.similarity_softmax.gather import Layout

_ops = torch.ops.pyloss
_Tensors = list[Tensor]


def _sent_on(tensors: _Tensors, rows: int, layout: Layout, group) -> tuple[_Tensors, list]:
    """(tensors that will hold as many rows of the rank before this one, what to wait for)."""
    world = len(layout.counts)
    after, before = (
        dist.get_global_rank(
            dist.group.WORLD if group is None else group, (layout.rank + by) % world
        )
        for by in (1, -1)
    )
    arriving = [t.new_empty((rows, *t.shape[1:])) for t in tensors]
    moves = [dist.P2POp(dist.isend, t, after, group) for t in tensors if t.numel()]
    moves += [dist.P2POp(dist.irecv, t, before, group) for t in arriving if t.numel()]
    return arriving, dist.batch_isend_irecv(moves) if moves else []


def _around(
    tensors: _Tensors,
    collected: _Tensors,
    layout: Layout,
    group,
    work: Callable[[int, _Tensors, _Tensors], _Tensors],
) -> _Tensors:
    """work(step, tensors of a block, what the ranks before have collected for it) for each block,
    this rank's first. Returns what all of them have collected for this rank's.
    """
    world = len(layout.counts)
    tensors = [t.contiguous() for t in tensors]
    for step in range(world):
        rows = layout.counts[(layout.rank - step - 1) % world]
        last = step + 1 == world
        arriving, pending = ([], []) if last else _sent_on(tensors, rows, layout, group)
        collected = work(step, tensors, collected)
        if world > 1:
            coming, late = _sent_on([c.contiguous() for c in collected], rows, layout, group)
            for request in (*pending, *late):
                request.wait()
            tensors, collected = arriving, coming
    return collected


def _merged(a, b) -> tuple:
    """(lse, positive, count, positives, mean or None) over two blocks."""
    lse = torch.logaddexp(a[0], b[0])
    mean = a[4]
    if mean is not None:
        mean = _share(mean, a[0], lse) + _share(b[4], b[0], lse)
    return (lse, *(x + y for x, y in zip(a[1:4], b[1:4])), mean)


def _share(x: Tensor, of: Tensor, lse: Tensor) -> Tensor:
    """exp(of - lse) x; 0 where `of` is the lse of nothing."""
    return torch.where(of == -torch.inf, 0.0, torch.exp(of - lse) * x)


def _zeros_for(grads, like) -> _Tensors:
    return [torch.zeros_like(like) if g is None else g for g in grads]


class _Block:
    """The op's arguments of one block: what is a rank's own belongs to its own keys alone."""

    def __init__(self, queries, scale, scales, target, query_ids, first, flags) -> None:
        self.mine = queries, scale, scales, target, query_ids, first, flags

    def __call__(self, step: int, tensors: _Tensors) -> tuple:
        """tensors: the block's keys, and their ids where queries have some."""
        queries, scale, scales, target, query_ids, first, flags = self.mine
        keys, key_ids = tensors[0], None if query_ids is None else tensors[1]
        if step:
            target, first = None, -1
        return queries, keys, scale, scales, target, query_ids, key_ids, first, flags


def _going_around(keys: Tensor, key_ids: Tensor | None) -> _Tensors:
    return [keys] if key_ids is None else [keys, key_ids]


def _gradients(sources, needed, moving: _Tensors, where, call) -> list[Tensor | None]:
    """Of the sources, the second being the keys, whose gradients go around with them.

    call(step, tensors of a block, which gradients): those of this rank's queries with the block.
    """
    if torch.is_grad_enabled():
        # torch's once_differentiable would let a constant upstream pass, and count as zero.
        raise RuntimeError("ring=True has no second derivative (create_graph=True)")
    want = sum(bit for bit, yes in zip(WANTS, needed) if yes)
    sums = [
        torch.zeros_like(s, dtype=accumulator_dtype(s.dtype)) if yes else None
        for s, yes in zip(sources, needed)
    ]

    def work(step, tensors, of_keys):
        found = iter(call(step, tensors, want))
        for at, yes in enumerate(needed):
            if yes:
                total = of_keys[0] if at == 1 else sums[at]
                total += next(found)
        return of_keys

    own = _around(moving, [sums[1]] if needed[1] else [], *where, work)
    if needed[1]:
        sums[1] = own[0]
    return [None if t is None else t.to(s.dtype) for t, s in zip(sums, sources)]


class _RingStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        queries, keys, scale, scales, target, query_ids, key_ids, first, flags, *where = args
        block = _Block(queries, scale, scales, target, query_ids, first, flags)
        rows, parts, column_parts = None, [], []

        def work(step, tensors, columns):
            nonlocal rows
            found = split_softmax(_ops.similarity_softmax_fwd(*block(step, tensors)), flags)
            rows = found[:5] if rows is None else _merged(rows, found[:5])
            parts.append(found[0])
            if not flags & COLUMNS:
                return columns
            column_parts.append(found[5])
            mine = (*found[5:], None)
            if step:
                mine = _merged((*columns[0].unbind(1), None), mine)
            return [torch.stack(mine[:4], 1)]

        columns = _around(_going_around(keys, key_ids), [], *where, work)
        found = (*rows, *(columns[0].unbind(1) if columns else (None,) * 4))
        found = tuple(None if t is None else t.contiguous() for t in found)
        ctx.save_for_backward(*args[:2], *args[3:7], found[0], found[5], *parts, *column_parts)
        ctx.rest = scale, first, flags, where
        ctx.mark_non_differentiable(*(found[i] for i in (2, 3, 4, 7, 8) if found[i] is not None))
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx, *grads):
        queries, keys, scales, target, query_ids, key_ids, lse, column_lse, *parts = (
            ctx.saved_tensors
        )
        scale, first, flags, where = ctx.rest
        parts, column_parts = parts[: len(where[0].counts)], parts[len(where[0].counts) :]
        block = _Block(queries, scale, scales, target, query_ids, first, flags)
        g, g_positive = _zeros_for(grads[:2], lse)
        moving = _going_around(keys, key_ids)
        if flags & COLUMNS:
            moving.append(torch.stack([column_lse, *_zeros_for(grads[5:7], column_lse)], 1))

        def call(step, tensors, want):
            of_columns = (None,) * 3
            if flags & COLUMNS:
                total, column_g, column_g_positive = tensors[-1].unbind(1)
                column_g = _share(column_g, column_parts[step], total)
                of_columns = column_parts[step], column_g, column_g_positive.contiguous()
            of_rows = _share(g, parts[step], lse), g_positive
            return _ops.similarity_softmax_bwd(
                *block(step, tensors), want, parts[step], of_columns[0], *of_rows, *of_columns[1:]
            )

        needed = [ctx.needs_input_grad[at] for at in SOURCES]
        of_queries, of_keys, of_scales = _gradients(
            (queries, keys, scales), needed, moving, where, call
        )
        return of_queries, of_keys, None, of_scales, *(None,) * 7


class _RingSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        queries, keys, scale, scales, target, query_ids, key_ids, first, flags, *rest = args
        bias, numbers, *where = rest
        block = _Block(queries, scale, scales, target, query_ids, first, flags)
        total = 0.0

        def work(step, tensors, nothing):
            nonlocal total
            pairs = block(step, tensors)
            total = total + _ops.similarity_sums_fwd(*pairs, bias, numbers, SIGMOID)[0]
            return nothing

        _around(_going_around(keys, key_ids), [], *where, work)
        ctx.save_for_backward(*args[:2], *args[3:7], bias)
        ctx.rest = scale, first, flags, numbers, where
        return total

    @staticmethod
    def backward(ctx, grad):
        queries, keys, scales, target, query_ids, key_ids, bias = ctx.saved_tensors
        scale, first, flags, numbers, where = ctx.rest
        block = _Block(queries, scale, scales, target, query_ids, first, flags)

        def call(step, tensors, want):
            pairs = block(step, tensors)
            return _ops.similarity_sums_bwd(*pairs, bias, numbers, SIGMOID, want, grad, None)

        needed = [ctx.needs_input_grad[at] for at in (*SOURCES, 9)]
        of_queries, of_keys, of_scales, of_bias = _gradients(
            (queries, keys, scales, bias), needed, _going_around(keys, key_ids), where, call
        )
        return of_queries, of_keys, None, of_scales, *(None,) * 5, of_bias, *(None,) * 3


def ring_softmax(args: tuple, layout: Layout, group) -> Stats:
    """similarity_softmax of the op's arguments with this rank's keys, over those of all ranks."""
    return Stats(*_RingStats.apply(*args, layout, group))


def ring_sums(args: tuple, bias: Tensor | None, numbers, layout: Layout, group) -> Tensor:
    """pair_sums likewise."""
    return _RingSums.apply(*args, bias, numbers, layout, group)
