"""Results do not depend on the number of threads, and threads may call at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import pyloss

CASES = {
    "many_rows": ((301, 257), {}),
    "few_long_rows": ((3, 70001), {}),
    "one_row": ((1, 150001), {}),
    "smoothing": ((130, 1000), {"label_smoothing": 0.1}),
    "tau_z_loss": ((130, 1000), {"tau": 0.7, "z_loss": 1e-3}),
    "softcap": ((130, 1000), {"softcap": 5.0}),
    "k_dim": ((2, 21, 33, 17), {}),
    "weight": ((200, 300), {"weight": True}),
}


def run(case: str, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    shape, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype).requires_grad_()
    rows = (shape[0], *shape[2:])
    target = torch.randint(shape[1], rows, generator=generator)
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(shape[1], generator=generator).to(dtype) + 0.5
    losses = pyloss.fused_cross_entropy(x, target, reduction="none", **options)
    mean = pyloss.fused_cross_entropy(x, target, **options)
    (grad_rows,) = torch.autograd.grad(losses.float().square().sum(), x)
    (grad_mean,) = torch.autograd.grad(mean, x)
    return losses.detach(), mean.detach(), grad_rows, grad_mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_thread_count_does_not_matter(case, dtype, keep_num_threads) -> None:
    torch.set_num_threads(1)
    want = run(case, dtype)
    assert all(torch.isfinite(t).all() for t in want)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        for got, one in zip(run(case, dtype), want):
            assert torch.equal(got, one), f"{threads} threads differ from one"


def test_eight_python_threads(keep_num_threads) -> None:
    torch.set_num_threads(2)
    jobs = [(case, torch.float32, seed) for seed in range(4) for case in CASES]
    want = [run(*job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda job: run(*job), jobs))
    for one, other in zip(want, got):
        assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_errors_reach_the_calling_thread(keep_num_threads) -> None:
    torch.set_num_threads(4)
    x = torch.randn(500, 1000)
    target = torch.zeros(500, dtype=torch.int64)
    target[333] = 1000
    for _ in range(3):
        with pytest.raises(IndexError, match="Target 1000 is out of bounds"):
            pyloss.fused_cross_entropy(x, target)
    target[333] = 0
    torch.testing.assert_close(
        pyloss.fused_cross_entropy(x, target), torch.nn.functional.cross_entropy(x, target)
    )


def test_eight_threads_meet_at_every_first_use() -> None:
    """Of ops, caches and registries: threads_worker.py, in a process that has used nothing yet."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    worker = Path(__file__).with_name("threads_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
