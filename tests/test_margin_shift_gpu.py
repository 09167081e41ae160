"""How far margins moved, on a GPU: the CPU's results at the sizes and layouts of the kernels, equal
bits, no waiting.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs what needs no device on the
CPU: that tests this file, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_margin_shift import LAYOUTS, draw
from test_row_softmax_gpu import no_sync

from pyloss.functional import margin_shift
from pyloss.testing import assert_matches_reference

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device")


def step(x, moved, target, squared):
    given = [t.detach().requires_grad_() for t in (x, moved)]
    shift = margin_shift(*given, target, squared=squared)
    up = torch.linspace(0.5, 2, target.numel()).to(shift).view(target.shape)
    return [shift.detach(), *torch.autograd.grad(shift, given, up)]


def check(x, moved, target, squared=False):
    want = step(x, moved, target, squared)
    there = [t.to(DEVICE) for t in (x, moved, target)]
    found, again = (step(*there, squared) for _ in range(2))
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}[x.dtype]
    for a, b, c in zip(found, want, again):
        assert torch.equal(a, c), "two runs differ"
        size = float(b.abs().max())
        assert_matches_reference(a.cpu(), b.double(), rtol=rtol, atol=rtol * size)


# A warp, 128 threads, a block; with and without vectors of 16 bytes.
@pytest.mark.parametrize("classes", [1, 10, 64, 1000, 1024, 1027, 8192, 50257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows(classes, dtype) -> None:
    check(*draw((9, classes), dtype), squared=classes % 2 == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout) -> None:
    x, moved, target = draw((2, 70, 301), torch.float32)
    x, moved = LAYOUTS[layout](x), LAYOUTS[layout](moved)
    check(x, moved, target)


@needs_device
def test_a_label_that_is_no_class_is_nan_in_its_row_alone() -> None:
    x, moved, target = (t.to(DEVICE) for t in draw((6, 20), torch.float32))
    target[1] = 20
    shift, dx, dadv = step(x, moved, target, False)
    for t in (shift, dx, dadv):
        assert t[1].isnan().all()
        assert t[[0, 2, 3, 4, 5]].isfinite().all()


@needs_device
def test_no_waiting() -> None:
    x, moved, target = (t.to(DEVICE) for t in draw((6, 20), torch.float32))
    given = [t.requires_grad_() for t in (x, moved)]
    margin_shift(*given, target, reduction="mean").backward()
    with no_sync():
        margin_shift(*given, target, reduction="mean").backward()
