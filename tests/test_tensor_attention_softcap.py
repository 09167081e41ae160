"""Capped scores: c tanh(S / c), before masks, as Gemma 2 and FlexAttention's users write it."""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch
from torch import Tensor

import pyloss
from pyloss import backends
from pyloss.functional import tensor_attention_n
from pyloss.ops.tensor_attention import triton
from pyloss.reference import tensor_attention as reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F64: 1e-12, F32: 2e-5, BF16: 3e-2, F16: 4e-3}


def drawn(dtype, n_q, lengths, heads=4, groups=2, d=6, dv=5) -> list[Tensor]:
    g = torch.Generator().manual_seed(n_q)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=F64).to(dtype).requires_grad_()

    keys, values = ([draw(2, groups, n, width) for n in lengths] for width in (d, dv))
    return [draw(2, heads, n_q, d), *keys, *values]


def gradients(out, lse, inputs) -> list[Tensor]:
    """Of what is there of the rows that see something."""
    seen = torch.where(lse > -math.inf, lse, 0.0).double()
    loss = (out.double() * torch.linspace(-1, 1, out.shape[-1], dtype=F64)).sum()
    return list(torch.autograd.grad(loss + seen.sin().sum(), inputs))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("cap", [0.5, 5.0, 50.0])
def test_against_the_reference(cap, dtype, order):
    """Sizes around a vector, a tile and a block of columns; masks, windows, grouped heads."""
    for n_q, lengths in ((7, (7, 7, 7)), (33, (29, 50, 3)), (3, (2, 300, 2))):
        tensors = drawn(dtype, n_q, lengths[:order])
        keys, values = tensors[1 : 1 + order], tensors[1 + order :]
        acc = F64 if dtype == F64 else F32
        masks = []
        for n in lengths[:order]:
            mask = torch.randn(1, 4, n_q, n, dtype=acc)
            mask = mask.masked_fill(torch.rand(mask.shape) < 0.2, -math.inf)
            masks.append(mask.requires_grad_(order < 3))
        wide = [t.detach().double().requires_grad_() for t in (*tensors, *masks)]
        wide_masks = wide[1 + 2 * order :]
        for band in ({}, dict(causal=True, windows=[9] * order, q_offset=2)):
            given = dict(is_causal=True, window=9, q_offset=2) if band else {}
            out, lse = tensor_attention_n(
                tensors[0], keys, values, masks=masks, scale=0.7, softcap=cap, enable_gqa=True,
                return_lse=True, **given,
            )  # fmt: skip
            exact, exact_lse = reference(
                wide[0], wide[1 : 1 + order], wide[1 + order : 1 + 2 * order], masks=wide_masks,
                scale=0.7, softcap=cap, **band,
            )  # fmt: skip
            of = len(tensors) + (len(masks) if order < 3 else 0)
            found = gradients(out, lse, [*tensors, *masks][:of])
            want = gradients(exact, exact_lse, wide[:of])
            for a, b in zip((out, lse, *found), (exact, exact_lse, *want)):
                size = 1.0 + b[b.isfinite()].abs().max().item()
                torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * size)


def test_plain_attention_is_that_of_gemma():
    """Order 1, and order 2 with second keys and values of ones."""
    q, k, v = torch.randn(3, 2, 4, 20, 8, dtype=F64)
    scores = q @ k.transpose(-1, -2) * 0.4
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    capped = (30.0 * torch.tanh(scores / 30.0)).masked_fill(~causal, -math.inf)
    want = capped.softmax(-1) @ v
    options = dict(is_causal=True, scale=0.4, softcap=30.0)
    torch.testing.assert_close(tensor_attention_n(q, [k], [v], **options), want)
    one = torch.ones_like(k)
    pairs = pyloss.tensor_attention(
        q, k, one, v, one, mask1=causal, scale=0.4, softcap=30.0, is_causal=False
    )
    torch.testing.assert_close(pairs, want)


def test_plain_attention_is_that_of_flex_attention():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = torch.randn(3, 1, 2, 16, 8)

    def score_mod(score, batch, head, query, key):
        return 2.0 * torch.tanh(score / 2.0)

    want = flex.flex_attention(q, k, v, score_mod)
    found = tensor_attention_n(q, [k], [v], softcap=2.0)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_high_cap_changes_nothing_and_a_low_one_levels():
    tensors = drawn(F64, 9, (9, 9), groups=4)
    plain = pyloss.tensor_attention(*tensors)
    torch.testing.assert_close(pyloss.tensor_attention(*tensors, softcap=1e9), plain)
    mean = tensors[3].mean(2, keepdim=True) * tensors[4].mean(2, keepdim=True)
    found = pyloss.tensor_attention(*tensors, softcap=1e-9)
    torch.testing.assert_close(found, mean.expand_as(found))


def test_huge_scores():
    """tanh is 1 from there on: finite, with a gradient of 0 for the queries."""
    tensors = [t.detach() for t in drawn(F32, 9, (9, 9), groups=4)]
    tensors[0] = (tensors[0] * 1e30).requires_grad_()
    out = pyloss.tensor_attention(*tensors, softcap=20.0)
    assert out.isfinite().all()
    (dq,) = torch.autograd.grad(out.sum(), tensors[0])
    assert not dq.any()


def test_nan_in_the_scores_is_seen():
    tensors = [t.detach() for t in drawn(F32, 9, (9, 9), groups=4)]
    tensors[0][0, 0, 4, 2] = math.nan
    out = pyloss.tensor_attention(*tensors, softcap=20.0)
    assert out[0, 0, 4].isnan().all() and out.isnan().sum() == 5


def test_auto_takes_exact_attention():
    tensors = torch.rand(5, 1, 2, 300, 8).unbind()
    options = dict(scale="kronecker", softcap=0.5)
    found = pyloss.tensor_attention(*tensors, method="auto", tol=0.1, **options)
    assert torch.equal(found, pyloss.tensor_attention(*tensors, **options))


def test_same_bits_on_any_number_of_threads(keep_num_threads):
    tensors = drawn(F32, 40, (40, 60))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = pyloss.tensor_attention(*tensors, softcap=1.5, enable_gqa=True)
        found.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for a, b in itertools.product(found[:1], found[1:]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_the_triton_kernels_leave_it_to_the_reference(monkeypatch, caplog):
    q, k1, k2, v1, v2 = (t.detach() for t in drawn(F32, 5, (5, 5), groups=4))
    monkeypatch.setattr(backends, "_fallbacks_logged", set())
    args = (q, k1, k2, v1, v2, None, None, 0.5, False, 0, 0, 0, 0.0, 0.0, 2.0)
    with caplog.at_level(logging.INFO, logger=backends._log.name):
        out, _ = triton.forward(*args)
    assert "the Triton kernels have no softcap" in caplog.text
    torch.testing.assert_close(
        out, pyloss.tensor_attention(q, k1, k2, v1, v2, scale=0.5, softcap=2.0)
    )
    monkeypatch.setenv("PYLOSS_STRICT", "1")
    with pytest.raises(RuntimeError, match="PYLOSS_STRICT is set.*have no softcap"):
        triton.forward(*args)
