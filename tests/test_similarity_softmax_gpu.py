"""similarity_softmax and pair_sums on a GPU against the reference; bits, waits, memory.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs what needs no device on the
CPU: that tests this file, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_row_softmax_gpu import no_sync

import pyloss
from pyloss.ops.similarity_softmax import pair_sums, similarity_softmax
from pyloss.reference.similarity_softmax import pair_sums as exact_sums
from pyloss.reference.similarity_softmax import similarity_softmax as exact_stats

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
# Of the largest entry; float32 products on a GPU add in another order.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Several tiles of each kernel, ragged; rows held whole, by halves, and blocks of wider ones.
SIZES = [(300, 517, 128), (257, 130, 100), (1, 1000, 24), (300, 700, 320), (140, 300, 1000)]
OPTIONS = {
    "target": {},
    "columns": {"columns": True, "mean": True},
    "own": {"first": 0, "denominator": "negatives"},
    "drop": {"same": "drop"},
    "positive": {"same": "positive", "columns": True},
}


def problem(n: int, m: int, d: int, dtype: torch.dtype, same: bool) -> tuple[list, dict]:
    """(queries, keys, scale of each), indices; on the CPU."""
    g = torch.Generator().manual_seed(n + m)
    tensors = [torch.randn((r, d), generator=g).to(dtype) for r in (n, m)]
    tensors.append((0.5 + torch.rand(n, generator=g)) * d**-0.5)
    indices = {"target": torch.randint(m, (n,), generator=g)}
    if same:
        indices["query_ids"] = torch.randint(9, (n,), generator=g)
        indices["key_ids"] = torch.randint(9, (m,), generator=g)
    return tensors, indices


def run(function, tensors, options: dict) -> list[torch.Tensor]:
    """Results, and gradients of a weighted sum of those that have one."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    found = function(*leaves, **options)
    found = [found] if isinstance(found, torch.Tensor) else [t for t in found if t is not None]
    sums = [t for t in found if t.requires_grad]
    weights = [torch.linspace(0.2, 1, t.numel()).to(t) for t in sums]
    return [*(t.detach() for t in found), *torch.autograd.grad(sums, leaves, weights)]


def check(found: list, want: list, bound: float) -> None:
    for at, (a, b) in enumerate(zip(found, want)):
        error = (a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1e-6)
        assert error <= bound, f"result {at}: {error:.2e}"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_against_the_reference(name: str, size: tuple, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    tensors, indices = problem(*size, dtype, "same" in options)
    want = run(exact_stats, [t.double() for t in tensors], indices | options)
    moved = {k: v.to(DEVICE) for k, v in indices.items()}
    found = run(similarity_softmax, [t.to(DEVICE) for t in tensors], moved | options)
    check(found, want, BOUNDS[dtype])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_against_the_reference(size: tuple) -> None:
    tensors, indices = problem(*size, torch.bfloat16, False)
    tensors.append(torch.tensor(-2.0))
    want = run(exact_sums, [t.double() for t in tensors], indices)
    moved = {k: v.to(DEVICE) for k, v in indices.items()}
    check(run(pair_sums, [t.to(DEVICE) for t in tensors], moved), want, BOUNDS[torch.bfloat16])


@pytest.mark.skipif(DEVICE == "cpu", reason="bits and waits of a GPU")
@pytest.mark.parametrize("d", (128, 512))
def test_two_runs_give_the_same_bits_without_a_wait(d: int) -> None:
    tensors, indices = problem(3000, 5000, d, torch.bfloat16, True)
    tensors = [t.to(DEVICE) for t in tensors]
    options = {k: v.to(DEVICE) for k, v in indices.items()} | {"same": "drop", "columns": True}
    run(similarity_softmax, tensors, options)  # kernels are compiled
    with no_sync():
        one = run(similarity_softmax, tensors, options)
        two = run(similarity_softmax, tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.skipif(DEVICE == "cpu", reason="memory of a GPU")
@pytest.mark.parametrize("loss", ("info_nce", "clip_loss"))
def test_memory(loss: str) -> None:
    """Under 1 GB beside features and gradients."""
    features = [
        torch.randn(65536, 512, device=DEVICE).bfloat16().requires_grad_() for _ in range(2)
    ]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(getattr(pyloss, loss)(*features), features)
    assert torch.cuda.max_memory_allocated() - before < 1e9 + 2 * features[0].nbytes
