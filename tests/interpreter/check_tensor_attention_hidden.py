"""NaN and infinity behind masks, causality and windows, interpreted: as on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from pyloss.ops import tensor_attention as op

N = 11
_lower = torch.zeros(N, N).masked_fill(torch.arange(N) > torch.arange(N).unsqueeze(1), -math.inf)
_padding = torch.zeros(2, 1, 1, N)
_padding[0, ..., 5:] = _padding[1, ..., 4:] = -math.inf
HIDING = [
    ((0, 0), False, (_padding, _padding)),
    ((0, 0), False, (_lower.view(1, 1, N, N), None)),
    ((0, 0), False, (None, _lower.view(1, 1, N, N))),
    ((0, 0), True, (None, _padding)),
    ((3, 4), True, (None, None)),
    ((2, 2), False, (None, None)),
]


@pytest.mark.parametrize("windows, causal, masks", HIDING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_equals_the_cpu_kernel(windows, causal, masks, dtype, at):
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, h, N, 16, generator=g).to(dtype) for h in (4, 2, 2, 2, 2)]
    tensors[at][:, :, 6, 1] = (math.nan, math.inf)[at % 2]
    settings = op.Settings(0.3, causal, *windows, 0, 0.25, 1.0)
    out, lse = op.triton.forward(*tensors, *masks, *settings)
    expected, expected_lse = op.cpu.forward(*tensors, *masks, *settings)
    near = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out, expected, rtol=near, atol=near, equal_nan=True)
    torch.testing.assert_close(lse, expected_lse, rtol=near, atol=near, equal_nan=True)
    if masks[0] is not _padding:
        assert out.isnan().any() or masks[1] is _padding
        return
    assert out.isfinite().all()  # nobody sees it: gradients are those of clean tensors
    dout = torch.randn(out.shape, generator=g).to(dtype)
    arguments = (*masks, expected, expected_lse, *settings, 31)
    got = op.triton.backward(dout, None, *tensors, *arguments)
    clean = [t.nan_to_num(1.0, 1.0) for t in tensors]
    for a, b in zip(got, op.cpu.backward(dout, None, *clean, *arguments)):
        torch.testing.assert_close(a, b, rtol=10 * near, atol=10 * near)
