"""One rank of the test of processes in test_groco.py: their losses and gradients are those of one
with the whole batch. How it runs: gloo.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from gloo import raises, run

import pyloss

IMAGES, UNEVEN = 14, 10


def views(stop: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(int(stop))
    return torch.randn(3, IMAGES, 6, generator=g, dtype=torch.float64)


def one_batch(stop: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    options = dict(n_pos=2, topk_neg=8, stop_grad=stop)
    whole = views(stop).requires_grad_()
    expected = pyloss.groco_loss(whole, **options)
    expected.backward()
    mine = slice(rank * UNEVEN // world, IMAGES if rank + 1 == world else UNEVEN // world)
    own = views(stop)[:, mine].requires_grad_()
    loss = pyloss.groco_loss(own, group=dist.group.WORLD, **options)
    loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-12, atol=0)
    # What a model would get: DDP takes the mean over the ranks.
    torch.testing.assert_close(own.grad / world, whole.grad[:, mine], rtol=1e-9, atol=1e-12)


def views_of_two_kinds() -> None:
    mine = torch.zeros(2, 4, 3 + dist.get_rank())
    raises(ValueError, "views must be alike on every rank",
           lambda: pyloss.groco_loss(mine, topk_neg=2, group=dist.group.WORLD))  # fmt: skip


def cases() -> dict[str, Callable]:
    return {
        "no gradient to the others": lambda: one_batch(True),
        "a gradient to all": lambda: one_batch(False),
        "views of two kinds": views_of_two_kinds,
    }


if __name__ == "__main__":
    run(cases)
