"""Lion-K on DTensors and FSDP2 parameters against one process: cases of dtensor_worker.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from gloo import raises
from helpers import TORCH
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from pyloss.optim import LionK, LyapunovMonitor

SHAPES = ((5, 3), (4,), (1, 2))  # uneven shards, and an empty one
KAPPAS = {
    "l1": {},
    "lp": dict(p=3.0),
    "lp, rows": dict(p=2.0),
    "lp, global": dict(p=2.0),
    "topk": dict(k=3),
    "topk, global": dict(fraction=0.3),
    "huber": dict(e=0.3),
}


def options(name: str) -> dict:
    kappa, _, group = name.partition(", ")
    group = {"rows": "row", "global": "global", "": "tensor"}[group]
    return dict(kappa=kappa, kappa_args=KAPPAS[name], group=group, lr=0.05, weight_decay=0.5)


def values(step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(s, generator=g).to(dtype) for s in SHAPES]


def against_one_process(
    mesh: DeviceMesh, placements: list, name: str, dtype=torch.float32, **more
) -> None:
    plain = [nn.Parameter(t) for t in values(0, dtype)]
    placed = [nn.Parameter(distribute_tensor(t, mesh, placements)) for t in values(0, dtype)]
    optimizers = [LionK(p, **options(name), **more) for p in (plain, placed)]
    for step in (1, 2):
        for p, q, t in zip(plain, placed, values(step, dtype)):
            p.grad, q.grad = t, distribute_tensor(t, mesh, placements)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(plain, placed):
        for a, b in (
            (p, q),
            (optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"]),
        ):
            assert b.placements == tuple(placements)
            torch.testing.assert_close(b.full_tensor(), a, rtol=1e-5, atol=1e-6)


def copies_round_alike(mesh: DeviceMesh) -> None:
    """Random bits are a function of the shard: copies stay copies, and shards differ."""
    for placement in (Replicate(), Shard(0)):
        t = torch.ones(400, dtype=torch.bfloat16)
        p = nn.Parameter(distribute_tensor(t, mesh, [placement]))
        p.grad = torch.zeros_like(p)
        LionK([p], lr=2**-9, weight_decay=0.5).step()
        mine = p.to_local().detach().float()
        every = [torch.empty_like(mine) for _ in range(mesh.size())]
        dist.all_gather(every, mine)
        assert 0.9 < mine.mean() < 1 and mine.unique().numel() == 2
        assert torch.equal(every[0], every[1]) == placement.is_replicate()


def refused(mesh: DeviceMesh) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
    optimizer = LionK([p])
    raises(RuntimeError, "the gradient must lie as its parameter", optimizer.step)
    q = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    q.grad = torch.ones_like(q)
    raises(RuntimeError, "must not be a Partial DTensor", LionK([q]).step)


def unscaled(mesh: DeviceMesh) -> None:
    """Of a GradScaler, whose numbers are plain tensors."""
    p = nn.Parameter(distribute_tensor(torch.zeros(5), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.full((5,), 64.0), mesh, [Shard(0)])
    optimizer = LionK([p], lr=1.0, betas=(0.0, 0.0), kappa="huber", kappa_args=dict(e=1.0))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(128.0), torch.tensor(0.0)
    optimizer.step()
    assert p.full_tensor().tolist() == [-0.5] * 5 and p.grad.full_tensor().tolist() == [0.5] * 5


def fsdp2(name: str) -> None:
    """Two steps of a sharded model, its Lyapunov function, and its state by name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    twin = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    twin.load_state_dict(model.state_dict())
    fully_shard(model[0])
    fully_shard(model)
    pair = [(m, LionK(m.parameters(), **options(name))) for m in (model, twin)]
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        records = []
        for m, optimizer in pair:
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            records.append(LyapunovMonitor(optimizer).record(loss.detach()))
            optimizer.step()
        torch.testing.assert_close(records[0].H, records[1].H, rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
    state = get_optimizer_state_dict(model, pair[0][1])["state"]
    assert state["0.weight"]["exp_avg"].shape == (5, 3) and state["0.weight"]["step"] == 2


def cases() -> dict[str, Callable[[], None]]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {
        f"Lion-K, {name}, {placement}": lambda n=name, p=placement: against_one_process(
            mesh, [p], n
        )
        for name in KAPPAS
        for placement in (Shard(0), Replicate())
    }
    found |= {
        "Lion-K, lists": lambda: against_one_process(mesh, [Shard(0)], "lp", foreach=True),
        "Lion-K, half": lambda: against_one_process(
            mesh,
            [Shard(0)],
            "topk",
            torch.bfloat16,
            rounding="nearest",
            momentum_dtype=torch.float32,
        ),
        "Lion-K, copies round alike": lambda: copies_round_alike(mesh),
        "Lion-K, unscaled": lambda: unscaled(mesh),
        "Lion-K, refused": lambda: refused(mesh),
    }
    if TORCH >= (2, 11):  # on the CPU; docs/versions.md
        found["Lion-K, FSDP2"] = lambda: fsdp2("lp, global")
        found["Lion-K, FSDP2, l1"] = lambda: fsdp2("l1")
    if world == 4:
        square = init_device_mesh("cpu", (2, 2))
        for placements in ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Shard(0), Shard(0)]):
            found[f"Lion-K, square, {placements}"] = lambda p=placements: against_one_process(
                square, p, "lp, global"
            )
    return found
