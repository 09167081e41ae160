"""Runs two gloo processes; their losses and gradients are those of one with the whole batch."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pyloss

IMAGES = 14


def views(stop: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(int(stop))
    return torch.randn(3, IMAGES, 6, generator=g, dtype=torch.float64)


def work(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world)
    group = dist.group.WORLD
    for stop in (True, False):
        options = dict(n_pos=2, topk_neg=8, stop_grad=stop)
        whole = views(stop).requires_grad_()
        expected = pyloss.groco_loss(whole, **options)
        expected.backward()
        mine = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
        own = views(stop)[:, mine].requires_grad_()
        loss = pyloss.groco_loss(own, group=group, **options)
        loss.backward()
        mean = loss.detach() / world
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected.detach(), rtol=1e-12, atol=0)
        # What a model would get: DDP takes the mean over the ranks.
        torch.testing.assert_close(own.grad / world, whole.grad[:, mine], rtol=1e-9, atol=1e-12)
    try:
        pyloss.groco_loss(views(True)[:, : 3 + rank], topk_neg=2, group=group)
    except ValueError as error:
        assert "as many rows, got [3, 4]" in str(error), error
    else:
        raise AssertionError("batches of two sizes passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = str(Path(folder) / "rendezvous")
        mp.start_processes(work, (2, rendezvous), nprocs=2, start_method="spawn")
