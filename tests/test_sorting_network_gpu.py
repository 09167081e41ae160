"""Sorting networks on a GPU: the CPU's results, graphs, no waiting, equal bits, large rows.

Skipped without a device. With PYLOSS_TEST_DEVICE=cpu, and the skip of conftest.py lifted, what
needs no device runs on the CPU. That tests this file, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_row_softmax_gpu import no_sync

import pyloss
from pyloss.ops import sorting_network as op

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device")
_ops = torch.ops.pyloss
# Weights are sums of products over the layers; float32 loses some digits of each comparator.
RTOL = {torch.float64: 1e-10, torch.float32: 2e-4}


def problem(b: int, n: int, dtype: torch.dtype, width: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    ranks = torch.stack([torch.randperm(n, generator=generator) for _ in range(b)]).int()
    return {
        "x": draw(b, n), "gy": draw(b, n), "f": draw(b, n, width), "one": draw(1, n, width),
        "g": draw(b, n, width), "first": ranks, "count": torch.ones_like(ranks),
    }  # fmt: skip


def outputs(t: dict[str, torch.Tensor], net: list[int], options: list[float], matrix: bool):
    """Of every op and its backward, by name."""
    x, out = t["x"], {}
    out["y"] = _ops.sorting_network_sort(x, net, options)
    out["gx of y"] = _ops.sorting_network_sort_bwd(t["gy"], x, net, options)
    for transpose in (True, False):
        for name in ("f", "one"):
            label = f"{name}, transpose {transpose}"
            out[label] = _ops.sorting_network_apply(x, t[name], transpose, net, options)
            found = _ops.sorting_network_apply_bwd(
                t["g"], x, t[name], transpose, net, options, True
            )
            out[f"gx of {label}"], out[f"gf of {label}"] = found
    if matrix:
        _, p = _ops.sorting_network_permutation(x, net, options)
        out["P"] = p
        weight = torch.linspace(-1, 1, p.shape[-1], dtype=p.dtype, device=p.device)
        gp = weight.outer(weight.cos()).expand_as(p).contiguous()
        for gy in (None, t["gy"]):
            label = "gx of P" if gy is None else "gx of P and y"
            out[label] = _ops.sorting_network_permutation_bwd(gy, gp, x, net, options)
        for kind in range(3):
            found = _ops.sorting_network_loss(
                x, t["first"], t["count"], [0, kind, kind], net, options, True
            )
            out[f"loss {kind}"], out[f"gx of loss {kind}"] = found
    return out


def check(b: int, n: int, dtype: torch.dtype, net: list[int], options, matrix: bool = True):
    t = problem(b, n, dtype)
    want = outputs({k: v.cpu() for k, v in t.items()}, net, options, matrix)
    found = outputs({k: v.to(DEVICE) for k, v in t.items()}, net, options, matrix)
    for name, value in want.items():
        atol = RTOL[dtype] * value.abs().max().item()
        torch.testing.assert_close(
            found[name].cpu(),
            value,
            rtol=RTOL[dtype],
            atol=atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )


# Powers of two and others, on both sides of every change of kernel: 32 registers, 512 threads,
# t in segments, 4096 wires in a block.
@pytest.mark.parametrize("n", (1, 2, 3, 5, 8, 13, 16, 31, 32, 33, 64, 100, 128, 257))
@pytest.mark.parametrize("network", range(3), ids=op.NETWORKS[:3])
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_equals_the_cpu(n: int, network: int, dtype: torch.dtype) -> None:
    check(5, n, dtype, [network, 3, 0], [2.0, 0.25])


@pytest.mark.parametrize("n, k", ((5, 2), (50, 5), (130, 3)))
def test_selection_equals_the_cpu(n: int, k: int) -> None:
    check(3, n, torch.float64, [3, 3, k], [2.0, 0.25])


@pytest.mark.parametrize("distribution", range(6), ids=op.DISTRIBUTIONS)
@pytest.mark.parametrize("n", (12, 48))
def test_distributions_equal_the_cpu(distribution: int, n: int) -> None:
    check(3, n, torch.float64, [0, distribution, 0], [10.0, 0.3])


@pytest.mark.parametrize("network, n", ((0, 1000), (0, 1024), (0, 4096), (1, 1100), (2, 1100)))
def test_large_rows(network: int, n: int) -> None:
    check(1, n, torch.float32, [network, 3, 0], [2.0, 0.25])


@pytest.mark.parametrize("network", range(3), ids=op.NETWORKS[:3])
def test_more_wires_than_a_block_holds(network: int) -> None:
    check(1, 4500, torch.float64, [network, 3, 0], [2.0, 0.25], matrix=False)


@needs_device
def test_a_million_values() -> None:
    n = 2**20
    x = torch.randn(1, n, device=DEVICE)
    hard = x.sort(-1)
    found = pyloss.soft_sort(x, steepness=1e9)
    torch.testing.assert_close(found, hard.values, rtol=0, atol=1e-3)
    x.requires_grad_()
    gx = torch.autograd.grad(pyloss.soft_sort(x).sum(), x)[0]
    assert (gx.double().mean() - 1).abs() < 1e-4  # each layer keeps the sum of its wires
    rank = pyloss.soft_rank(x, steepness=1e9)
    assert (rank.argsort(-1) == hard.indices).double().mean() > 0.99
    gx = torch.autograd.grad((rank * torch.randn_like(rank)).sum(), x)[0]
    assert gx.isfinite().all()


@needs_device
def test_no_matrix_in_memory() -> None:
    x = torch.randn(64, 1024, device=DEVICE, requires_grad=True)
    target = torch.rand(64, 1024, device=DEVICE).argsort(-1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pyloss.sorting_cross_entropy(x, target, target_is="ranks").backward()
    assert torch.cuda.max_memory_allocated() - before < 100e6


@needs_device
def test_rows_of_4096() -> None:
    x = torch.randn(8, 4096, device=DEVICE, requires_grad=True)
    target = x.detach().argsort(-1).argsort(-1)
    loss = pyloss.sorting_cross_entropy(x, target, target_is="ranks")
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


SPECIAL = (
    [0.5, float("inf"), -1.0, float("-inf"), float("inf"), 0.5, 0.5],
    [0.5, float("nan"), -1.0, 2.0, 1.0, 0.5, 0.1],
    [1.0] * 7,
)


@pytest.mark.parametrize("network", range(3), ids=op.NETWORKS[:3])
@pytest.mark.parametrize("repeat", (1, 7))
def test_infinities_nan_and_ties(network: int, repeat: int) -> None:
    """A row of NaN only, or not at all; the tiny kernels and the tiles."""
    net, options = [network, 3, 0], [2.0, 0.25]
    x = torch.tensor(SPECIAL, dtype=torch.float64).repeat(1, repeat)
    for found in (
        lambda x: _ops.sorting_network_permutation(x, net, options),
        lambda x: (_ops.sorting_network_sort_bwd(x.nan_to_num(0, 0, 0), x, net, options),),
    ):
        for a, b in zip(found(x.to(DEVICE)), found(x)):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12, equal_nan=True)


def _step(x: torch.Tensor, target: torch.Tensor, f: torch.Tensor) -> list[torch.Tensor]:
    """A use of every op, forward and backward."""
    loss = pyloss.sorting_cross_entropy(x, target, target_is="ranks")
    loss = loss + (pyloss.soft_rank(x) * f[..., 0]).mean() + pyloss.soft_sort(x).square().mean()
    loss = loss + pyloss.soft_permute(x, f).square().mean()
    loss = loss + (pyloss.soft_permutation(x, network="odd_even") * target.unsqueeze(-1)).mean()
    return [loss.detach(), *torch.autograd.grad(loss, (x, f))]


def _step_inputs(b: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(b, n, device=DEVICE, requires_grad=True)
    f = torch.randn(b, n, 4, device=DEVICE, requires_grad=True)
    return x, torch.rand(b, n, device=DEVICE).argsort(-1), f


@needs_device
@pytest.mark.parametrize("shape", ((7, 20), (3, 200)), ids=str)
def test_no_wait_for_the_device(shape: tuple[int, int]) -> None:
    inputs = _step_inputs(*shape)
    _step(*inputs)
    with no_sync():
        _step(*inputs)


@needs_device
@pytest.mark.parametrize("shape", ((7, 20), (3, 200)), ids=str)
def test_in_a_cuda_graph(shape: tuple[int, int]) -> None:
    x, target, f = _step_inputs(*shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(x, target, f)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _step(x, target, f)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        f.copy_(torch.randn_like(f))
    graph.replay()
    for a, b in zip(found, _step(x, target, f)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", ((7, 20), (64, 100), (3, 1000)), ids=str)
def test_equal_bits_every_time(shape: tuple[int, int]) -> None:
    inputs = _step_inputs(*shape)
    first = _step(*inputs)
    for _ in range(3):
        for a, b in zip(first, _step(*inputs)):
            assert torch.equal(a, b)
