"""Soft ranks and sorts by projection on a GPU: the CPU's results, equal bits, graphs, no waiting.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs what needs no device on the
CPU: that tests this file, not the kernels.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from test_row_softmax_gpu import no_sync

from pyloss import functional

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device")
OPS = (functional.permutahedron_rank, functional.permutahedron_sort)


def rows(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> torch.Tensor:
    """A falling row pools to one block, a rising one not at all."""
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind == "ties":
        x = x.round()
    elif kind in ("rising", "falling"):
        x = x.sort(1, descending=kind == "falling").values
    elif kind == "nan" and x.numel() > 2:
        x.view(-1)[:: max(1, x.numel() // 3)] = math.nan
        x[-1, -1] = math.inf
    return x.to(dtype)


def step(op, x: torch.Tensor, kind: str, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    y = op(leaf, kind, strength)
    (grad,) = torch.autograd.grad(y, leaf, torch.linspace(-1, 1, y.numel()).to(y).view_as(y))
    return y.detach(), grad


@pytest.mark.parametrize("data", ("random", "ties", "rising", "falling", "nan"))
@pytest.mark.parametrize("shape", ((1, 1), (5, 2), (3, 33), (64, 1024), (2, 5000)), ids=str)
@pytest.mark.parametrize("kind", ("l2", "kl"))
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equals_the_cpu(op, shape, data, kind, dtype) -> None:
    x = rows(shape, data, dtype)
    for strength in (0.1, 3.0):
        want = step(op, x, kind, strength)
        found, again = (step(op, x.to(DEVICE), kind, strength) for _ in range(2))
        rtol = 1e-10 if dtype == torch.float64 else 1e-5
        for a, b, c in zip(found, want, again):
            assert torch.equal(a.nan_to_num(), c.nan_to_num()), "two runs differ"
            atol = rtol * max(1.0, b.nan_to_num().abs().max().item())
            torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=atol, equal_nan=True)


@needs_device
@pytest.mark.parametrize("kind", ("l2", "kl"))
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_no_wait_and_graph_capture(op, kind) -> None:
    x = rows((20, 100), "random", torch.float32).to(DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(op, x, kind, 0.3)
        with no_sync():
            want = step(op, x, kind, 0.3)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(op, x, kind, 0.3)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, want))
