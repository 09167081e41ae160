"""PyTorch's own samples for nn.functional.cross_entropy, run on pyloss.fused_cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import pyloss

# A private module of torch, which needs expecttest.
common = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="torch's test helpers cannot be imported",
    exc_type=ImportError,
)

OPINFO = next(op for op in common.op_db if op.name == "nn.functional.cross_entropy")
DTYPES = sorted(OPINFO.dtypes, key=str)


def _samples(dtype, requires_grad=True):
    samples = list(OPINFO.sample_inputs("cpu", dtype, requires_grad=requires_grad))
    assert samples
    return samples


def _tolerance(dtype):
    # PyTorch rounds to half between its steps; its own tests allow the same.
    return dict(rtol=1.6e-2, atol=1e-2) if dtype in (torch.bfloat16, torch.float16) else {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradient(dtype):
    for sample in _samples(dtype):
        x = sample.input
        theirs = F.cross_entropy(x, *sample.args, **sample.kwargs)
        ours = pyloss.fused_cross_entropy(x, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs, equal_nan=True, **_tolerance(dtype))
        inputs = [x] + [a for a in sample.args if isinstance(a, torch.Tensor) and a.requires_grad]
        upstream = torch.ones_like(theirs)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, upstream),
            torch.autograd.grad(theirs, inputs, upstream),
        ):
            torch.testing.assert_close(a, b, equal_nan=True, **_tolerance(dtype))


def test_derivatives():
    for sample in _samples(torch.float64):
        inputs = (sample.input, *sample.args)

        def f(*args, sample=sample):
            return pyloss.fused_cross_entropy(*args, **sample.kwargs)

        # As in torch's own test: a mean over ignored rows only is NaN and has no derivative.
        if f(*inputs).isnan().any():
            continue
        assert gradcheck(f, inputs, check_forward_ad=True)
        assert gradgradcheck(f, inputs)


def test_noncontiguous_samples():
    for sample in _samples(torch.float64):
        strided = sample.noncontiguous()
        theirs = F.cross_entropy(sample.input, *sample.args, **sample.kwargs)
        ours = pyloss.fused_cross_entropy(strided.input, *strided.args, **strided.kwargs)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_error_inputs():
    if OPINFO.error_inputs_func is None:
        pytest.skip("this version of torch lists no error inputs for cross_entropy")
    for error in OPINFO.error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            pyloss.fused_cross_entropy(sample.input, *sample.args, **sample.kwargs)
