"""One rank of the test of processes in test_spherical.py: their step is that of one process with
the whole batch. How it runs: gloo.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from gloo import run

import pyloss

D, CLASSES, ROWS = 5, 30, 9


def layer(group=None) -> pyloss.nn.SphericalLinear:
    torch.manual_seed(0)
    return pyloss.nn.SphericalLinear(D, CLASSES, group=group, dtype=torch.float64)


def steps(uneven: bool) -> None:
    """DDP takes the mean over the ranks, of batches of any sizes; none on one of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone, own = layer(), layer(dist.group.WORLD)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        h = torch.randn(world, ROWS, D, generator=g, dtype=torch.float64)
        y = torch.randint(CLASSES, (world, ROWS), generator=g)
        counts = [ROWS - 2 * r if uneven else ROWS for r in range(world)]
        for r, count in enumerate(counts):
            (alone(h[r, :count], y[r, :count]) / world).backward()
        if not uneven or rank == 0:
            own(h[rank, : counts[rank]], y[rank, : counts[rank]]).backward()
        else:
            half = counts[rank] // 2  # in two calls
            for part in (slice(0, half), slice(half, counts[rank])):
                (own(h[rank, part], y[rank, part]) * (part.stop - part.start)
                 / counts[rank]).backward()  # fmt: skip
        torch.testing.assert_close(own.gradient_norm(), alone.gradient_norm())
        alone.step(0.5, 0.1)
        own.step(0.5, 0.1)
    torch.testing.assert_close(own.weight, alone.weight, rtol=1e-12, atol=1e-12)
    every = [torch.empty_like(own.weight) for _ in range(world)]
    dist.all_gather(every, own.weight)
    assert all(torch.equal(w, every[0]) for w in every), "the ranks have drifted apart"


def one_without_rows() -> None:
    own, rank = layer(dist.group.WORLD), dist.get_rank()
    before = own.weight
    h, y = torch.ones(2, D, dtype=torch.float64), torch.tensor([3, 4])
    if rank == 0:
        own(h, y).backward()
    own.step(0.1)
    assert not torch.equal(own.weight, before)


def cases() -> dict[str, Callable]:
    return {
        "steps": lambda: steps(False),
        "uneven batches": lambda: steps(True),
        "one rank without rows": one_without_rows,
    }


if __name__ == "__main__":
    run(cases)
