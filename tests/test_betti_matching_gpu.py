"""Betti matching on a GPU: the CPU's loss and gradient, equal bits, graphs, no waiting.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs what needs no device on the
CPU: that tests this file, not the kernels.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from test_row_softmax_gpu import no_sync

import pyloss

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device")

# One voxel, lines both ways, an odd one, one block of a kernel, many blocks, many images.
SHAPES = ((1, 1, 1, 1), (1, 1, 1, 9), (1, 2, 9, 1), (2, 2, 7, 5), (1, 1, 64, 64), (1, 1, 512, 512))
SHAPES += ((8, 1, 512, 512), (3, 2, 300))
# Volumes: one that is the host's alone, one item, flat, many items.
SHAPES += ((1, 1, 9, 8, 7), (1, 1, 40, 33, 29), (1, 1, 2, 100, 90), (4, 2, 25, 24, 26))
KINDS = ("random", "ties", "constant", "up", "down", "infinite")


def images(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """(prediction, target); a ramp is one chain through all voxels."""
    generator = torch.Generator().manual_seed(len(kind))
    x, y = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
    spatial = math.prod(shape[2:])
    ramp = torch.arange(spatial, dtype=torch.float64).view(shape[2:]) / spatial
    if kind == "ties":
        x = (4 * x).floor() / 4
    elif kind == "constant":
        x = torch.full(shape, 0.5, dtype=torch.float64)
    elif kind in ("up", "down"):
        x = (ramp if kind == "up" else 1 - ramp).expand(shape)
    elif kind == "infinite":
        x.view(-1)[:: max(1, x.numel() // 3)] = math.inf
    return [x.to(dtype).contiguous(), (y > 0.5).to(dtype)]


def step(x: torch.Tensor, y: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.detach().requires_grad_()
    loss = pyloss.betti_matching_loss(leaf, y, reduction="none", **options)
    (grad,) = torch.autograd.grad(
        loss, leaf, torch.linspace(1, 2, loss.numel()).to(loss).view_as(loss)
    )
    return loss.detach(), grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equals_the_cpu(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    pair = images(shape, kind, dtype)
    want = step(*pair)
    found = step(*(t.to(DEVICE) for t in pair))
    again = step(*(t.to(DEVICE) for t in pair))
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b, c in zip(found, want, again):
        assert torch.equal(a.nan_to_num(), c.nan_to_num()), "two runs differ"
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_equal_the_cpu(shape: tuple[int, ...], kind: str) -> None:
    x, y = images(shape, kind, torch.float32)
    spatial = len(shape) - 2
    want, found = (pyloss.betti_matching(x.to(d), y.to(d), spatial) for d in ("cpu", DEVICE))
    for table in ("matched", "unmatched_input", "unmatched_target"):
        assert torch.equal(getattr(found, table).cpu(), getattr(want, table))
    a, b = (pyloss.persistence_pairs(x.to(d), spatial, essential=True) for d in ("cpu", DEVICE))
    assert torch.equal(b.index.cpu(), a.index)


@pytest.mark.parametrize("shape", [(2, 1, 9, 8), (1, 2, 24, 25, 26)], ids=str)
def test_rows_of_nan_are_refused(shape: tuple[int, ...]) -> None:
    x, y = (t.to(DEVICE) for t in images(shape, "random", torch.float32))
    y.view(2, -1)[1, 7] = math.nan
    with pytest.raises(ValueError, match="target must not contain NaN; item 1 does"):
        pyloss.betti_matching(x, y)


@needs_device  # the CPU refuses NaN
def test_nan_spoils_its_own_image_only() -> None:
    x, y = images((3, 1, 40, 30), "random", torch.float32)
    want = step(x, y)
    x[1, 0, 3, 4:9] = math.nan
    found = step(x.to(DEVICE), y.to(DEVICE))
    for a, b in zip(found, want):
        assert a[1].isnan().all()
        torch.testing.assert_close(a[[0, 2]].cpu(), b[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    (
        dict(filtration="sublevel"),
        dict(weight=[0.5, 2.0], matched_weight=1.5, unmatched_weight=0.7, target_weight=0.3),
        dict(unmatched="extreme", essential=True, min_persistence=0.1),
        dict(dims=(1,), padding=0.25),
    ),
    ids=str,
)
def test_options(options: dict) -> None:
    pair = images((2, 2, 33, 29), "random", torch.float32)
    want, found = step(*pair, **options), step(*(t.to(DEVICE) for t in pair), **options)
    for a, b in zip(found, want):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@needs_device
@pytest.mark.parametrize(
    "options",
    (
        {},
        dict(weight=[0.5, 2.0], matched_weight=1.5, target_weight=0.3, padding=0.5),
        dict(dims=(1,), target_weight=0.0),
    ),
    ids=str,
)
def test_no_wait_and_graph_capture(options: dict) -> None:
    pair = [t.to(DEVICE) for t in images((2, 1, 40, 30), "random", torch.float32)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*pair, **options)
        with no_sync():
            want = step(*pair, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(*pair, **options)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, want))
