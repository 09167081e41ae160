"""What is hidden from a query does not reach it: NaN and infinity in keys and values, overflow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tensor_attention_cases import F32, F64

import pyloss
from pyloss.functional import tensor_attention_n
from pyloss.reference import tensor_attention as reference

N, D, HEADS = 9, 4, 4
BF16 = torch.bfloat16
BAD = (math.nan, math.inf, -math.inf)

# Keys and values 5 (axis 0) and 6 (axis 1) are spoilt; name: (options, masks per axis).
_lower = torch.arange(N) <= torch.arange(N).unsqueeze(1)
_padding = torch.tensor([[True] * 5 + [False] * 4, [True] * 4 + [False] * 5])[:, None, None]
_uneven = torch.rand(2, HEADS, N, N, generator=torch.Generator().manual_seed(3)) < 0.6
_uneven[:, :, 2] = False  # a query that sees nothing
HIDING = {
    "padding": ({}, (_padding, _padding)),
    "bias": ({}, (torch.zeros(N, N).masked_fill(~_lower, -math.inf), torch.randn(1, N))),
    "uneven": ({}, (_uneven, None)),
    "both uneven": ({}, (_uneven, _uneven.flip(-1))),
    "causal": (dict(is_causal=True), (None, None)),
    "windows": (dict(window=(3, 2)), (None, None)),
    "two-sided": (dict(window=2, is_causal=False), (None, None)),
    "causal, padding": (dict(is_causal=True), (_padding, None)),
}


def _tensors(dtype, heads, order=2):
    shapes = [HEADS] + 2 * order * [heads]
    return [torch.randn(2, h, N, D, dtype=dtype) for h in shapes]


def _seen(options, masks):
    """Bool, (2, HEADS, N, N) per axis."""
    window = options.get("window")
    windows = window if isinstance(window, tuple) else (window,) * len(masks)
    causal = options.get("is_causal", window is not None)
    found = []
    distance = torch.arange(N).unsqueeze(1) - torch.arange(N)
    for mask, w in zip(masks, windows):
        seen = torch.ones(2, HEADS, N, N, dtype=torch.bool)
        if mask is not None:
            seen = seen & (mask if mask.dtype == torch.bool else mask > -math.inf)
        if causal:
            seen = seen & (distance >= 0)
        if w:
            seen = seen & (distance < w) & (-distance < w)
        found.append(seen)
    return found


def _attend(tensors, options, masks):
    order = len(tensors) // 2
    q, keys, values = tensors[0], tensors[1 : 1 + order], tensors[1 + order :]
    gqa = q.shape[1] != keys[0].shape[1]
    return tensor_attention_n(
        q, keys, values, masks=masks, enable_gqa=gqa, return_lse=True, **options
    )


def _gradients(call, tensors, among):
    """(out, lse, gradients) of the loss of the queries `among`, (2, HEADS, N)."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    out, lse = call(tensors)
    kept = among.unsqueeze(-1)
    loss = torch.where(kept, out.to(F64), 0.0).square().sum()
    loss = loss + torch.where(among & (lse > -math.inf), lse, 0.0).to(F64).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("name", HIDING)
def test_hidden_keys_and_values(name, dtype, backend):
    """Queries that see none of it have the result of clean tensors, those that do have NaN."""
    options, masks = HIDING[name]
    first, second = _seen(options, masks)
    both = first.any(-1) & second.any(-1)
    for heads, (at, bad) in itertools.product((HEADS, 2), zip((1, 2, 3, 4, 1), (*BAD, *BAD[:2]))):
        tensors = _tensors(dtype, heads)
        spoilt = [t.clone() for t in tensors]
        axis, row = (at - 1) % 2, (5, 6)[(at - 1) % 2]
        spoilt[at][:, :, row, 1] = bad
        sees = (first, second)[axis][..., row] & both
        assert sees.any() or "padding" in name
        with pyloss.backend(backend):
            # The queries that see it take no part in the loss.
            call = lambda t: _attend(t, options, masks)  # noqa: E731
            got = _gradients(call, spoilt, ~sees)
        want = _gradients(lambda t: _attend(t, options, masks), [t.to(F64) for t in tensors], ~sees)
        tolerance = dict(rtol=0, atol={F64: 1e-12, F32: 2e-5, BF16: 0.2}[dtype])
        for a, b in zip(got[:2], want[:2]):
            torch.testing.assert_close(a[~sees].to(F64), b[~sees].to(F64), **tolerance)
        if at <= 2:
            assert got[0][sees].isnan().all() and got[1][sees].isnan().all()
        else:
            assert got[0][sees][:, 1].isnan().all()
            assert got[0][sees][:, [0, 2, 3]].isfinite().all() and not got[1].isnan().any()
        if not sees.any():
            for a, b in zip(got[2], want[2]):
                assert a.isfinite().all()
                torch.testing.assert_close(a.to(F64), b, **tolerance)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("hides", ["causal", "mask"])
def test_every_order(order, hides):
    """Keys beyond the fifth, NaN in all, hidden from the first queries, which alone count."""
    tensors = _tensors(F32, HEADS, order)
    spoilt = [tensors[0], *(t.clone() for t in tensors[1:])]
    for t in spoilt[1:]:
        t[:, :, 5:] = math.nan
    options = dict(is_causal=True) if hides == "causal" else {}
    masks = (None,) * order if hides == "causal" else (_lower,) * order
    among = (torch.arange(N) < 5).expand(2, HEADS, N)
    got = _attend(spoilt, options, masks)
    plain = tensor_attention_n(
        spoilt[0], spoilt[1 : 1 + order], spoilt[1 + order :], masks=masks, **options
    )
    want = _attend([t.to(F64) for t in tensors], options, masks)
    for a, b in zip((plain, *got), (want[0], *want)):
        torch.testing.assert_close(a[:, :, :5].to(F64), b[:, :, :5].to(F64), rtol=0, atol=2e-5)
        assert a[:, :, 5:].isnan().all()
    # No query sees them: gradients of everything.
    masks = tuple(torch.arange(N) < 5 for _ in range(order))
    got = _gradients(lambda t: _attend(t, {}, masks), spoilt, among)
    want = _gradients(lambda t: _attend(t, {}, masks), [t.to(F64) for t in tensors], among)
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2])):
        torch.testing.assert_close(a.to(F64), b.to(F64), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        (dict(is_causal=True, q_offset=-2), 0, 4),
        (dict(window=2, q_offset=2), 1, 8),
        (dict(window=2, q_offset=2, is_causal=False), 1, 9),
        (dict(is_causal=True, q_offset=-7), 0, 0),
    ],
)
def test_keys_out_of_reach_of_low_rank(options, first, last, backend):
    """Six queries over nine keys; those before `first` and from `last` on are seen by none."""
    options = dict(method="lowrank", degree=2, check="none") | options
    tensors = [t / 4 for t in _tensors(F64, HEADS)]
    tensors[0] = tensors[0][:, :, :6]
    spoilt = [tensors[0], *(t.clone() for t in tensors[1:])]
    for t, bad in zip(spoilt[1:], (math.nan, math.inf, -math.inf, math.nan)):
        t[:, :, :first], t[:, :, last:] = bad, bad
    among = torch.ones(2, HEADS, 6, dtype=torch.bool)
    with pyloss.backend(backend):
        got, want = (
            _gradients(lambda t: _attend(t, options, (None, None)), given, among)
            for given in (spoilt, tensors)
        )
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2])):
        assert torch.equal(a, b)


def test_hidden_overflow():
    """Scores and gradients of scores that overflow behind a mask: the kernel's part alone, since
    the reference multiplies keys with each other first."""
    q, k1, k2, v1, v2 = tensors = _tensors(F32, HEADS)
    k1[:, :, 5], k2[:, :, 6], v1[:, :, 5], v2[:, :, 6] = 1e30, 3e38, 2e38, 1e30
    masks = (torch.arange(N) != 5, torch.arange(N) != 6)
    call = lambda t: _attend(t, {}, masks)  # noqa: E731
    everything = torch.ones(2, HEADS, N, dtype=torch.bool)
    want = _gradients(call, [t.to(F64) for t in tensors], everything)
    got = _gradients(call, tensors, everything)
    for a, b in zip((*got[:2], *got[2]), (*want[:2], *want[2])):
        torch.testing.assert_close(a.to(F64), b.to(F64), rtol=0, atol=5e-5)


def test_gradient_of_a_mask_over_hidden_nan():
    tensors = _tensors(F32, HEADS)
    tensors[4][:, :, 5:] = tensors[1][:, :, 5:] = math.nan
    hidden = (torch.arange(N) < 5).expand(1, 1, 1, N)
    bias = torch.randn(2, 1, N, N).masked_fill(~hidden, -math.inf)
    found = []
    for dtype, clean in ((F32, False), (F64, True)):
        given = [t.nan_to_num(7.0).to(dtype) if clean else t for t in tensors]
        leaf = bias.to(dtype).requires_grad_()
        out = pyloss.tensor_attention(*given, mask1=leaf, mask2=hidden)
        found.append(torch.autograd.grad(out.square().sum(), leaf)[0].to(F64))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)
    assert not found[0][..., 5:].any()


def test_mask_of_triples():
    """The reference's mask over all axes hides as well."""
    tensors = _tensors(F64, HEADS)
    spoilt = [t.clone() for t in tensors]
    spoilt[1][:, :, 5], spoilt[4][:, :, 6] = math.nan, math.inf
    mask = torch.rand(2, 1, N, N, N) < 0.5
    mask[:, :, :, 5] = mask[..., 6] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -math.inf)):
        got = reference(spoilt[0], spoilt[1:3], spoilt[3:], mask=given)
        want = reference(tensors[0], tensors[1:3], tensors[3:], mask=given)
        torch.testing.assert_close(got, want)
