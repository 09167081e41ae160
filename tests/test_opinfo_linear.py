"""PyTorch's own samples for nn.functional.linear_cross_entropy (2.13), run on pyloss."""

from __future__ import annotations

import re

import pytest
import torch

import pyloss

# A private module of torch, which needs expecttest.
common = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations",
    reason="torch's test helpers cannot be imported",
    exc_type=ImportError,
)

OPINFOS = [op for op in common.op_db if op.name == "nn.functional.linear_cross_entropy"]
if not OPINFOS:
    pytest.skip("F.linear_cross_entropy came with torch 2.13", allow_module_level=True)
HALF = (torch.bfloat16, torch.float16)

variants = pytest.mark.parametrize("op", OPINFOS, ids=lambda op: op.variant_test_name or "plain")


def _wide(x):
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def _found(function, input, args, kwargs):
    """[loss, gradients of everything that requires one]."""
    loss = function(input, *args, **kwargs)
    tensors = (input, *args, *kwargs.values())
    inputs = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.ones_like(loss))]


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_samples(op, dtype):
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 50
    for s in samples:
        theirs = _found(op.op, s.input, s.args, s.kwargs)
        ours = _found(pyloss.fused_linear_cross_entropy, s.input, s.args, s.kwargs)
        if dtype not in HALF:
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)
            continue
        # Both round between their steps, at different ones: float64 on the same numbers judges.
        # Allowed are eight units in the last place of the largest entry, or what theirs is off.
        kwargs = {k: _wide(v) for k, v in s.kwargs.items()}
        exact = _found(
            pyloss.reference.linear_cross_entropy,
            _wide(s.input),
            [_wide(a) for a in s.args],
            {k: v for k, v in kwargs.items() if k != "options"},
        )
        for a, b, c in zip(ours, theirs, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(a.isnan(), b.isnan())
            a, b, c = (t.double().nan_to_num() for t in (a, b, c))
            if c.numel():
                rounding = 8 * torch.finfo(dtype).eps * c.abs().amax()
                assert (a - c).abs().amax() <= 1.1 * (b - c).abs().amax() + rounding


@variants
def test_error_inputs(op):
    errors = list(op.error_inputs("cpu"))
    assert errors
    for error in errors:
        s = error.sample_input
        with pytest.raises(error.error_type) as raised:
            pyloss.fused_linear_cross_entropy(s.input, *s.args, **s.kwargs)
        assert re.search(error.error_regex, str(raised.value))
