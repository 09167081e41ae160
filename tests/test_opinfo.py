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


def _wide(value, dtype):
    """Of half types float32 leaves of the same values: PyTorch rounds to half between its steps."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        return value
    return value.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradient(dtype):
    for sample in _samples(dtype):
        given = (sample.input, *sample.args)
        exact = [_wide(a, dtype) for a in given]
        options = {k: _wide(v, dtype).detach() if isinstance(v, torch.Tensor) else v
                   for k, v in sample.kwargs.items()}  # fmt: skip
        theirs = F.cross_entropy(*exact, **options)
        ours = pyloss.fused_cross_entropy(*given, **sample.kwargs)
        torch.testing.assert_close(ours, theirs.to(dtype), equal_nan=True)
        wanted = [isinstance(a, torch.Tensor) and a.requires_grad for a in given]
        for a, b in zip(
            torch.autograd.grad(
                ours, [a for a, yes in zip(given, wanted) if yes], torch.ones_like(ours)
            ),
            torch.autograd.grad(
                theirs, [a for a, yes in zip(exact, wanted) if yes], torch.ones_like(theirs)
            ),
        ):
            torch.testing.assert_close(a, b.to(dtype), equal_nan=True)


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
