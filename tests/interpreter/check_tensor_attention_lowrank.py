"""The kernels of low-rank tensor attention under Triton's interpreter, against the reference.

Tiles are 16 wide, so that small problems have several of each kind.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from pyloss.kernels.tensor_attention_lowrank import whole as K
from pyloss.ops import tensor_attention_lowrank as op
from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank as reference

SMALL = K.Config(16, 16, 4)


def problem(n_q, lengths, d, dv, heads=(1, 1), batch=1, masked=()):
    """Heads next to the features, as projections give them; some padded keys hold NaN."""
    g = torch.Generator().manual_seed(n_q + d)

    def draw(h, n, width):
        return torch.rand(batch, n, h, width, generator=g).mul(2).sub(1).transpose(1, 2)

    q = draw(heads[0], n_q, d)
    keys = [draw(heads[1], n, d) for n in lengths]
    values = [draw(heads[1], n, dv) for n in lengths]
    masks = []
    for x, (k, v) in enumerate(zip(keys, values)):
        mask = None
        if x in masked:
            mask = torch.rand(batch, 1 if x else heads[1], k.shape[2], generator=g) > 0.3
            mask[..., 0] = True
            k.masked_fill_(~mask.unsqueeze(-1), math.nan)
            v.masked_fill_(~mask.unsqueeze(-1), math.nan)
        masks.append(mask)
    return q, keys, values, masks


def coefficients(degree, d):
    return [1 / math.factorial(t) / d**t for t in range(degree + 1)]


def close(got, want, tol=2e-5):
    top = want[want.isfinite()].abs().max() if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=tol * max(top, 1e-3))


@pytest.mark.parametrize(
    "n_q, lengths, d, dv, degree, heads, masked",
    [
        (20, (17, 33), 5, 3, 2, (1, 1), ()),  # partial tiles everywhere
        (16, (16, 32), 16, 16, 2, (1, 1), ()),  # whole tiles
        (7, (9, 20), 3, 20, 3, (4, 2), (0, 1)),  # grouped heads, padded keys
        (5, (6, 4), 3, 2, 1, (2, 1), (1,)),
        (5, (6, 4), 3, 2, 0, (1, 1), ()),  # the mean of all pairs
        (9, (12,), 6, 4, 2, (2, 2), (0,)),  # order 1
        (4, (5, 6, 7), 3, 70, 2, (1, 1), ()),  # order 3, two tiles of value columns
        # several running sums, two splits
        pytest.param(3, (2100, 5), 1, 3, 2, (1, 1), (0,), marks=pytest.mark.exhaustive),
    ],
)
def test_equals_the_reference(n_q, lengths, d, dv, degree, heads, masked):
    q, keys, values, masks = problem(n_q, lengths, d, dv, heads, 1 if d > 4 else 2, masked)
    c = coefficients(degree, d)
    out, lse, y, states = K.tensor_attention_lowrank_fwd(
        q, keys, values, masks, c, 0.25, SMALL, SMALL
    )

    def clean(tensors):  # what the reference differentiates must not be NaN
        return [t.double().nan_to_num(0.0) for t in tensors]

    wide = [q.double(), clean(keys), clean(values)]
    expected = reference(*wide, coefficients=c, centre=0.25, key_masks=masks)
    for got, want in zip((out, lse, y, *states), (*expected[:3], *expected[3])):
        close(got, want)
    g = torch.Generator().manual_seed(1)
    dout, dlse = torch.randn(out.shape, generator=g), torch.randn(lse.shape, generator=g)
    for cotangent in (dlse, None) if d < 4 else (dlse,):
        got = K.tensor_attention_lowrank_bwd(
            dout, cotangent, q, keys, values, masks, out, y, states, c, SMALL, SMALL
        )
        leaves = [t.requires_grad_() for t in (wide[0].clone(), *wide[1], *wide[2])]
        m = len(keys)
        found = reference(
            leaves[0], leaves[1 : m + 1], leaves[m + 1 :], coefficients=c, key_masks=masks
        )[:2]
        total = (found[0] * dout).sum()
        if cotangent is not None:
            total = total + (found[1] * dlse).sum()
        want = torch.autograd.grad(total, leaves, materialize_grads=True)
        for a, b in zip((got[0], *got[1], *got[2]), want):
            assert a.is_contiguous()
            close(a, b, 1e-4)
        wide = [wide[0], [t.detach() for t in wide[1]], [t.detach() for t in wide[2]]]


def settings(degree, d, causal=False, windows=(0, 0)):
    return op.Settings(tuple(coefficients(degree, d)), 0.0, causal, windows, 0)


def test_a_query_that_sees_nothing():
    q, keys, values, _ = problem(6, (5, 7), 4, 3, (2, 1), 2)
    mask = torch.ones(2, 1, 5, dtype=torch.bool)
    mask[1] = False
    arguments = (q, keys, values, [mask, None], *settings(2, 4))
    out, lse, y, states = op.triton.forward(*arguments)
    expected = op.reference.forward(*arguments)
    close(out[0], expected[0][0])
    assert torch.equal(out[1], torch.zeros_like(out[1])) and bool((lse[1] == -math.inf).all())
    found = op.triton.backward(torch.ones_like(out), lse * 0 + 1, *arguments[:4], out, y, states,
                                *settings(2, 4))  # fmt: skip
    assert all(bool((g[1] == 0).all()) for g in (found[0], *found[1], *found[2]))


@pytest.mark.parametrize("lengths", [(0, (5, 6)), (4, (0, 6)), (4, (5, 0))])
def test_empty_axes(lengths):
    q, keys, values, masks = problem(*lengths, 4, 3)
    arguments = (q, keys, values, masks)
    out, lse, y, states = op.triton.forward(*arguments, *settings(2, 4))
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())
    found = op.triton.backward(out, None, *arguments, out, y, states, *settings(2, 4))
    for g, t in zip((found[0], *found[1], *found[2]), (q, *keys, *values)):
        assert torch.equal(g, torch.zeros_like(t))


def test_what_the_kernels_do_not_take_runs_on_the_reference():
    q, keys, values, masks = problem(6, (6, 6), 4, 3)
    doubles = (q.double(), [k.double() for k in keys], [v.double() for v in values], masks)
    for arguments, s in (
        (doubles, settings(2, 4)),
        ((q, keys, values, masks), settings(2, 4, True)),
        ((q, keys, values, masks), settings(2, 4, True, (3, 2))),
    ):
        for got, want in zip(
            op.triton.forward(*arguments, *s)[:3], op.reference.forward(*arguments, *s)[:3]
        ):
            close(got, want)
