"""The kernels of causal and windowed low-rank tensor attention under Triton's interpreter.

Chunks, anchors and tiles are small, so that small problems have several of each kind.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from check_tensor_attention_lowrank import SMALL, close, coefficients, problem

from pyloss.kernels import _tensor_attention_lowrank_plan as plan
from pyloss.kernels.tensor_attention_lowrank import scan as K
from pyloss.ops import tensor_attention_lowrank as op
from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank as reference

CONFIG = K.Config(num_warps=1, block_t=4)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(plan, "SUMMED", 8)
    monkeypatch.setattr(K, "_PROGRAMS", 4)  # programs with several tiles of features


def forward(q, keys, values, masks, c, offset, windows=None, causal=True):
    windows = windows or (0,) * len(keys)
    return K.tensor_attention_lowrank_scan_fwd(
        q, keys, values, masks, c, 0.25, causal, windows, offset, CONFIG, SMALL
    )


def backward(dout, dlse, q, keys, values, masks, out, y, c, offset, windows=None, causal=True):
    windows = windows or (0,) * len(keys)
    return K.tensor_attention_lowrank_scan_bwd(
        dout, dlse, q, keys, values, masks, out, y, c, causal, windows, offset, CONFIG, CONFIG,
        SMALL, SMALL,
    )  # fmt: skip


def clean(tensors):  # what the reference differentiates must not be NaN
    return [t.double().nan_to_num(0.0) for t in tensors]


@pytest.mark.parametrize(
    "n_q, lengths, offset, d, dv, degree, heads, masked",
    [
        (21, (21, 21), 0, 4, 3, 2, (1, 1), ()),  # three chunks, partial tiles
        (16, (16, 16), 0, 2, 16, 3, (4, 2), ()),  # whole chunks, grouped heads
        (11, (11, 11), 0, 3, 20, 2, (2, 1), (0, 1)),  # padded keys
        (9, (20, 20), 11, 3, 2, 2, (2, 2), (1,)),  # keys that every query sees
        (12, (9, 17), 3, 3, 2, 1, (1, 1), ()),  # keys that end before the queries, or after
        (4, (5, 3), 6, 3, 2, 2, (2, 1), (1,)),  # every query sees every key
        (12, (5, 6), -4, 3, 2, 2, (2, 1), (0,)),  # queries before the first key
        (9, (9,), 0, 5, 4, 2, (1, 1), ()),  # order 1
        (6, (6, 6, 6), 0, 2, 3, 2, (1, 1), ()),  # order 3
        (9, (9, 9), 0, 3, 2, 0, (1, 1), ()),  # means
    ],
)
def test_causal_equals_the_reference(n_q, lengths, offset, d, dv, degree, heads, masked):
    check(n_q, lengths, offset, d, dv, degree, heads, masked)


@pytest.mark.parametrize(
    "n_q, lengths, offset, causal, windows, heads, masked",
    [
        (21, (21, 21), 0, True, (3, 7), (2, 1), ()),
        (21, (21, 21), 0, True, (13, 0), (1, 1), (0, 1)),  # one axis without; padded keys
        (17, (17, 17), 0, False, (4, 0), (2, 2), ()),  # one axis that every query sees
        (17, (17, 17), 0, False, (2, 5), (1, 1), (1,)),  # chunks of 16: 9 keys in sight
        (9, (20, 20), 11, True, (4, 12), (1, 1), ()),  # windows that begin before the queries
        (12, (9, 6), 5, True, (5, 3), (1, 1), (1,)),  # and queries that see nothing at the end
        (12, (5, 8), -4, False, (6, 3), (1, 1), ()),  # or at the beginning
        (10, (10, 10), 0, True, (1, 1), (1, 1), ()),
        (10, (10, 10), 0, True, (100, 10), (1, 1), ()),  # windows without an effect
        (10, (10,), 0, True, (3,), (1, 1), ()),  # order 1
    ],
)
def test_windows_equal_the_reference(n_q, lengths, offset, causal, windows, heads, masked):
    check(n_q, lengths, offset, 3, 2, 2, heads, masked, windows, causal)


def check(n_q, lengths, offset, d, dv, degree, heads, masked, windows=None, causal=True):
    q, keys, values, masks = problem(n_q, lengths, d, dv, heads, 2 if n_q in (6, 12) else 1, masked)
    c = coefficients(degree, d)
    band = {"coefficients": c, "key_masks": masks, "causal": causal, "q_offset": offset}
    band["windows"] = windows
    wide = [q.double(), clean(keys), clean(values)]
    expected = reference(*wide, centre=0.25, **band)
    out, lse, y = forward(q, keys, values, masks, c, offset, windows, causal)
    for got, want in zip((out, lse, y), expected[:3]):
        assert torch.equal(got.isfinite(), want.isfinite())
        close(got, want)
    g = torch.Generator().manual_seed(1)
    dout, dlse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    seen = expected[1].isfinite()
    for cotangent in (dlse, None) if offset > 5 else (dlse,):
        got = backward(dout, cotangent, q, keys, values, masks, out, y, c, offset, windows, causal)
        leaves = [t.requires_grad_() for t in (wide[0].clone(), *wide[1], *wide[2])]
        m = len(keys)
        found = reference(leaves[0], leaves[1 : m + 1], leaves[m + 1 :], **band)[:2]
        total = (found[0] * dout).sum()
        if cotangent is not None:
            total = total + (found[1][seen] * dlse[seen]).sum()
        want = torch.autograd.grad(total, leaves, materialize_grads=True)
        for a, b in zip((got[0], *got[1], *got[2]), want):
            assert a.is_contiguous()
            close(a, b, 1e-4)
        wide = [wide[0], [t.detach() for t in wide[1]], [t.detach() for t in wide[2]]]


def test_longer_chunks_where_states_are_large(monkeypatch):
    q, keys, values, masks = problem(20, (20, 20), 3, 2)
    c = coefficients(2, 3)
    state_bytes = 2 * 10 * 3 * 4
    assert plan.chunk_length(20, state_bytes) == 8
    expected = forward(q, keys, values, masks, c, 0)
    monkeypatch.setattr(plan, "STATE_BYTES", 2 * state_bytes)
    assert plan.chunk_length(20, state_bytes) == 16
    for got, want in zip(forward(q, keys, values, masks, c, 0), expected):
        close(got, want)


def test_chunks_are_as_long_as_windows():
    assert [plan.chunk_length(100, 1, span) for span in (0, 8, 9, 50)] == [8, 8, 16, 56]


def test_repeats_its_bits_and_ignores_later_keys():
    q, keys, values, masks = problem(20, (20, 20), 3, 2)
    c = coefficients(2, 3)
    first = forward(q, keys, values, masks, c, 0)
    for t in (*keys, *values):
        t[:, :, 13:] = math.nan
    again = forward(q, keys, values, masks, c, 0)
    for a, b in zip(first, again):
        assert torch.equal(a[:, :, :13], b[:, :, :13])
        assert bool(b[:, :, 13:].isnan().all())


@pytest.mark.parametrize("n_q, lengths", [(0, (5, 6)), (4, (0, 6)), (4, (5, 0))])
def test_empty(n_q, lengths):
    q, keys, values, masks = problem(n_q, lengths, 4, 3)
    c = coefficients(2, 4)
    out, lse, y = forward(q, keys, values, masks, c, 2)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())
    found = backward(out, lse, q, keys, values, masks, out, y, c, 2)
    for g, t in zip((found[0], *found[1], *found[2]), (q, *keys, *values)):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("causal, windows", [(True, (0, 0)), (False, (2, 3))])
def test_the_op_runs_them(causal, windows):
    q, keys, values, masks = problem(6, (6, 6), 4, 3)
    settings = op.Settings(tuple(coefficients(2, 4)), 0.0, causal, windows, 0)
    arguments = (q, keys, values, masks)
    got, want = (f(*arguments, *settings) for f in (op.triton.forward, op.reference.forward))
    assert got[3] == [] == want[3]
    for a, b in zip(got[:3], want[:3]):
        close(a, b)
    dout = torch.ones_like(got[0])
    got, want = (
        f(dout, None, *arguments, *got[::2][:2], [], *settings)
        for f in (op.triton.backward, op.reference.backward)
    )
    for a, b in zip((got[0], *got[1], *got[2]), (want[0], *want[1], *want[2])):
        close(a, b, 1e-4)


@pytest.mark.parametrize(
    "at_once", [pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2, 4)]
)
def test_groups_of_heads(monkeypatch, at_once):
    """Whatever fits the scratch at once: one key head, those of a batch, several batches."""
    q, keys, values, masks = problem(9, (9, 9), 3, 2, (4, 2), 2, (0, 1))
    c = coefficients(2, 3)
    out, lse, y = forward(q, keys, values, masks, c, 0, (3, 5))
    arguments = (torch.ones_like(out), lse * 0 + 1, q, keys, values, masks, out, y, c, 0, (3, 5))
    expected = backward(*arguments)
    head = sum(K._scratch(q, keys, values, 4, CONFIG))
    monkeypatch.setattr(plan, "STATE_BYTES", 0)
    monkeypatch.setattr(K, "SCRATCH_BYTES", 2 * head * at_once)
    groups = list(K._groups(q, keys, values, 4, CONFIG))
    assert len(groups) == 4 // at_once
    monkeypatch.undo()
    monkeypatch.setattr(plan, "SUMMED", 8)
    monkeypatch.setattr(K, "_groups", lambda *args: groups)
    found = backward(*arguments)
    for got, want in zip(
        (found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2])
    ):
        close(got, want)
