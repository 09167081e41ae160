"""The public side of low-rank tensor attention: arguments, choice, warnings, compile, memory."""

from __future__ import annotations

import math
import pickle
import random
import resource
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import TORCH
from tensor_attention_lowrank_cases import F32, F64, Problem

import pyloss
from pyloss.functional import _lowrank as lowrank
from pyloss.functional import tensor_attention_error, tensor_attention_n
from pyloss.ops import _deferred as deferred
from pyloss.reference import tensor_attention_lowrank as reference

BF16 = torch.bfloat16


def attend(*tensors, **options):
    return pyloss.tensor_attention(
        *tensors, **{"scale": "kronecker", "method": "lowrank", **options}
    )


def small(n=12, d=4, dtype=F32, heads=2, size=0.5, batch=1):
    """Scores within size^3."""
    return [size * (2 * torch.rand(batch, heads, n, d, dtype=F64) - 1).to(dtype) for _ in range(5)]


@pytest.fixture(autouse=True)
def _warn_again():
    lowrank._warned.clear()


# --- bad input ---------------------------------------------------------------------------------

KEYS = torch.ones(1, 1, 1, 12, dtype=torch.bool)
BAD = {
    "degree type": ({"degree": 2.0}, TypeError, "degree"),
    "degree bool": ({"degree": True}, TypeError, "degree"),
    "degree 0": ({"degree": 0}, ValueError, "degree"),
    "degree 99": ({"degree": 99}, ValueError, "degree"),
    "poly": ({"poly": "pade"}, ValueError, "taylor, chebyshev, fit"),
    "check": ({"check": "maybe"}, ValueError, "warn, strict, none"),
    "tol": ({"tol": 0.0}, ValueError, "tol"),
    "tol type": ({"tol": "small"}, TypeError, "tol"),
    "logit_bound": ({"logit_bound": -1.0}, ValueError, "logit_bound"),
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout"),
    "pair mask": ({"mask1": KEYS.expand(1, 1, 12, 12)}, ValueError, "mask1"),
    "pair attn_mask": ({"attn_mask": torch.ones(12, 12).bool()}, ValueError, "attn_mask"),
    "bias": ({"mask2": torch.rand(12, 12)}, ValueError, "mask2 must be bool"),
    "key bias": ({"mask2": torch.rand(1, 1, 1, 12)}, ValueError, "mask2 must be bool"),
    "integer mask": ({"mask1": KEYS.int()}, TypeError, "mask1"),
    "mask shape": ({"mask1": KEYS[..., :5]}, ValueError, "broadcast"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    options, error, text = BAD[name]
    with pytest.raises(error, match=text):
        attend(*small(), **options)


def test_a_bias_with_a_gradient_is_refused():
    zero = torch.zeros(1, 1, 1, 12, requires_grad=True)
    with pytest.raises(ValueError, match="no bias"):
        attend(*small(), mask1=zero, degree=2)


def test_masks_of_query_heads_are_refused():
    q, *rest = small(heads=4)
    rest = [t[:, :2] for t in rest]
    mask = torch.ones(1, 4, 1, 12, dtype=torch.bool)
    mask[0, 1, 0, 3] = False  # heads 0 and 1 share a key head
    with pytest.raises(ValueError, match="heads of a key head"):
        attend(q, *rest, mask1=mask, enable_gqa=True, degree=2)
    attend(q, *rest, mask1=mask[:, :1], enable_gqa=True, degree=2)


def test_states_that_are_too_large():
    q = torch.empty((), device="meta").expand(1, 1, 8, 128)
    with pytest.raises(ValueError, match="bytes"):
        attend(q, q, q, q, q, degree=6)


@pytest.mark.parametrize(
    "d, degree, order, heads, count",
    [
        (128, 6, 2, 1, math.comb(134, 6)),  # more than 2^31 features
        (128, 3, 4, 8, math.comb(131, 3)),  # few enough features, four states of eight heads
        (16, 8, 2, 64, math.comb(24, 8)),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_op_refuses_states_that_are_too_large(d, degree, order, heads, count, backend):
    """Before it asks for the memory; the message has the numbers."""
    q = torch.zeros(()).expand(1, heads, 2, d)
    size = order * heads * count * (d + 1) * 4
    for causal in (False, True):
        settings = (tuple([1.0] * (degree + 1)), 0.0, causal, (0,) * order, 0)
        with pyloss.backend(backend), pytest.raises(ValueError, match="too|more than") as error:
            torch.ops.pyloss.tensor_attention_lowrank_fwd(
                q, [q] * order, [q] * order, [None] * order, *settings
            )
        for part in (f"d = {d}", f"degree {degree}", str(count), f"{size} bytes", str(2 << 30)):
            assert part in str(error.value)
    with pytest.raises(ValueError, match=f"{count} features"):
        tensor_attention_n(q, [q] * order, [q] * order, method="lowrank", degree=degree)


def test_auto_leaves_states_that_are_too_large_to_exact_attention():
    q = torch.zeros(()).expand(1, 1, 8, 128)
    assert torch.equal(attend(q, q, q, q, q, method="auto", degree=6), q)


def test_half_features_are_refused_by_the_op():
    problem = Problem()
    q, keys, values = problem.tensors(BF16)
    with pytest.raises(ValueError, match="float32 or float64"):
        torch.ops.pyloss.tensor_attention_lowrank_fwd(
            q, keys, values, [None, None], *problem.settings()
        )


def test_errors_are_those_of_torch():
    """No class of our own: what a caller catches, and what a traceback shows."""
    pairs = torch.ones(12, 12).bool()
    for call in (
        lambda: attend(*small(), attn_mask=pairs, degree=2),
        lambda: tensor_attention_error(*small()[:3], attn_mask=pairs, degree=2),
    ):
        with pytest.raises(ValueError) as found:
            call()
        assert type(found.value) is ValueError


# --- masks -------------------------------------------------------------------------------------


def test_masks_of_keys():
    tensors = small(dtype=F64, batch=2)
    keep = torch.rand(2, 1, 1, 12) < 0.7
    want = pyloss.tensor_attention(*tensors, scale="kronecker", attn_mask=keep)
    options = dict(degree=6, tol=1e-2)
    for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -math.inf)):
        torch.testing.assert_close(attend(*tensors, attn_mask=mask, **options), want)
        got = attend(*tensors, mask1=mask, mask2=mask, **options)
        torch.testing.assert_close(got, want)
    only = keep.clone()
    only[..., 3:] = False
    want = pyloss.tensor_attention(*tensors, scale="kronecker", attn_mask=keep, mask2=only)
    got = attend(*tensors, attn_mask=keep, mask2=only, **options)
    torch.testing.assert_close(got, want)
    plain = attend(*tensors, **options)
    torch.testing.assert_close(attend(*tensors, mask1=torch.zeros(12, 12)[:1], **options), plain)


# --- auto --------------------------------------------------------------------------------------


def _is_lowrank(tensors, **options):
    """Whether auto took the low-rank form: its result is not that of exact attention."""
    exact = pyloss.tensor_attention(*tensors, scale="kronecker")
    near = attend(*tensors, method="auto", **options)
    assert (near - exact).abs().max() < 1e-2
    return not torch.equal(near, exact)


def test_auto():
    long, short = small(n=200, d=4, heads=1), small(n=4, d=4, heads=1)
    assert _is_lowrank(long)
    assert not _is_lowrank(short)  # more features than pairs
    assert not _is_lowrank([5 * t for t in long[:3]] + long[3:])  # no degree is good enough
    assert not _is_lowrank(long, degree=1, tol=1e-3)
    assert _is_lowrank(long, degree=3)
    assert not _is_lowrank(long, logit_bound=30.0)  # the caller's word, not the numbers
    assert _is_lowrank(long, logit_bound=0.2)
    full = torch.ones(200, 200, dtype=torch.bool).tril()
    got = attend(*long, method="auto", attn_mask=full)
    want = pyloss.tensor_attention(*long, scale="kronecker", attn_mask=full)
    assert torch.equal(got, want)
    assert attend(*small(n=0), method="auto").shape == (1, 2, 0, 4)


def test_auto_counts_the_queries():
    """One query against all pairs is no more than exact attention can do."""
    q, *rest = small(n=30, heads=1)
    for n_q, taken in ((30, True), (1, False)):
        tensors = [q[:, :, :n_q], *rest]
        assert _is_lowrank(tensors) is taken


AUTO_TO_EXACT = {
    "mask of pairs": lambda n: dict(attn_mask=torch.ones(1, 1, n, n, dtype=torch.bool).tril()),
    "mask1 of pairs": lambda n: dict(mask1=torch.ones(n, n, dtype=torch.bool).triu(-3)),
    "mask of heads": lambda n: dict(
        mask2=torch.ones(1, 4, 1, n, dtype=torch.bool).index_fill_(1, torch.tensor([2]), False)
        .index_fill_(3, torch.tensor([0]), True)
    ),
    "bias": lambda n: dict(mask1=torch.linspace(0, 1, n).expand(1, 1, n, n)),
    "bias of keys": lambda n: dict(mask2=torch.linspace(0, 1, n).expand(1, 1, 1, n)),
    "bias with a gradient": lambda n: dict(mask1=torch.zeros(1, 1, 1, n, requires_grad=True)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", AUTO_TO_EXACT)
def test_auto_takes_exact_for_what_low_rank_cannot(name, dtype):
    q, *_ = small(n=100, heads=4, dtype=dtype)
    rest = [t[:, :2] for t in small(n=100, heads=4, dtype=dtype)[1:]]
    given = AUTO_TO_EXACT[name](100)
    if dtype != F32:
        given = {k: t if t.dtype == torch.bool else t.to(dtype) for k, t in given.items()}
    options = dict(enable_gqa=True, return_lse=True, **given)
    got = attend(q, *rest, method="auto", **options)
    want = attend(q, *rest, method="exact", **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    plain = attend(q, *rest, method="auto", enable_gqa=True)  # which would be low rank
    assert not torch.equal(plain, attend(q, *rest, method="exact", enable_gqa=True))
    with pytest.raises(ValueError, match='method="lowrank" takes'):
        attend(q, *rest, degree=2, **options)


def test_auto_with_numbers_that_are_not():
    """NaN and infinity go the exact way: NaN in, NaN out."""
    for value in (math.nan, math.inf):
        tensors = small(n=100, heads=1)
        tensors[1][0, 0, 3, 1] = value
        got = attend(*tensors, method="auto")
        want = attend(*tensors, method="exact")
        torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=0)
        assert got.isnan().any()


def test_auto_with_windows_counts_what_they_leave():
    tensors = small(n=200, heads=1)
    for window, taken in (((2, 3), False), ((150, 150), True)):
        exact = pyloss.tensor_attention(*tensors, scale="kronecker", window=window)
        near = attend(*tensors, method="auto", window=window)
        assert torch.equal(exact, near) is not taken


@pytest.mark.parametrize("order", [1, 2, 3])
def test_tuples_that_a_query_sees(order):
    """The average over the last queries, up to what sums differ from integrals."""
    generator = random.Random(order)
    for _ in range(100):
        n_q = generator.choice([1, 7, 40, 100])
        lengths = [generator.choice([50, 100]) for _ in range(order)]
        windows = [generator.choice([0, 5, 30, 100, 200]) for _ in range(order)]
        keys = [torch.zeros(1, 1, n, 4) for n in lengths]
        problem = lowrank.Problem(
            torch.zeros(1, 1, n_q, 4), keys, 4, [None] * order, 1.0, True, windows
        )
        end = max(lengths)
        counts = [
            math.prod(min(i + 1, n, w or n) for n, w in zip(lengths, windows))
            for i in range(max(end - n_q, 0), end)
        ]
        want = sum(counts) / len(counts)
        assert problem.tuples() == pytest.approx(want, rel=0.05, abs=1.0)


def test_auto_wants_more_of_windows():
    """To leave a window again costs as much as to enter it."""
    tensors = small(n=1024, d=16, heads=1)
    # From 5 times on causal attention is low rank, from 10 times on that of windows.
    for window, n, taken in ((None, 256, True), (32, 1024, False), (128, 1024, True)):
        options = dict(degree=2, tol=0.1, is_causal=True, window=window)
        given = [t[:, :, :n] for t in tensors]
        exact = attend(*given, method="exact", is_causal=True, window=window)
        assert torch.equal(attend(*given, method="auto", **options), exact) is not taken


@pytest.mark.parametrize("options", [dict(is_causal=True), dict(window=(64, 32)), {}])
def test_auto_compiles_for_any_length(options):
    """To decide takes no order of sizes, which a graph of any size does not have."""
    options = dict(method="auto", logit_bound=0.3, tol=0.1, **options)
    compiled = torch.compile(
        lambda *t: attend(*t, **options), fullgraph=True, dynamic=True, backend="eager"
    )
    for n in (40, 400, 500):
        tensors = small(n=n, heads=1)
        torch.testing.assert_close(compiled(*tensors), attend(*tensors, **options))


# --- check -------------------------------------------------------------------------------------


def test_warns_once_with_the_numbers():
    tensors = small(size=1.0)
    with pytest.warns(UserWarning) as caught:
        attend(*tensors, degree=1)
        attend(*tensors, degree=1)
    assert len(caught) == 1
    text = str(caught[0].message)
    found = tensor_attention_error(*tensors[:3], scale="kronecker", degree=1)
    for part in (
        f"{found['bound']:.2g}", f"{found['R_bound']:.3g}", f"{found['delta']:.2g}",
        f"degree {found['degree_needed']}", "tol = 0.01", "SETH", "n^3", f"{found['hardness']:.2f}",
        f"{found['entry_bound']:.2f}",
    ):  # fmt: skip
        assert part in text, (part, text)
    with pytest.warns(UserWarning):  # another degree is another warning
        attend(*tensors, degree=2)
    # It points at the caller's line, through modules, too.
    attention = pyloss.nn.TensorAttention(8, 2, method="lowrank", degree=1, tol=1e-9)
    with pytest.warns(UserWarning, match="lowrank") as caught:
        attention(*[torch.randn(1, 4, 8)] * 3, need_weights=False)
    assert caught[0].filename == __file__


def test_silent_where_the_bound_is_kept_or_not_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*small(), degree=2)
        attend(*small(size=2.0), degree=2, check="none")
        attend(*small(size=1.0), degree=2, tol=1.0)
        attend(*small(), degree=2, check="strict")
        attend(*small(size=1.0), degree=2, check="strict", logit_bound=0.1)


def test_a_look_at_the_largest_entries_is_enough_where_they_are_small(monkeypatch):
    """Or the features are looked at one by one, as with a mask, which hides large ones."""
    looked = []
    real = lowrank.bound_by_features
    monkeypatch.setattr(lowrank, "bound_by_features", lambda p: looked.append(p) or real(p))
    attend(*small(), degree=2)
    assert not looked
    uneven = small()
    for t in uneven[:3]:
        t[..., 1:] *= 0.01  # a bound by features is four times less
    attend(*uneven, degree=1, tol=1e-3)
    assert len(looked) == 1
    hidden = small()
    hidden[1][:, :, 5:] = 1e6
    keep = (torch.arange(12) < 5).view(1, 1, 1, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(*hidden, degree=2, mask1=keep)
    assert len(looked) == 2


def test_promises_are_looked_up_again():
    lowrank._promises.clear()
    for tensors in (small(), small(), small(n=13), small(dtype=F64)):
        with pytest.warns(UserWarning, match="tol = 1e-09"):
            lowrank._warned.clear()
            attend(*tensors, degree=3, tol=1e-9)
    report = tensor_attention_error(*tensors[:3], scale="kronecker", degree=3)
    lowrank._promises.clear()
    assert report == tensor_attention_error(*tensors[:3], scale="kronecker", degree=3)


def test_strict():
    with pytest.raises(ValueError, match="SETH"):
        attend(*small(size=1.0), degree=1, check="strict")
    with pytest.raises(ValueError, match="inf times"):
        attend(*small(size=2.0), degree=1, check="strict")


def test_degree_is_found():
    tensors = small(dtype=F64, size=0.8)
    exact = pyloss.tensor_attention(*tensors, scale="kronecker")
    largest = (tensors[3].abs().amax(2) * tensors[4].abs().amax(2)).max()
    for tol in (1e-1, 1e-2, 1e-5):
        for poly in ("taylor", "chebyshev", "fit"):
            near = attend(*tensors, tol=tol, poly=poly)
            assert (near - exact).abs().max() <= tol * largest
    with pytest.raises(ValueError, match="SETH"):
        attend(*[20 * t for t in tensors])


def test_fit_with_padding_and_centre():
    tensors = small(n=30, dtype=F64, batch=2)
    keep = torch.ones(2, 1, 1, 30, dtype=torch.bool)
    keep[0, ..., 20:] = False
    big = [t.clone() for t in tensors]
    for t in big[1:]:
        t[0, :, 20:] = 1e6
    got = attend(*big, attn_mask=keep, degree=4, poly="fit", return_lse=True)
    want = pyloss.tensor_attention(*tensors, scale="kronecker", attn_mask=keep, return_lse=True)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# --- tensor_attention_error --------------------------------------------------------------------


def test_error_report():
    q, k1, k2, v1, v2 = small(n=50, d=4)
    found = tensor_attention_error(q, k1, k2, values=(v1, v2), scale="kronecker", degree=3)
    assert found["rank"] == 35 and found["degree"] == 3
    assert 0 < found["R_sampled"] <= found["R_bound"] <= 0.5**3 * 1.001
    assert found["delta"] < found["bound"] < 1.1 * found["delta"] + 1e-4
    assert found["entry_bound"] == pytest.approx(found["R_bound"] ** (1 / 3))
    assert found["hardness"] == pytest.approx(math.log(50) ** (1 / 3))
    assert found["flops_ratio"] == pytest.approx(2 * 50**3 * 8 / (3 * 50 * 35 * 11))
    largest = (v1.abs().amax(2) * v2.abs().amax(2)).max().item()
    assert found["bound_out"] == pytest.approx(found["bound"] * largest)
    one = tensor_attention_error(q, k1, scale="kronecker")
    assert one["hardness"] == pytest.approx(math.log(50) ** 0.5) and one["bound"] <= 1e-2
    wide = tensor_attention_error(1000 * q, k1, k2, scale="kronecker", degree=2)
    assert wide["bound"] == math.inf and wide["degree_needed"] is None
    declared = tensor_attention_error(q, k1, k2, logit_bound=1.0, degree=2)
    assert declared["R_bound"] == 1.0
    padded = torch.ones(1, 1, 1, 50, dtype=torch.bool)
    padded[..., 7:] = False
    part = tensor_attention_error(q, k1, k2, scale="kronecker", degree=3, attn_mask=padded)
    assert part["R_bound"] < found["R_bound"]


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(values=(torch.ones(1, 2, 12, 4),)), "values must be 2"),
        (dict(masks=(None,)), "masks must be 2"),
        (dict(samples=0), "samples"),
        (dict(degree=0), "degree"),
        (dict(attn_mask=torch.ones(12, 12).bool()), "attn_mask"),
    ],
)
def test_error_report_refuses(change, text):
    q, k1, k2, *_ = small()
    with pytest.raises(ValueError, match=text):
        tensor_attention_error(q, k1, k2, **change)
    with pytest.raises(ValueError, match="at least one"):
        tensor_attention_error(q)


# --- dtypes, autocast, transforms, other devices -----------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_types(dtype):
    tensors = small(n=40, dtype=dtype)
    leaves = [t.requires_grad_() for t in tensors]
    out, lse = attend(*leaves, degree=3, return_lse=True)
    assert out.dtype == dtype and lse.dtype == F32
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = attend(*wide, degree=3)
    want_grads = torch.autograd.grad(want, wide, torch.ones_like(want))
    eps = torch.finfo(dtype).eps
    assert (out.double() - want).abs().max() <= eps * want.abs().max()
    for g, w in zip(grads, want_grads):
        assert g.dtype == dtype
        assert (g.double() - w).abs().max() <= 2 * eps * w.abs().max()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_half_types_with_biases(dtype):
    """The sums k2 + b_k and v2 + b_v are not rounded to a half type."""
    q, k1, k2, v1, v2 = small(dtype=dtype, d=16)
    k1, k2, v2 = k1.abs(), torch.ones_like(k2), torch.ones_like(v2)
    bias = 0.45 * torch.finfo(dtype).eps  # 1 + bias is 1 in the half type
    options = dict(kv_bias=(bias, bias), return_lse=True)
    near, lse = attend(q, k1, k2, v1, v2, degree=6, **options)
    want, want_lse = attend(q, k1, k2, v1, v2, method="exact", **options)
    torch.testing.assert_close(lse, want_lse, rtol=0.0, atol=3e-6)
    assert (near == want).float().mean() > 0.9  # both round once


def test_autocast():
    tensors = small()
    with torch.autocast("cpu", dtype=BF16):
        assert attend(*tensors, degree=2).dtype == BF16


def test_transforms():
    tensors = small(dtype=F64)
    options = dict(degree=2, check="none")
    want = attend(*tensors, **options)
    torch.testing.assert_close(
        torch.func.vmap(lambda *t: attend(*t, **options))(*(t.unsqueeze(0) for t in tensors))[0],
        want,
    )
    grad = torch.func.grad(lambda q: attend(q, *tensors[1:], **options).sum())(tensors[0])
    q = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(q, *tensors[1:], **options).sum(), q)
    torch.testing.assert_close(grad, expected)
    _, tangent = torch.func.jvp(
        lambda q: attend(q, *tensors[1:], **options), (tensors[0],), (torch.ones_like(tensors[0]),)
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        out = attend(dual, *tensors[1:], **options)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(out).tangent, tangent)


def test_transforms_do_not_look_at_numbers():
    tensors = [t.unsqueeze(0) for t in small()]
    mask = torch.zeros(1, 1, 1, 1, 12)
    vmap = torch.func.vmap
    with pytest.raises(ValueError, match="mask1 must be bool, or on the CPU hold 0 and -inf"):
        vmap(lambda m, *t: attend(*t, mask1=m, degree=2))(mask, *tensors)
    with pytest.raises(ValueError, match='poly="fit" looks at the numbers'):
        vmap(lambda *t: attend(*t, poly="fit", degree=2, logit_bound=0.2))(*tensors)
    for options in (dict(), dict(poly="fit", logit_bound=0.2)):
        options |= dict(method="auto", tol=0.1)
        got = vmap(lambda m, *t: attend(*t, mask1=m, **options))(mask, *tensors)  # noqa: B023
        torch.testing.assert_close(got[0], attend(*(t[0] for t in tensors), method="exact"))


def test_second_derivatives_of_the_reference():
    problem = Problem((3, 3), n_q=2, d=2, batch=1, heads=1, kv_heads=1)
    q, keys, values = problem.tensors()

    def run(q, k1, v1):
        return reference(
            q, (k1, keys[1]), (v1, values[1]), coefficients=problem.settings().coefficients
        )[0]

    inputs = [t.requires_grad_() for t in (q, keys[0], values[0])]
    assert torch.autograd.gradgradcheck(run, inputs)


def test_meta_tensors():
    q = torch.empty((), device="meta").expand(1, 2, 10, 16)
    out = attend(q, q, q, q, q, degree=2)
    assert out.is_meta and out.shape == q.shape
    with pytest.raises(ValueError, match="logit_bound"):
        attend(q, q, q, q, q)
    assert attend(q, q, q, q, q, logit_bound=0.1).shape == q.shape
    assert attend(q, q, q, q, q, method="auto").shape == q.shape


def test_inputs_without_a_gradient():
    tensors = small(dtype=F64)
    for at in range(5):
        given = [t.clone().requires_grad_(x == at) for x, t in enumerate(tensors)]
        attend(*given, degree=2).sum().backward()
        every = [t.clone().requires_grad_() for t in tensors]
        attend(*every, degree=2).sum().backward()
        torch.testing.assert_close(given[at].grad, every[at].grad)


# --- opcheck, compile --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "problem",
    [
        Problem(),
        Problem((5,), heads=4, kv_heads=2),
        Problem(padded=True),
        Problem((7, 7), causal=True),
        Problem((7, 7), causal=True, windows=(2, 3)),
    ],
    ids=["plain", "order 1", "padded", "causal", "windows"],
)
def test_opcheck(problem):
    q, keys, values = problem.tensors(F32)
    masks, settings = problem.key_masks(), problem.settings()
    ops = torch.ops.pyloss
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (q, keys, values, masks, *settings)
    torch.library.opcheck(ops.tensor_attention_lowrank_fwd.default, args, test_utils=tests)
    out, lse, y, states = ops.tensor_attention_lowrank_fwd(*args)
    args = (torch.rand_like(out), torch.rand_like(lse), q, keys, values, masks, out, y, states)
    torch.library.opcheck(
        ops.tensor_attention_lowrank_bwd.default, (*args, *settings), test_utils=tests
    )


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [
        (dict(degree=2), None),
        (dict(degree=2), True),
        (dict(degree=2, is_causal=True), None),
        (dict(logit_bound=0.2), True),
        (dict(logit_bound=0.2, check="strict"), None),
        (dict(logit_bound=0.2, poly="chebyshev", degree=2), True),
        (dict(method="auto"), None),
        (dict(method="auto"), True),
    ],
)
def test_compile(options, dynamic, fresh_dynamo):
    """With dynamic=True the number of features and all numbers are variables, at first."""
    tensors = [t.requires_grad_() for t in small(dtype=F64)]
    run = lambda *t: attend(*t, **options)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    exact = options.get("method") == "auto"  # which does not look at numbers while compiling
    want = attend(*tensors, **({"method": "exact"} if exact else options))
    got = compiled(*tensors)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got.sum(), tensors)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), tensors)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["all", "causal"])
def test_compile_inductor(options, fresh_dynamo):
    """Between operations that inductor compiles."""
    tensors = [t.requires_grad_() for t in small(dtype=F64)]
    weight = torch.arange(1.0, 1.0 + tensors[0].shape[2], dtype=F64).view(1, 1, -1, 1)

    def run(q, *rest):
        return (weight * attend(q.sin(), *rest, degree=2, **options)).cos()

    want = run(*tensors)
    got = torch.compile(run, fullgraph=True, backend="inductor")(*tensors)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got.sum(), tensors)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), tensors), strict=True):
        torch.testing.assert_close(a, b)


FIRST_USE = """
import sys, torch, pyloss
tensors = torch.rand(5, 1, 1, 9, 4) - 0.5
lowrank = dict(method="lowrank", degree=2, scale="kronecker")
for options in ({}, lowrank):
    assert "pyloss.functional._lowrank" not in sys.modules
    run = lambda *t: pyloss.tensor_attention(*t, **options)
    got = torch.compile(run, fullgraph=True, backend="eager")(*tensors)
    assert ("pyloss.functional._lowrank" in sys.modules) == bool(options)
    torch.testing.assert_close(got, run(*tensors))
"""


def test_compile_at_the_first_use():
    """Nothing of low rank is imported before Dynamo traces the import."""
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, timeout=120)


def test_compile_refuses_to_look(fresh_dynamo):
    for options, text in (
        ({}, "logit_bound"),
        ({"poly": "chebyshev"}, "needs a degree"),
        ({"poly": "fit", "degree": 2, "logit_bound": 0.2}, 'poly="fit" looks at the numbers'),
    ):
        run = torch.compile(lambda *t: attend(*t, **options), fullgraph=True, backend="eager")  # noqa: B023
        # Dynamo does not say what was raised, before torch 2.11.
        with pytest.raises(Exception, match=text if TORCH >= (2, 11) else "Observed exception"):
            run(*small())


# --- layer -------------------------------------------------------------------------------------


def test_layer():
    torch.manual_seed(0)
    layer = pyloss.nn.TensorAttention(
        16, 2, batch_first=True, init="random", scale="kronecker", method="lowrank", degree=3
    )
    assert "method=lowrank, degree=3, poly=taylor" in repr(layer)
    exact = pyloss.nn.TensorAttention(16, 2, batch_first=True, init="random", scale="kronecker")
    exact.load_state_dict(layer.state_dict())
    x = 0.3 * torch.randn(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    for options in (
        dict(), dict(is_causal=True), dict(key_padding_mask=padding),
        dict(is_causal=True, key_padding_mask=padding),
    ):  # fmt: skip
        near, _ = layer(x, x, x, need_weights=False, **options)
        want, _ = exact(x, x, x, need_weights=False, **options)
        torch.testing.assert_close(near, want, rtol=1e-2, atol=1e-3)
        assert not torch.equal(near, want)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0])


# --- memory ------------------------------------------------------------------------------------


def test_features_are_never_stored():
    """d = 24, degree 2: 325 features, 13 times the size of a tensor like q."""
    n, d = 40000, 24
    tensors = [t.requires_grad_() for t in small(n=n, d=d, heads=1)]
    upstream = torch.ones(1, 1, n, d)
    tensor = n * d * 4

    def step():
        out = attend(*tensors, degree=2, check="none")
        return torch.autograd.grad(out, tensors, upstream)

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert len(found) == 5 and grown < 4 * tensor
    # What autograd keeps: inputs, out, y and the states.
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(*tensors, degree=2, check="none")
    assert sum(t.numel() * 4 for t in kept) < 6.5 * tensor


def test_scores_of_order_three_are_never_stored():
    """n^4 scores would be 10^12 bytes."""
    q, *rest = small(n=1000, d=4, heads=1)
    out = tensor_attention_n(q, rest[:3], rest[1:4], method="lowrank", degree=3, scale="kronecker")
    assert torch.isfinite(out).all()


# --- numbers on a GPU are looked at later ------------------------------------------------------


def test_deferred(monkeypatch):
    class Event:
        done = False

        def record(self):
            pass

        def query(self):
            return Event.done

    real = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: real(*a, **k))
    seen = []
    deferred.when_known(torch.tensor(3.0), seen.append)
    deferred.settle()
    assert seen == []
    Event.done = True
    deferred.when_known(torch.tensor(4.0), seen.append)
    assert seen == [3.0]
    deferred.settle()
    deferred.settle()
    assert seen == [3.0, 4.0]


# --- GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("n", [70, 700])  # of several chunks
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 20)}])
def test_gpu_equals_cpu(options, n):
    tensors = small(n=n, d=16, batch=2)
    options = dict(options, degree=2, return_lse=True)
    leaves = [t.cuda().requires_grad_() for t in tensors]
    out, lse = attend(*leaves, **options)
    wide = [t.double().requires_grad_() for t in tensors]
    want, want_lse = attend(*wide, **options)
    torch.testing.assert_close(out.cpu().double(), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=2e-5, atol=2e-5)
    got = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    grads = torch.autograd.grad(
        (want, want_lse), wide, (torch.ones_like(want), torch.ones_like(want_lse))
    )
    for a, b in zip(got, grads):
        assert (a.cpu().double() - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_gpu_repeats_its_bits(options):
    tensors = [t.cuda().requires_grad_() for t in small(n=3000, d=16)]

    def step():
        out = attend(*tensors, degree=2, **options)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    for a, b in zip(step(), step()):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_gpu_graph_capture(causal):
    """No synchronisation with the host: a CUDA graph can hold forward and backward."""
    tensors = [t.cuda().requires_grad_() for t in small(n=64, d=16)]

    def step():
        out = attend(*tensors, degree=2, is_causal=causal)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_gpu_does_not_wait():
    tensors = [t.cuda().requires_grad_() for t in small(n=64, d=16)]
    attend(*tensors, degree=2).sum().backward()
    attend(*tensors, degree=2, is_causal=True).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(*tensors, degree=2).sum().backward()
        attend(*tensors, degree=2, is_causal=True).sum().backward()
        attend(*tensors, method="auto")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with pytest.warns(UserWarning, match="SETH"):
        attend(*[4 * t for t in tensors], degree=1)
        torch.cuda.synchronize()
        deferred.settle()


def _near_band(causal, windows, offset, n_q, n):
    """What bands of Python integers of any size hide, one by one."""
    seen = torch.ones(len(windows), n_q, n, dtype=torch.bool)
    for x, w in enumerate(windows):
        for i in range(n_q):
            for j in range(n):
                p = i + offset
                if causal and j > p or w and (j <= p - w or not causal and j >= p + w):
                    seen[x, i, j] = False
    return seen


@pytest.mark.parametrize("method", ["exact", "auto", "lowrank"])
@pytest.mark.parametrize("far", [2**31, 2**40, 2**62])
def test_numbers_beyond_any_length(method, far):
    """Windows and offsets of any size hide what they say, whatever the method."""
    options = dict(method=method, tol=1e-2, degree=3)
    if method == "exact":
        options = dict(method=method)
    tensors = small(n=20)
    for causal, window, offset in (
        (True, None, far),
        (True, None, -far),
        (True, far, 0),
        (False, far, 0),
        (True, far, far - 3),
        (True, far - 7, far),
        (False, far, 5 - far),
        (True, 3, far),
        (False, 3, -far),
    ):
        got = attend(*tensors, is_causal=causal, window=window, q_offset=offset, **options)
        seen = _near_band(causal, (window, window), offset, 20, 20)
        want = attend(*tensors, mask1=seen[0], mask2=seen[1], method="exact")
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if method == "exact" else 2e-2)


def test_masks_of_grouped_heads():
    """A mask per query head will do where those of a key head agree; the message says what fits."""
    q, k1, k2, v1, v2 = small(heads=4, n=16)
    k1, k2, v1, v2 = (t[:, ::2] for t in (k1, k2, v1, v2))
    options = dict(enable_gqa=True)
    keep = torch.rand(q.shape[0], 2, 1, 16) < 0.7
    keep[..., 0] = True
    mask = keep.repeat_interleave(2, 1)
    got = attend(q, k1, k2, v1, v2, mask1=mask, method="lowrank", degree=4, **options)
    want = attend(q, k1, k2, v1, v2, mask1=mask, method="exact", **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)
    mask[:, 1] = ~mask[:, 1]
    with pytest.raises(
        ValueError, match=r"\(batch, 1, 1, keys\), or on the CPU one for each query"
    ):
        attend(q, k1, k2, v1, v2, mask1=mask, method="lowrank", degree=4, **options)
    got = attend(q, k1, k2, v1, v2, mask1=mask, method="auto", **options)
    assert torch.equal(got, attend(q, k1, k2, v1, v2, mask1=mask, method="exact", **options))


def test_large_negative_masks_are_named():
    tensors = small(n=16)
    mask = torch.zeros(16).masked_fill(torch.arange(16) > 9, -1e9)
    with pytest.raises(ValueError, match=r"got torch.float32 with -1e\+09: .* pass mask > -1"):
        attend(*tensors, attn_mask=mask, method="lowrank", degree=2)
    with pytest.raises(ValueError, match="got torch.float32 with 0.5$"):
        attend(*tensors, attn_mask=mask.clamp(min=0) + 0.5, method="lowrank", degree=2)
