"""Lion-K on a GPU: as on the CPU, and in a CUDA graph. Skipped without a device."""

from __future__ import annotations

import copy

import pytest
import torch
from lion_k_samples import ARGS, F32, parameters
from torch import nn

from pyloss.optim import Lion, LionK

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.mark.parametrize("kappa", ARGS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_on_a_gpu(kappa: str, dtype) -> None:
    """As on the CPU, random bits of rounding included; more tensors than one launch takes."""
    found = []
    for device in ("cpu", "cuda"):
        shapes = [(3, 5), (4097,), (7,), *[(2,)] * 70]
        params = [nn.Parameter(p.detach().to(device)) for p in parameters(*shapes, dtype=dtype)]
        args = dict(
            kappa=kappa, kappa_args={**ARGS[kappa], **({"k": 2} if kappa == "topk" else {})}
        )
        optimizer = LionK(params, lr=0.01, weight_decay=0.5, **args)
        for step in range(2):
            for p, t in zip(params, parameters(*shapes, dtype=dtype, seed=step + 1)):
                p.grad = t.detach().to(device)
            optimizer.step()
        found.append([p.detach().cpu() for p in params])
    for a, b in zip(*found):
        torch.testing.assert_close(b, a, rtol=2**-7 if dtype == BF16 else 1e-5, atol=1e-6)


def test_in_a_cuda_graph() -> None:
    (p,) = parameters((300,), dtype=BF16)
    p = nn.Parameter(p.detach().cuda())
    p.grad = torch.ones_like(p)
    lr = torch.tensor(0.25, device="cuda")
    optimizer = Lion([p], lr=lr, weight_decay=0.5, capturable=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    twin = nn.Parameter(p.detach().clone())
    twin.grad = p.grad.clone()
    other = Lion([twin], lr=0.25, weight_decay=0.5)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for rate in (0.25, 0.5):
        lr.fill_(rate)
        graph.replay()
        other.param_groups[0]["lr"] = rate
        other.step()
        assert torch.equal(p, twin)
    assert optimizer.state[p]["step"] == 3
