"""Keys from all processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss.ops.linear_cross_entropy.vocab_parallel.group import all_gather, eager


class _Gather(torch.autograd.Function):
    """(V, B, D) of each rank as (V, ranks B, D); a key gets the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx, keys, group):
        ctx.group = group
        return all_gather(keys, group).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        return grad.chunk(ranks, 1)[rank], None


@eager
def gathered(keys: Tensor, group) -> tuple[Tensor, int]:
    """(the keys of all ranks in their order, at which this rank's begin), of (V, B, D)."""
    count = keys.shape[1]
    if keys.device.type == "cpu":  # nobody is waited for there
        counts = all_gather(torch.tensor(count), group).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"every rank of the group must hold as many rows, got {counts} (give the sampler "
                "drop_last=True)"
            )
    return _Gather.apply(keys, group), dist.get_rank(group) * count
