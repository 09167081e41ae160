"""The errors of half types on a GPU where a review expected them: against float64 on the device.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs small shapes on the CPU: that
tests this file, not the kernels.
"""

from __future__ import annotations

import os

import linear_cross_entropy_cases as cases
import pytest
import torch
from linear_cross_entropy_cases import distance
from torch import Tensor

import pyloss

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
HALF = (torch.bfloat16, torch.float16)


def exact_attention(tensors: list[Tensor], dout: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64 on the device, some queries at a time."""
    q, k1, k2, v1, v2 = (t[0, 0].double() for t in tensors)
    n, d = q.shape
    dout = dout[0, 0].double()
    out, grads = torch.empty_like(v1[:n]), [torch.zeros_like(t) for t in (q, k1, k2, v1, v2)]
    step = max(1, 2**25 // n**2)
    for rows in range(0, n, step):
        part = slice(rows, min(rows + step, n))
        leaves = [t.detach().requires_grad_() for t in (q[part], k1, k2, v1, v2)]
        qi, a, b, v, w = leaves
        scores = torch.einsum("id,jd,kd->ijk", qi * d**-0.5, a, b)
        p = scores.flatten(1).softmax(1).view_as(scores)
        o = torch.einsum("ijc,jc->ic", p @ w, v)
        found = torch.autograd.grad(o, leaves, dout[part])
        out[part], grads[0][part] = o.detach(), found[0]
        for total, g in zip(grads[1:], found[1:]):
            total += g
    return out, grads


def rms(found: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("n", (1024, 2048) if DEVICE == "cuda" else (48,))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_backward(n: int, dtype: torch.dtype) -> None:
    """P is about 1 / n^2: float16 must not lose it."""
    generator = torch.Generator().manual_seed(n)
    tensors = [torch.randn((1, 1, n, 64), generator=generator).to(DEVICE, dtype) for _ in range(6)]
    *tensors, dout = tensors
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = pyloss.tensor_attention(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    want, want_grads = exact_attention(tensors, dout)
    limit = 2 * torch.finfo(dtype).eps
    assert rms(out[0, 0], want) < limit
    for name, found, exact in zip(("q", "k1", "k2", "v1", "v2"), grads, want_grads):
        assert rms(found[0, 0], exact) < 2 * limit, name


WAYS = {
    "chunks": {"chunk": 128},
    "recompute": {"chunk": 128, "strategy": "recompute"},
    "tiles": {"strategy": "tiles"},
    "filter": {"filter": 1e-9},
    "tiles, float32 sums": {"strategy": "tiles", "accumulate_dtype": torch.float32},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_linear_cross_entropy(way: str, dtype: torch.dtype) -> None:
    rows, features, classes = (700, 256, 32000) if DEVICE == "cuda" else (300, 32, 500)
    if DEVICE == "cpu" and "tiles" in str(WAYS[way]) + way:
        pytest.skip("needs a device")
    layer = cases.make_layer(rows, features, classes, dtype, bias=True)
    layer = cases.Layer(*(t.detach().to(DEVICE).requires_grad_() for t in layer))
    y = cases.labels_with_ignored(rows, classes).to(DEVICE)
    loss, grads = cases.run(cases.fused, layer, y, **WAYS[way])
    want, exact = cases.run(cases.referenced, cases.fresh(layer, torch.float64), y)
    eps = torch.finfo(dtype).eps
    assert distance(loss, want) < 2 * eps
    for name, found, right in zip(("input", "weight", "bias"), grads, exact):
        assert distance(found, right) < 4 * eps, name
