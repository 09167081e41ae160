"""Keys from all processes of a group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pyloss.ops.linear_cross_entropy.vocab_parallel.group import all_gather, eager


class _Gather(torch.autograd.Function):
    """Of the ranks' losses each key gets the gradients of all."""

    @staticmethod
    def forward(ctx, keys, group):
        ctx.group = group
        return all_gather(keys, group).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        return grad.unflatten(0, (dist.get_world_size(ctx.group), -1))[rank], None


@eager
def gathered(keys: Tensor, group) -> tuple[Tensor, int]:
    """(the keys of all ranks in their order, at which this rank's begin)."""
    rank, count = dist.get_rank(group), keys.shape[0]
    if keys.device.type == "cpu":  # nobody is waited for there
        counts = all_gather(torch.tensor(count), group).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"every rank of the group must hold as many rows, got {counts} (give the sampler "
                "drop_last=True)"
            )
    return _Gather.apply(keys, group), rank * count
