"""Tensor attention: the reference against closed forms, the op against the reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tensor_attention_cases import (
    BF16,
    F16,
    F32,
    F64,
    Problem,
    check,
    decibels,
    largest_error,
    with_gradients,
)

import pyloss
from pyloss.functional import tensor_attention_n
from pyloss.reference import tensor_attention as reference

# --- the reference -------------------------------------------------------------------------------


def _sets(order, n=5, d=3, dv=2, heads=2, kv_heads=1, n_q=4):
    q = torch.randn(1, heads, n_q, d, dtype=F64)
    keys = [torch.randn(1, kv_heads, n + x, d, dtype=F64) for x in range(order)]
    values = [torch.randn(1, kv_heads, n + x, dv, dtype=F64) for x in range(order)]
    return q, keys, values


def test_reference_by_loops():
    q, (k1, k2), (v1, v2) = _sets(2)
    b1, b2 = torch.randn(1, 2, 4, 5, dtype=F64), torch.randn(1, 1, 1, 6, dtype=F64)
    out, lse = reference(q, (k1, k2), (v1, v2), masks=(b1, b2), scale=0.7, kv_bias=(0.3, 0.9))
    for h in range(2):
        for i in range(4):
            scores, values = [], []
            for j in range(5):
                for k in range(6):
                    s = 0.7 * (q[0, h, i] * k1[0, 0, j] * (k2[0, 0, k] + 0.3)).sum()
                    scores.append(s + b1[0, h, i, j] + b2[0, 0, 0, k])
                    values.append(v1[0, 0, j] * (v2[0, 0, k] + 0.9))
            p = torch.softmax(torch.stack(scores), 0)
            want = (p.unsqueeze(1) * torch.stack(values)).sum(0)
            torch.testing.assert_close(out[0, h, i], want)
            torch.testing.assert_close(lse[0, h, i], torch.stack(scores).logsumexp(0))


def test_reference_masks_by_loops():
    n = 6
    for causal, windows, offset in (
        (True, None, 0),
        (True, (2, 4), 0),
        (False, (2, 4), 0),
        (True, (3, None), 1),
        (True, None, -2),
    ):
        q, keys, values = _sets(2, n=n, n_q=n, kv_heads=2)
        keys[1], values[1] = keys[1][:, :, :n], values[1][:, :, :n]
        _, lse = reference(
            q, keys, values, causal=causal, windows=windows, q_offset=offset, scale=0.0
        )
        for i in range(n):
            p, count = i + offset, 1
            for x in range(2):
                w = windows[x] if windows else None
                seen = [
                    j
                    for j in range(n)
                    if (not causal or j <= p)
                    and (w is None or (p - w < j if causal else abs(p - j) < w))
                ]
                count *= len(seen)
            # Scores of 0: the logsumexp counts the pairs.
            want = math.log(count) if count else -math.inf
            assert lse[0, 0, i].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_reference_gradcheck(order):
    q, keys, values = _sets(order, n=3 if order == 3 else 4, n_q=3)
    keep = torch.ones(1, 1, 3, keys[0].shape[2], dtype=torch.bool)
    keep[0, 0, 1] = False  # a query without any key
    masks = [keep, *(torch.randn(1, 2, 3, k.shape[2], dtype=F64) for k in keys[1:])]

    def run(q, *others):
        k, v, m = others[:order], others[order : 2 * order], others[2 * order :]
        out, lse = reference(q, k, v, masks=(keep, *m), kv_bias=(0.1, 0.2))
        return out, torch.where(lse == -math.inf, 0.0, lse)

    inputs = [t.requires_grad_() for t in (q, *keys, *values, *masks[1:])]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.equal(run(*inputs)[0][:, :, 1], torch.zeros(1, 2, 2, dtype=F64))


def test_reference_of_order_1_is_attention():
    q, k, v = torch.randn(3, 2, 4, 6, 5, dtype=F64)
    mask = torch.randn(6, 6, dtype=F64)
    out, _ = reference(q, (k,), (v,), masks=(mask[None, None],))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    out, _ = reference(q, (k,), (v,), causal=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_reference_takes_a_mask_of_triples():
    q, keys, values = _sets(2, kv_heads=2)
    mask = torch.rand(4, 5, 6) < 0.5
    out, lse = reference(q, keys, values, mask=mask)
    bias = torch.zeros(4, 5, 6, dtype=F64).masked_fill(~mask, -math.inf)
    for a, b in zip((out, lse), reference(q, keys, values, mask=bias)):
        torch.testing.assert_close(a, b)
    separable = torch.rand(4, 5) < 0.6
    out, _ = reference(q, keys, values, mask=separable.unsqueeze(-1))
    want, _ = reference(q, keys, values, masks=(separable[None, None], None))
    torch.testing.assert_close(out, want)


def test_reference_refuses_a_large_cube():
    q = torch.empty((), device="meta").expand(1, 1, 2000, 4)
    with pytest.raises(ValueError, match="exact"):
        reference(q, (q, q), (q, q))


# --- kernel against reference --------------------------------------------------------------------

PROBLEMS = {
    "plain": Problem(5, 6, 7, 4, 3),
    "batch": Problem(17, 13, 33, 5, 6, batch=2),
    "grouped": Problem(9, 8, 7, heads=4, kv_heads=2, batch=2),
    "one_kv_head": Problem(9, 8, 7, heads=3, kv_heads=1, causal=True, q_offset=1),
    "one_key": Problem(5, 1, 1, 1, 1),
    "one_query": Problem(1, 40, 35, 8, 8),
    "bias": Problem(6, 7, 8, kv_bias=(0.25, 1.0)),
    "scale": Problem(scale=-0.3),
    "causal": Problem(20, 20, 20, causal=True),
    "causal_offset": Problem(20, 33, 30, causal=True, q_offset=9),
    "causal_before_the_first_key": Problem(20, 9, 12, causal=True, q_offset=-6),
    "window": Problem(40, 40, 40, 8, 8, window=(3, 11), causal=None),
    "window_swapped": Problem(40, 40, 40, 8, 8, window=(11, 3), causal=True),
    "window_one_axis": Problem(30, 30, 30, window=(None, 5), causal=True),
    "window_of_one": Problem(30, 30, 30, window=(1, 1), causal=True),
    "window_too_large": Problem(12, 12, 12, window=(50, 13), causal=True),
    "window_both_sides": Problem(40, 40, 40, window=(4, 7), causal=False),
    "window_offset": Problem(40, 50, 30, window=(4, 7), causal=True, q_offset=5),
    "window_past_the_end": Problem(40, 20, 30, window=(4, 7), causal=True, q_offset=8),
    "masks": Problem(20, 21, 22, batch=2, masks=("float full", "float full")),
    "masks_padding": Problem(20, 21, 22, batch=2, masks=("bool padding", "bool padding")),
    "masks_mixed": Problem(20, 21, 22, batch=2, masks=("bool shared", "float padding")),
    "mask_one": Problem(20, 21, 22, masks=(None, "float bare")),
    "mask_other": Problem(20, 21, 22, masks=("float bare", None)),
    "masks_causal": Problem(
        20, 20, 20, masks=("float shared", "bool full"), causal=True, window=(9, 15)
    ),
    "masks_grouped": Problem(
        9, 8, 7, heads=4, kv_heads=2, batch=2, masks=("float full", "float padding")
    ),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_reference(name, dtype):
    check(PROBLEMS[name], dtype)


@pytest.mark.parametrize("n", [1, 2, 17, 63, 64, 65, 130])
def test_lengths(n):
    check(Problem(n, n, n, 16, 16, heads=1, kv_heads=1), F32)
    check(Problem(3, n, 7, 8, 24, heads=1, kv_heads=1), F32)
    check(Problem(3, 7, n, 24, 8, heads=1, kv_heads=1), F32)
    check(Problem(n, n, n, 8, 8, heads=1, kv_heads=1, causal=True, window=(7, 40)), F32)


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (3, 17), (15, 16), (16, 33), (31, 32), (64, 128)])
def test_features(d, dv):
    check(Problem(19, 18, 35, d, dv), F32)
    check(Problem(19, 18, 35, d, dv), F64)


def test_many_columns():
    """More keys than one block of columns, forward (256) and backward (192)."""
    check(Problem(30, 40, 600, 16, 16, heads=1, kv_heads=1), F32)
    check(Problem(60, 210, 270, 4, 4, heads=1, kv_heads=1, causal=True, q_offset=200), F32)
    check(Problem(220, 220, 220, 4, 4, 1, 1, 1, causal=True, window=(20, 200)), F32)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["batch", "grouped", "window", "masks_mixed", "bias"])
def test_half_types(name, dtype):
    check(PROBLEMS[name], dtype)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (32, 64), "causal": True}])
def test_half_types_in_decibels(options):
    problem = Problem(128, 128, 128, 64, 64, std=0.5, heads=1, kv_heads=1, **options)
    tensors = problem.tensors(BF16)
    out, lse, grads = with_gradients(problem.call, tensors, (None, None))
    exact, exact_lse, want = with_gradients(
        problem.expected, [t.double() for t in tensors], (None, None)
    )
    assert decibels(out, exact) >= 40
    assert min(decibels(a, b) for a, b in zip(grads, want)) >= 35
    assert (lse - exact_lse).abs().max() <= 1e-3


def _strided(t):
    """The same values with padding between the rows, heads moved, nothing aligned."""
    wide = t.new_full((t.shape[0], t.shape[2], t.shape[1], t.shape[3] + 3), math.nan)
    wide[..., 1 : 1 + t.shape[3]] = t.transpose(1, 2)
    return wide[..., 1 : 1 + t.shape[3]].transpose(1, 2)


def test_layouts():
    problem = Problem(20, 21, 22, 8, 8, batch=2, masks=("float full", "bool full"))
    tensors, masks = problem.tensors(F32), problem.drawn_masks(F32)
    want = with_gradients(problem.call, tensors, masks)
    moved = [m.transpose(2, 3).contiguous().transpose(2, 3) for m in masks]
    got = with_gradients(problem.call, [_strided(t) for t in tensors], moved)
    every_second = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    other = with_gradients(problem.call, every_second, masks)
    for a, b, c in zip((*want[:2], *want[2]), (*got[:2], *got[2]), (*other[:2], *other[2])):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_expanded_keys():
    problem = Problem(9, 9, 9, 4, 4, batch=3)
    q, *rest = problem.tensors(F32)
    one = [t[:1] for t in rest]
    want = pyloss.tensor_attention(q, *(t.repeat(3, 1, 1, 1) for t in one))
    assert torch.equal(pyloss.tensor_attention(q, *(t.expand(3, -1, -1, -1) for t in one)), want)


@pytest.mark.parametrize("name", ["grouped", "window", "masks", "masks_mixed", "window_both_sides"])
def test_gradcheck(name):
    problem = PROBLEMS[name]
    small = Problem(
        **{
            **problem.__dict__,
            "n_q": 4,
            "n_1": 4,
            "n_2": 4 if problem.window else 5,
            "d": 3,
            "dv": 2,
            "window": (2, 3) if problem.window else None,
        }
    )
    masks = small.drawn_masks(F64)
    floating = [m for m in masks if m is not None and m.is_floating_point()]

    def run(*inputs):
        given = iter(inputs[5:])
        ms = [next(given) if m is not None and m.is_floating_point() else m for m in masks]
        out, lse = small.call(inputs[:5], ms)
        return out, torch.where(lse == -math.inf, 0.0, lse)

    inputs = [t.requires_grad_() for t in (*small.tensors(F64), *floating)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    """What is frozen costs nothing, and changes nothing."""
    problem = PROBLEMS["grouped"]
    _, _, all_of_them = with_gradients(problem.call, problem.tensors(F32), (None, None))
    tensors = problem.tensors(F32)
    tensors[wanted].requires_grad_()
    out, lse = problem.call(tensors, (None, None))
    g = torch.Generator().manual_seed(2)
    dout = torch.randn(out.shape, generator=g, dtype=F64).float()
    dlse = torch.randn(lse.shape, generator=g, dtype=F64).float()
    (grad,) = torch.autograd.grad((out, lse), tensors[wanted : wanted + 1], (dout, dlse))
    torch.testing.assert_close(grad, all_of_them[wanted], rtol=1e-5, atol=1e-6)


def test_a_mask_s_gradient_alone():
    problem = Problem(9, 9, 9, masks=("float full", "float padding"))
    tensors, masks = problem.tensors(F64), problem.drawn_masks(F64)
    _, _, want = with_gradients(problem.call, tensors, masks)
    _, _, got = with_gradients(
        lambda t, m: problem.call([x.detach() for x in t], m), tensors, masks
    )
    for a, b in zip(got[5:], want[5:]):
        torch.testing.assert_close(a, b)


# --- invariants ----------------------------------------------------------------------------------


def _draw(n=23, d=8, heads=2, count=5):
    return [torch.randn(1, heads, n, d, dtype=F64) for _ in range(count)]


def _close(a, b, tolerance=1e-12):
    assert largest_error(a, b) <= tolerance


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (5, 9)}])
def test_the_axes_may_be_exchanged(options):
    q, k1, k2, v1, v2 = _draw()
    other = dict(options)
    if "window" in other:
        other["window"] = other["window"][::-1]
    m1, m2 = torch.randn(2, 23, 23, dtype=F64)
    a = pyloss.tensor_attention(q, k1, k2, v1, v2, mask1=m1, mask2=m2, **options)
    b = pyloss.tensor_attention(q, k2, k1, v2, v1, mask1=m2, mask2=m1, **other)
    _close(a, b)


def test_order_of_keys_does_not_matter():
    q, k1, k2, v1, v2 = _draw()
    p1, p2 = torch.randperm(23), torch.randperm(23)
    got = pyloss.tensor_attention(q, k1[:, :, p1], k2[:, :, p2], v1[:, :, p1], v2[:, :, p2])
    _close(got, pyloss.tensor_attention(q, k1, k2, v1, v2))


@pytest.mark.parametrize("causal", [False, True])
def test_ones_on_one_axis_give_plain_attention(causal):
    q, k, _, v, _ = _draw()
    one = torch.ones_like(k)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out, lse = pyloss.tensor_attention(q, k, one, v, one, is_causal=causal, return_lse=True)
    _close(out, want)
    zero = torch.zeros_like(k)
    biased = pyloss.tensor_attention(q, k, zero, v, zero, is_causal=causal, kv_bias=(1.0, 1.0))
    _close(biased, want)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / 8**0.5
    count = torch.full((23,), 23.0, dtype=F64)
    if causal:
        scores = scores.masked_fill(~torch.ones(23, 23, dtype=torch.bool).tril(), -math.inf)
        count = torch.arange(1, 24, dtype=F64)
    _close(lse, scores.logsumexp(-1) + count.log())


def test_scaling_and_shifting():
    q, k1, k2, v1, v2 = _draw()
    out, lse = pyloss.tensor_attention(q, k1, k2, v1, v2, return_lse=True)
    _close(pyloss.tensor_attention(q, k1, k2, 3 * v1, v2), 3 * out)
    shifted = torch.full((1, 1, 23, 1), 2.5, dtype=F64)
    same, moved = pyloss.tensor_attention(q, k1, k2, v1, v2, mask1=shifted, return_lse=True)
    _close(same, out)
    _close(moved, lse + 2.5)
    halved = pyloss.tensor_attention(q, k1, k2, v1, v2, scale="kronecker")
    _close(pyloss.tensor_attention(q * 8**0.5, k1, k2, v1, v2, scale=1 / 8), out)
    _close(pyloss.tensor_attention(q, k1, k2, v1, v2, scale=0.125), halved)


def test_a_wide_window_is_causal():
    tensors = _draw()
    want = pyloss.tensor_attention(*tensors, is_causal=True)
    for window in ((23, 23), (100, 23), 40, (None, 60), (-1, 23)):
        _close(pyloss.tensor_attention(*tensors, window=window), want)
    both = pyloss.tensor_attention(*tensors, window=23, is_causal=False)
    _close(both, pyloss.tensor_attention(*tensors))


def test_queries_by_chunks():
    q, *rest = _draw()
    want = pyloss.tensor_attention(q, *rest, window=(4, 9))
    parts = [
        pyloss.tensor_attention(q[:, :, at : at + 5], *rest, window=(4, 9), q_offset=at)
        for at in range(0, 23, 5)
    ]
    _close(torch.cat(parts, 2), want)


def test_attn_mask_holds_for_both_axes():
    tensors = _draw()
    keep = torch.rand(23, 23) < 0.8
    got = pyloss.tensor_attention(*tensors, attn_mask=keep)
    _close(got, pyloss.tensor_attention(*tensors, mask1=keep, mask2=keep))
    bias = torch.randn(23, 23, dtype=F64)
    got = pyloss.tensor_attention(*tensors, attn_mask=keep, mask2=bias)
    both = bias.masked_fill(~keep, -math.inf)
    _close(got, pyloss.tensor_attention(*tensors, mask1=keep, mask2=both))
    causal = torch.ones(23, 23, dtype=torch.bool).tril()
    got = pyloss.tensor_attention(*tensors, attn_mask=causal)
    _close(got, pyloss.tensor_attention(*tensors, is_causal=True))


def test_determinant_form():
    q, k1, k2, v1, v2 = _draw(n=7, d=6)
    out, lse = pyloss.tensor_attention(
        q, k1, k2, v1, v2, form="determinant", scale=0.4, kv_bias=(0.5, 0.25), return_lse=True
    )
    rows = [t.unflatten(-1, (2, 3)) for t in (q, k1, k2 + 0.5)]
    shape = (1, 2, 7, 7, 7, 2, 3)
    a = rows[0][:, :, :, None, None].expand(shape)
    b = rows[1][:, :, None, :, None].expand(shape)
    c = rows[2][:, :, None, None].expand(shape)
    scores = 0.4 * torch.linalg.det(torch.stack([a, b, c], -2)).sum(-1)
    p = scores.flatten(3).softmax(-1).view_as(scores)
    _close(out, torch.einsum("bhijk,bhjc,bhkc->bhic", p, v1, v2 + 0.25), 1e-11)
    _close(lse, scores.flatten(3).logsumexp(-1), 1e-11)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=F64))
    turn = turn * torch.linalg.det(turn)  # a rotation
    turned = [(t.unflatten(-1, (2, 3)) @ turn).flatten(-2) for t in (q, k1, k2)]
    _close(
        pyloss.tensor_attention(*turned, v1, v2, form="determinant"),
        pyloss.tensor_attention(q, k1, k2, v1, v2, form="determinant"),
    )


# --- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_rows_without_a_pair(dtype):
    problem = Problem(6, 6, 6, batch=2)
    tensors = [t.requires_grad_() for t in problem.tensors(dtype)]
    keep1 = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    keep2 = keep1.clone()
    keep1[0, 0, 2] = False  # no key of the first axis
    keep2[1, 0, 4] = False  # none of the second
    out, lse = problem.call(tensors, (keep1, keep2))
    empty = torch.zeros(2, 2, 6, dtype=torch.bool)
    empty[0, :, 2] = empty[1, :, 4] = True
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    assert torch.equal(lse == -math.inf, empty)
    dlse = torch.ones_like(lse)
    grads = torch.autograd.grad((out, lse), tensors, (torch.ones_like(out), dlse))
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][empty], torch.zeros_like(grads[0][empty]))


def test_left_padding():
    """The first keys padded, and the queries there too, as in batched generation."""
    problem = Problem(12, 12, 12, causal=True)
    tensors = problem.tensors(F32)
    keep = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    keep[..., :5] = False
    out, lse, grads = with_gradients(problem.call, tensors, (keep, keep))
    assert not out.isnan().any() and torch.equal(out[:, :, :5], torch.zeros_like(out[:, :, :5]))
    short = Problem(7, 7, 7, causal=True)
    want, _ = short.call([t[:, :, 5:] for t in tensors], (None, None))
    torch.testing.assert_close(out[:, :, 5:], want)
    assert all(g.isfinite().all() for g in grads)
    assert all(torch.equal(g[:, :, :5], torch.zeros_like(g[:, :, :5])) for g in grads)


def test_everything_masked():
    problem = Problem(6, 6, 6)
    none = torch.zeros(6, 6, dtype=torch.bool)
    out, lse, grads = with_gradients(problem.call, problem.tensors(F32), (none, none))
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_infinite_biases(dtype):
    problem = Problem(9, 8, 7)
    bias = torch.randn(2, 9, 8, dtype=dtype)
    bias[torch.rand(2, 9, 8) < 0.3] = -math.inf
    bias[0, 3] = -math.inf
    tensors = problem.tensors(dtype)
    got = with_gradients(problem.call, tensors, (bias, None))
    want = with_gradients(problem.call, tensors, (bias > -math.inf, None))
    keep = bias > -math.inf
    finite = with_gradients(
        lambda t, m: problem.call(t, (m[0].masked_fill(~keep, -math.inf), None)),
        tensors,
        (bias.masked_fill(~keep, 0.0), None),
    )
    assert torch.equal(got[1] == -math.inf, want[1] == -math.inf)
    for a, b in zip((got[0], *got[2]), (finite[0], *finite[2])):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_large_scores(dtype):
    """Scores up to 1e4: a softmax that is nearly a maximum."""
    problem = Problem(9, 9, 40, 16, 16, scale=400.0)
    tensors = problem.tensors(dtype)
    scores = 400 * torch.einsum("bhil,bhjl,bhkl->bhijk", *(t.double() for t in tensors[:3]))
    assert scores.abs().max() > 1e4
    out, lse, grads = with_gradients(problem.call, tensors, (None, None))
    assert all(t.isfinite().all() for t in (out, lse, *grads))
    want, want_lse = problem.expected([t.double() for t in tensors], (None, None))
    # A score of 1e4 has an ulp of 1e-3 in float32, and the softmax feels it.
    _close(out, want, 1e-11 if dtype == F64 else 2e-2)
    _close(lse, want_lse, 1e-12 if dtype == F64 else 1e-6)
    negative = Problem(9, 9, 40, 16, 16, scale=400.0)
    tensors[0] = torch.full_like(tensors[0], -1.0)
    tensors[1], tensors[2] = tensors[1].abs(), tensors[2].abs()  # all scores far below 0
    out, lse = negative.call(tensors, (None, None))
    want, want_lse = negative.expected([t.double() for t in tensors], (None, None))
    assert want_lse.max() < -500
    _close(lse, want_lse, 1e-12 if dtype == F64 else 1e-6)
    assert out.isfinite().all() and out.abs().max() > 1e-3


def test_nan_and_infinity():
    problem = Problem(6, 6, 6)
    tensors = problem.tensors(F32)
    tensors[0][0, 0, 2, 1] = math.nan
    out, lse = problem.call(tensors, (None, None))
    assert out[0, 0, 2].isnan().all() and lse[0, 0, 2].isnan()
    assert not out[0, 1].isnan().any() and not out[0, 0, 3].isnan().any()
    tensors = problem.tensors(F32)
    tensors[4][0, 0, 2, 1] = math.nan  # a value: one feature
    out, lse = problem.call(tensors, (None, None))
    assert out[0, 0, :, 1].isnan().all() and not out[0, 0, :, 0].isnan().any()
    assert lse.isfinite().all()
    tensors = problem.tensors(F32)
    tensors[1][0, 0, 4] = math.nan  # a key that causality hides from the first queries
    out, _ = Problem(6, 6, 6, causal=True).call(tensors, (None, None))
    assert out[0, 0, 4:].isnan().all() and not out[0, 0, :4].isnan().any()
    tensors = problem.tensors(F32)
    tensors[0][0, 0, 1] = math.inf
    out, lse = problem.call(tensors, (None, None))
    assert out[0, 0, 1].isnan().all() and not out[0, 0, 0].isnan().any()


@pytest.mark.parametrize("sizes", [(0, 5, 6), (4, 0, 6), (4, 5, 0), (0, 0, 0)])
def test_empty_axes(sizes):
    problem = Problem(*sizes)
    out, lse, grads = with_gradients(problem.call, problem.tensors(F32), (None, None))
    assert out.shape == (1, 2, sizes[0], 4) and lse.shape == (1, 2, sizes[0])
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())
    for g, t in zip(grads, problem.tensors(F32)):
        assert torch.equal(g, torch.zeros_like(t))


def test_empty_batch_and_no_value_features():
    assert pyloss.tensor_attention(*(torch.randn(0, 2, 4, 3) for _ in range(5))).shape == (
        0,
        2,
        4,
        3,
    )
    problem = Problem(4, 5, 6, 3, 0)
    out, lse, grads = with_gradients(problem.call, problem.tensors(F64), (None, None))
    assert out.shape == (1, 2, 4, 0)
    want = with_gradients(problem.expected, problem.tensors(F64), (None, None))
    for a, b in zip((lse, *grads), (want[1], *want[2])):
        torch.testing.assert_close(a, b)


# --- determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        Problem(70, 65, 80, 16, 16, heads=4, kv_heads=2),
        Problem(200, 200, 200, 8, 8, heads=1, kv_heads=1, causal=True, window=(9, 33)),
        Problem(40, 40, 40, 8, 8, masks=("float full", "float padding")),
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_thread_count_does_not_matter(problem, dtype, keep_num_threads):
    tensors, masks = problem.tensors(dtype), problem.drawn_masks(F32)

    def run():
        out, lse, grads = with_gradients(problem.call, tensors, masks)
        return out, lse, *grads

    torch.set_num_threads(1)
    want = run()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for got, one in zip(run(), want):
            assert torch.equal(got, one), f"{threads} threads"


# --- any order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"window": 3},
        {"window": 2, "is_causal": False},
        {"attn_mask": True},
        {"kv_bias": (0.5, 1.0), "scale": 0.3},
    ],
    ids=str,
)
def test_order_equals_reference(order, options):
    options = dict(options)
    n = 6 if order < 4 else 4
    q = torch.randn(2, 4, n, 3, dtype=F64)
    keys = [torch.randn(2, 2, n, 3, dtype=F64) for _ in range(order)]
    values = [torch.randn(2, 2, n, 5, dtype=F64) for _ in range(order)]
    mask = None
    if options.pop("attn_mask", False):
        mask = torch.rand(2, 1, n, n) < 0.6
        mask[0, 0, 1] = False

    window = options.get("window")

    def expected(q, keys, values):
        return reference(
            q,
            keys,
            values,
            masks=[mask] * order,
            causal=options.get("is_causal", window is not None),
            windows=[window] * order,
            scale=options.get("scale"),
            kv_bias=options.get("kv_bias", (0.0, 0.0)),
        )

    def actual(q, keys, values):
        return tensor_attention_n(
            q, keys, values, attn_mask=mask, enable_gqa=True, return_lse=True, **options
        )

    sources = [t.requires_grad_() for t in (q, *keys, *values)]
    results = []
    for run in (actual, expected):
        out, lse = run(q, keys, values)
        dlse = torch.where(lse == -math.inf, 0.0, torch.linspace(-1, 1, n, dtype=F64))
        dout = torch.linspace(-1, 2, out.numel(), dtype=F64).view(out.shape)
        grads = torch.autograd.grad((out, lse), sources, (dout, dlse))
        results.append((out, lse, *grads))
    for a, b in zip(*results):
        assert a.shape == b.shape
        _close(a, b, 1e-11)


def test_order_of_lengths_and_dtypes():
    q = torch.randn(1, 2, 3, 4)
    keys = [torch.randn(1, 2, n, 4) for n in (5, 2, 4)]
    values = [torch.randn(1, 2, n, 6) for n in (5, 2, 4)]
    want, _ = reference(q, keys, values)
    torch.testing.assert_close(tensor_attention_n(q, keys, values), want)
    half = tensor_attention_n(
        q.bfloat16(), [k.bfloat16() for k in keys], [v.bfloat16() for v in values]
    )
    assert half.dtype == BF16
    torch.testing.assert_close(half.float(), want, rtol=0.1, atol=0.1)
    empty = tensor_attention_n(
        q, [keys[0][:, :, :0], *keys[1:]], [values[0][:, :, :0], *values[1:]]
    )
    assert torch.equal(empty, torch.zeros_like(want))


def test_plain_attention_is_torch_s():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    assert torch.equal(
        tensor_attention_n(q, [k], [v], is_causal=True),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    out, lse = tensor_attention_n(q, [k], [v], window=4, return_lse=True)
    position = torch.arange(9)
    near = position.unsqueeze(1) - position
    near = (near >= 0) & (near < 4)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=near))
    scores = (q @ k.mT / 8**0.5).masked_fill(~near, -math.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))


# --- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_match3(dtype):
    """Whether a token has two others with a sum of 0 (mod 37): the logsumexp alone tells."""
    modulus, n, sharpness = 37, 64, 0.5
    few = torch.randint(modulus, (20, 5))
    x = torch.gather(few, 1, torch.randint(5, (20, n)))
    angle = 2 * math.pi * x.unsqueeze(-1) * torch.arange(1, (modulus + 1) // 2) / modulus
    c, s = angle.cos(), angle.sin()
    q, k1, k2 = (
        torch.cat(parts, -1).unsqueeze(1).to(dtype)
        for parts in ([c, -c, -s, -s], [c, s, c, s], [c, s, s, c])
    )
    value = torch.ones(20, 1, n, 1, dtype=dtype)
    _, lse = pyloss.tensor_attention(q, k1, k2, value, value, scale=sharpness, return_lse=True)
    found = lse.squeeze(1) > sharpness * modulus / 4 + math.log(n) - sharpness / 4
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None, :]
    wanted = (sums % modulus == 0).flatten(2).any(-1)
    assert 0.1 < wanted.float().mean() < 0.9
    assert torch.equal(found, wanted)
