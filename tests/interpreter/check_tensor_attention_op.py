"""The op around the Triton kernels, interpreted: masks, GQA, empty axes, wanted gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pyloss.ops import tensor_attention as op


def _tensors(n_q=9, n_1=8, n_2=10):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    tensors = [draw(2, 4, n_q, 16)]
    tensors += [draw(2, 2, n, 16) for n in (n_1, n_2, n_1, n_2)]
    return tensors, [draw(2, 1, n_q, n_1), draw(2, 4, 1, n_2)]


@pytest.mark.parametrize(
    "settings",
    [op.Settings(0.3, False, 0, 0, 0, 0.25, 1.0), op.Settings(0.3, True, 3, 5, 1, 0.0, 0.0)],
)
@pytest.mark.parametrize("want", [127, 31, 64 + 1, 32 + 8])
def test_equals_the_cpu_kernel(settings, want):
    tensors, masks = _tensors()
    if want == 31:
        masks = [masks[0][..., :1], None]  # broadcast along the keys
    out, lse = op.triton.forward(*tensors, *masks, *settings)
    expected, expected_lse = op.cpu.forward(*tensors, *masks, *settings)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    arguments = (dout, dlse, *tensors, *masks, expected, expected_lse, *settings, want)
    got, right = op.triton.backward(*arguments), op.cpu.backward(*arguments)
    assert len(got) == len(right) == bin(want).count("1")
    for a, b in zip(got, right):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lengths", [(0, 5, 6), (4, 0, 6), (4, 5, 0)])
def test_empty_axes(lengths):
    tensors, _ = _tensors(*lengths)
    settings = op.Settings(0.3, False, 0, 0, 0, 0.0, 0.0)
    out, lse = op.triton.forward(*tensors, None, None, *settings)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())
    found = op.triton.backward(out, None, *tensors, None, None, out, lse, *settings, 31)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(found, tensors))


def test_what_the_kernels_do_not_take_runs_on_the_reference():
    tensors, masks = _tensors()
    tensors, masks = [t.double() for t in tensors], [m.double() for m in masks]
    settings = op.Settings(0.3, False, 0, 0, 0, 0.0, 0.0)
    out, lse = op.triton.forward(*tensors, *masks, *settings)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, op.cpu.forward(*tensors, *masks, *settings)[0])
