"""Contrastive losses over a process group: the statistics of one process on the joined batch.

Every rank gives its own queries and keys, and gets the rows of its own queries (and columns of its
own keys). Compiled graphs break at each function. Imported with the first call that has a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss.functional._averages import log_mean_exp
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops.linear_cross_entropy.vocab_parallel.group import all_gather, eager
from pyloss.ops.similarity_softmax import Stats, gather, pair_sums, similarity_softmax
from pyloss.ops.similarity_softmax.call import COLUMNS, DENOMINATORS, MEAN, checked
from pyloss.ops.similarity_softmax.gather import Layout, gathered, summed_over
from pyloss.ops.similarity_softmax.ring import ring_softmax, ring_sums


def check_group() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group needs a process group: call torch.distributed.init_process_group first"
        )


@eager
def layout_of(name: str, x: Tensor, group) -> Layout:
    """Which rank holds which rows of x; the first thing that is asked of a group."""
    check_group()
    return gather.layout_of(name, x, group)


@eager
def all_rows(name: str, x: Tensor, group, sizes: Sequence[int] | None) -> Tensor:
    """The rows of all ranks; `sizes`: how many each has, where that is known."""
    if x.dim() == 0:
        raise ValueError(f"{name} must have rows, got a 0-d tensor")
    if sizes is None:
        return gathered(x, layout_of(name, x, group), group)
    check_group()
    layout = Layout(tuple(sizes), dist.get_rank(group))
    if len(sizes) != dist.get_world_size(group) or sizes[layout.rank] != len(x):
        raise ValueError(
            f"sizes must be one number of rows for each of {dist.get_world_size(group)} ranks, "
            f"{len(x)} of rank {layout.rank}, got {list(sizes)}"
        )
    return gathered(x, layout, group)


@eager
def statistics(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    *,
    group,
    ring: bool = False,
    layout: Layout | None = None,
    denominator: str = "all",
    columns: bool = False,
    mean: bool = False,
    **masks,
) -> Stats:
    """similarity_softmax of this rank's queries with the keys of all ranks.

    Args: as there, of this rank: `first` and `target` count its own keys. `ring`: the keys go
        around the ranks, and none holds them all. `layout`: of the keys, where it is known.
        `masks`: first, target, query_ids, key_ids and same.
    """
    if layout is None:
        layout = layout_of("the embeddings", keys, group)
    if ring:
        flags = DENOMINATORS[denominator] | (COLUMNS if columns else 0) | (MEAN if mean else 0)
        args = _apart(queries, keys, scale, flags, **masks)
        return ring_softmax(args, layout, group)
    masks = _of_all(layout, group, len(keys), **masks)
    every = gathered(keys, layout, group)
    stats = similarity_softmax(
        queries, every, scale, **masks, denominator=denominator, columns=columns, mean=mean
    )
    return _own_columns(stats, layout, group) if columns else stats


@eager
def sums(
    queries: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    *,
    group,
    ring: bool = False,
    **masks,
) -> Tensor:
    """pair_sums of this rank's queries with the keys of all ranks."""
    layout = layout_of("the embeddings", keys, group)
    if ring:
        args = _apart(queries, keys, scale, 0, **masks)
        numbers = (0.0,) if isinstance(bias, Tensor) else (float(bias),)
        bias = bias.to(accumulator_dtype(keys.dtype)) if isinstance(bias, Tensor) else None
        return ring_sums(args, bias, numbers, layout, group)
    masks = _of_all(layout, group, len(keys), **masks)
    return pair_sums(queries, gathered(keys, layout, group), scale, bias, **masks)


@eager
def mean(total: Tensor, count: float | Tensor, group) -> Tensor:
    """Of the ranks' `total` over their `count`, times the ranks: DDP's mean over them is that of
    the joined batch, and so is its gradient."""
    if isinstance(count, Tensor):
        count = count.to(total.dtype)
    else:  # no copy from the host, which waits for the device
        count = torch.full((), count, dtype=total.dtype, device=total.device)
    return total * dist.get_world_size(group) / summed_over(count, group).clamp(min=1)


@eager
def shares(x: Tensor, group) -> Tensor:
    """Softmax over the rows of all ranks, times their count."""
    every = gathered(x.detach(), layout_of("the embeddings", x, group), group)
    return len(every) * torch.exp(x - torch.logsumexp(every, 0))


@eager
def joint_mean(each: Tensor, group) -> Tensor:
    """Over the entries of all ranks, the same on each; of none 0; no gradient."""
    count = each.new_full((), each.numel())
    sums = summed_over(torch.stack([each.sum(), count]), group)
    return sums[0] / sums[1].clamp(min=1)


@eager
def log_mean_exp_of_all(log_mean: Tensor, count: int, group) -> tuple[Tensor, Tensor]:
    """From the log of the mean of `count` exponentials on this rank: that of all ranks' together,
    and this rank's part of it, times the ranks, since DDP divides by them."""
    check_group()
    own = torch.stack([log_mean.detach(), torch.full_like(log_mean, count)])
    means, counts = all_gather(own, group).unbind(1)
    share = counts / counts.sum()
    part = log_mean + torch.log(share[dist.get_rank(group)] * len(share))
    return log_mean_exp(means, share), part


@eager
def of_all(x: Tensor, group) -> list[Tensor]:
    """What the ranks have, alike in shape, without a gradient."""
    check_group()
    return list(all_gather(x.detach(), group))


@eager
def total(x: Tensor, group) -> Tensor:
    """The sum of what the ranks have, without a gradient."""
    check_group()
    return summed_over(x, group)


@eager
def last_dimension(name: str, group, *tensors: Tensor) -> list[Tensor]:
    """What all ranks have along the last dimension, of tensors that are alike in it."""
    layout = layout_of(name, tensors[0], group)
    return [gathered(t.detach().movedim(-1, 0), layout, group).movedim(0, -1) for t in tensors]


def _apart(
    queries, keys, scale, flags, first=-1, target=None, query_ids=None, key_ids=None, same="ignore"
) -> tuple:
    """The op's arguments with keys of their own, also where they are the queries."""
    keys = keys.view_as(keys) if keys is queries else keys
    return checked(queries, keys, scale, first, target, query_ids, key_ids, same, flags)


def _of_all(
    layout, group, own, first=-1, target=None, query_ids=None, key_ids=None, same="ignore"
) -> dict:
    """The masks as they are among the keys of all ranks."""
    if first >= 0:
        first += layout.first
    if target is not None:
        nobody = (target < 0) | (target >= own)
        target = torch.where(nobody, -1, target + layout.first)
    if same == "ignore":
        query_ids = key_ids = None
    else:
        key_ids = gathered(query_ids if key_ids is None else key_ids, layout, group)
    return dict(first=first, target=target, query_ids=query_ids, key_ids=key_ids, same=same)


def _own_columns(stats: Stats, layout, group) -> Stats:
    """Of each rank's statistics of all keys over its own queries: of its own keys over all."""
    even = layout._replace(counts=(1,) * len(layout.counts))
    mine = slice(layout.first, layout.first + layout.counts[layout.rank])

    def parts(*rows: Tensor):  # (ranks, own keys) of each
        return gathered(torch.stack(rows).unsqueeze(0), even, group)[..., mine].unbind(1)

    lse, positive = parts(stats.column_lse, stats.column_positive)
    count, positives = parts(stats.column_count, stats.column_positives)
    nothing = (lse == -torch.inf).all(0)  # whose gradient would be NaN
    lse = torch.logsumexp(lse.masked_fill(nothing, 0), 0).masked_fill(nothing, -torch.inf)
    return stats._replace(
        column_lse=lse,
        column_positive=positive.sum(0),
        column_count=count.sum(0),
        column_positives=positives.sum(0),
    )
