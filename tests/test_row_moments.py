"""The row_moments op: the reference against torch, the kernel against the reference at the sizes,
layouts and edges that it is written around."""

from __future__ import annotations

import math

import pytest
import torch

import pyloss
from pyloss.ops.row_moments import row_moments
from pyloss.reference import row_moments as reference
from pyloss.testing import make_logits

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {F64: 1e-12, F32: 1e-6, BF16: 1e-6, F16: 1e-6}


def labels(shape: tuple[int, ...], ignored: bool = True) -> torch.Tensor:
    rows = () if len(shape) == 1 else (shape[0], *shape[2:])
    classes = shape[min(1, len(shape) - 1)]
    y = torch.randint(classes, rows, generator=torch.Generator().manual_seed(1))
    if ignored and y.numel() > 1:
        y.view(-1)[0] = -100
    return y


def both(function, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments and gradient, float64, for upstream gradients of all four."""
    leaf = x.detach().requires_grad_()
    found = function(leaf, y)
    g = make_logits(found.shape, F64, scale=1.0, seed=3).to(found.dtype)
    (dx,) = torch.autograd.grad(found, leaf, g)
    assert dx.dtype == x.dtype
    return found.double(), dx.double()


def test_the_reference_is_torchs_statistics() -> None:
    x, y = make_logits((6, 9), F64, scale=2.0), labels((6, 9))
    own, offset, mean, var = reference(x, y)
    kept = y != -100
    assert torch.equal(own[kept], x[kept, y[kept]]) and not own[~kept].any()
    torch.testing.assert_close(mean[kept], x.mean(1)[kept])
    torch.testing.assert_close(var[kept], x.var(1, correction=0)[kept])
    torch.testing.assert_close(offset, own - mean)


# Around a lane group, a block and a tile of classes; one class; several tiles of positions.
SHAPES = ((7,), (1, 1), (3, 63), (5, 64), (2, 2049), (3, 4400), (2, 5, 3), (2, 33, 9, 8), (70, 3))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_against_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = labels(shape)
    plain = make_logits(shape, F64, scale=2.0).to(dtype)
    layouts = {"plain": plain, "sliced": torch.cat([plain, plain], -1)[..., : shape[-1]]}
    if len(shape) > 1:
        layouts["classes apart"] = plain.transpose(0, 1).contiguous().transpose(0, 1)
        layouts["every second"] = torch.stack([plain, plain], -1)[..., 0]
        layouts["expanded"] = plain[:1].expand(shape)
    for name, x in layouts.items():
        found, want = both(row_moments, x, y), both(reference, x.double(), y)
        for f, w, tolerance in zip(found, want, (TOLERANCES[dtype],) * 2):
            if w is want[1] and dtype in (BF16, F16):
                w, tolerance = w.to(dtype).double(), 1e-2
            torch.testing.assert_close(f, w, rtol=tolerance, atol=tolerance, msg=name)


def test_a_large_mean_costs_the_variance_no_digits() -> None:
    """sum x^2 / C - mean^2 of these is 1.06 in float32."""
    for shape in ((2, 20000), (2, 20000, 3)):
        x = (make_logits(shape, F64, scale=1.0) + 1000).float()
        found = row_moments(x, labels(shape, ignored=False))
        want = x.double().var(1, correction=0)
        torch.testing.assert_close(found[3].double(), want, rtol=2e-6, atol=0)


def test_equal_scores_have_no_variance() -> None:
    for value in (0.0, 0.1, 1e4):
        assert row_moments(torch.full((1, 999), value), torch.tensor([3]))[3] <= 1e-7 * value**2


@pytest.mark.parametrize("shape", ((3, 50), (3, 50, 2)), ids=str)
def test_what_is_not_finite(shape: tuple[int, ...]) -> None:
    x, y = make_logits(shape, F32, scale=1.0), labels(shape)
    for row, entry in enumerate((math.nan, math.inf, -math.inf)):
        x[(row, 7, 0)[: len(shape)]] = entry
    moments, dx = both(row_moments, x, y)
    kept = y != -100
    spoiled = torch.zeros_like(kept)
    spoiled.view(3, -1)[:, 0] = True
    for row in (2, 3):  # mean, variance
        assert torch.equal(~moments[row].isfinite(), spoiled & kept)
    # An ignored row is 0, and so is its gradient, whatever is in it.
    assert not moments[:, ~kept].any() and not dx.movedim(1, -1)[~kept].any()


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.uint8), ids=str)
def test_labels(dtype: torch.dtype) -> None:
    x = make_logits((4, 300), F32, scale=1.0)
    y = torch.tensor([3, 0, 255, 7]).to(dtype)
    assert torch.equal(row_moments(x, y), row_moments(x, y.long()))
    for backend in ("cpu", "reference"):
        with pyloss.backend(backend), pytest.raises(IndexError, match="Target 255 is out"):
            row_moments(x[:, :255], y)


def test_threads_do_not_show() -> None:
    x, y = make_logits((37, 4100), F32, scale=1.0), labels((37, 4100))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both(row_moments, x, y))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])


def test_opcheck() -> None:
    x, y = make_logits((2, 5, 3), F32, scale=1.0), labels((2, 5, 3))
    moments = row_moments(x, y)
    ops = torch.ops.pyloss
    torch.library.opcheck(ops.row_moments_fwd.default, (x, y, -100))
    torch.library.opcheck(ops.row_moments_bwd.default, (moments, x, y, moments, -100))
