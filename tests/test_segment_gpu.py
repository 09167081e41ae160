"""Segments on a GPU: the CPU's results at the lengths and widths of the kernels, equal bits, no
waiting.

Skipped without a device. `PYLOSS_TEST_DEVICE=cpu pytest -m gpu` runs what needs no device on the
CPU: that tests this file, not the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch
from test_row_softmax_gpu import no_sync
from test_segment import FUNCTIONS, LONG, SHORT, draw, step

from pyloss.functional import segment_reduce, segment_softmax

pytestmark = pytest.mark.gpu

DEVICE = os.environ.get("PYLOSS_TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device")


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (3,), (70,)], ids=str)
def test_as_on_the_cpu(name, shape) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, offsets = draw([*LONG, *SHORT] if not shape else [*SHORT, 300], shape, dtype)
        if name == "prod":
            x = torch.where(x == 0, x, 1 + (x - 1) / 64)
        want = step(FUNCTIONS[name], x, offsets)
        there = x.to(DEVICE), offsets.int().to(DEVICE)
        found, again = (step(FUNCTIONS[name], *there) for _ in range(2))
        rtol = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-6}[dtype]
        for a, b, c in zip(found, want, again):
            assert torch.equal(a.nan_to_num(9.0), c.nan_to_num(9.0)), "two runs differ"
            torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=rtol, equal_nan=True)


@needs_device
def test_nobody_waits_and_bad_offsets_give_nan() -> None:
    x = torch.randn(6000, device=DEVICE, requires_grad=True)
    good = torch.tensor([0, 5, 5, 6000], device=DEVICE)
    bad = torch.tensor([0, 50, 20, 6000], device=DEVICE)
    with no_sync():
        for offsets in (good, bad, good + 1):
            segment_reduce(x, offsets, "max").sum().backward()
            segment_softmax(x, offsets)
    assert segment_reduce(x, bad)[1].isnan() and segment_reduce(x, good + 1).isnan().all()
