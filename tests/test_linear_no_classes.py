"""A layer of no classes, as F.cross_entropy of what F.linear gives."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pyloss import fused_linear_cross_entropy, token_logprobs

TARGETS = {"ignored": torch.full((3,), -100), "probabilities": torch.zeros(3, 0)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_classes(target, reduction: str, bias: bool, dtype: torch.dtype) -> None:
    y = target.to(dtype) if target.is_floating_point() else target
    h, w = torch.ones(3, 2, dtype=dtype), torch.ones(0, 2, dtype=dtype)
    h, w = h.requires_grad_(), w.requires_grad_()
    b = torch.ones(0, dtype=dtype) if bias else None
    want = F.cross_entropy(F.linear(h, w, b), y, reduction=reduction)
    found = fused_linear_cross_entropy(h, w, y, b, reduction=reduction)
    assert found.dtype == dtype
    torch.testing.assert_close(found, want, equal_nan=True)
    for g, x in zip(torch.autograd.grad(found.sum(), (h, w)), (h, w)):
        assert g.shape == x.shape and not g.any()


def test_sequences_and_one_row() -> None:
    h, w, y = torch.ones(2, 4, 3), torch.ones(0, 3), torch.full((2, 4), -100)
    assert (
        fused_linear_cross_entropy(h, w, y, reduction="none", shift=1).tolist() == [[0.0] * 3] * 2
    )
    assert fused_linear_cross_entropy(h, w, y, empty="zero") == 0
    assert token_logprobs(h[0, 0], w, y[0, 0]) == 0
    assert math.isnan(fused_linear_cross_entropy(h[0, 0], w, y[0, 0]))
    assert fused_linear_cross_entropy(h[:0], w, y[:0], reduction="sum") == 0
    for labels in (y.clone().fill_(0), y.clone().fill_(-1)):
        with pytest.raises(IndexError, match=f"Target {labels[0, 0]} is out of bounds"):
            fused_linear_cross_entropy(h, w, labels)
    with pytest.raises(IndexError, match="no classes"):
        token_logprobs(h, w, y, return_entropy=True)
