"""Low-rank tensor attention: the identity, the op against the cube of p(S), the stated bound."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tensor_attention_lowrank_cases import F32, F64, PROBLEMS, Problem, masked_exact

import pyloss
from pyloss import backends
from pyloss.functional import _polynomials as polynomials
from pyloss.functional import tensor_attention, tensor_attention_error, tensor_attention_n
from pyloss.ops.tensor_attention_lowrank import Settings, cpu, tensor_attention_lowrank, triton
from pyloss.ops.tensor_attention_lowrank.largest import largest_entry
from pyloss.ops.tensor_attention_lowrank.plan import rank
from pyloss.reference import tensor_attention as exact_reference
from pyloss.reference import tensor_attention_lowrank as reference

# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("d, degree", [(4, 3), (4, 6), (8, 3), (8, 4), (16, 3), (64, 2), (1, 5)])
def test_identity(d, degree):
    """Sums of products of C(d + g, g) monomials are the polynomial of the score."""
    from pyloss.reference.tensor_attention_lowrank import monomial_weights, monomials

    q, k1, k2 = torch.rand(3, 12, d, dtype=F64) * 2 - 1
    coefficients = polynomials.taylor(degree).scaled(1.0 / d)
    weights = monomial_weights(coefficients, d, q)
    u, u1, u2 = monomials(q, degree) * weights, monomials(k1, degree), monomials(k2, degree)
    assert u.shape[1] == rank(d, degree) == math.comb(d + degree, degree)
    s = torch.einsum("il,jl,kl->ijk", q, k1, k2) / d
    want = sum(p * s**t for t, p in enumerate(polynomials.taylor(degree).coefficients))
    torch.testing.assert_close(torch.einsum("ir,jr,kr->ijk", u, u1, u2), want, rtol=0, atol=1e-12)


def test_products_of_sums():
    """(U2 kr U3)^T (V1 kr V2) = (U2^T V1) * (U3^T V2)."""
    from pyloss.reference.tensor_attention_lowrank import monomials

    k1, k2, v1, v2 = torch.randn(4, 11, 5, dtype=F64)
    u1, u2 = monomials(k1, 3), monomials(k2, 3)
    pairs = torch.einsum("jr,kr->jkr", u1, u2).flatten(0, 1)
    products = torch.einsum("jc,kc->jkc", v1, v2).flatten(0, 1)
    want = (u1.T @ v1) * (u2.T @ v2)
    torch.testing.assert_close(pairs.T @ products, want, rtol=1e-12, atol=1e-10)


def _upstream(out, lse, seed=2):
    g = torch.Generator().manual_seed(seed)
    dout = torch.randn(out.shape, generator=g, dtype=F64).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=g, dtype=F64).to(lse.dtype)
    return dout, torch.where(lse == -math.inf, 0.0, dlse)


def _with_gradients(run, problem, dtype=F64):
    q, keys, values = problem.tensors(dtype)
    leaves = [t.requires_grad_() for t in (q, *keys, *values)]
    out, lse = run(q, keys, values, problem.key_masks(), problem.settings())
    grads = torch.autograd.grad((out, lse), leaves, _upstream(out, lse), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)]
    return [out.detach(), lse.detach(), *grads]


def _by_reference(q, keys, values, key_masks, settings):
    return reference(
        q, keys, values, coefficients=settings.coefficients, centre=settings.centre,
        key_masks=key_masks, causal=settings.causal, windows=settings.windows,
        q_offset=settings.q_offset,
    )[:2]  # fmt: skip


def _assert_close(got, want, rtol, atol):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol * max(1.0, _largest(b)))


def _largest(t):
    finite = t[torch.isfinite(t)]
    return finite.abs().max().item() if finite.numel() else 0.0


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_is_masked_exact_attention(name):
    problem = PROBLEMS[name]
    got, want = (_with_gradients(run, problem) for run in (_by_reference, masked_exact))
    _assert_close(got, want, 1e-10, 1e-10)


# --- the op --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_masked_exact_attention(name, backend):
    """Forward, and the backward by hand against autograd through the cube."""
    problem = PROBLEMS[name]
    with pyloss.backend(backend):
        got = _with_gradients(tensor_attention_lowrank, problem)
    _assert_close(got, _with_gradients(masked_exact, problem), 1e-10, 1e-10)


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32(name):
    problem = PROBLEMS[name]
    got = _with_gradients(tensor_attention_lowrank, problem, F32)
    want = _with_gradients(masked_exact, problem)
    for at, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == F32
        tolerance = 2e-5 if at < 2 else 1e-4
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite)
        error = (a.double() - b)[finite].abs().max().item()
        assert error <= tolerance * max(1.0, _largest(b)), (at, error)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "windows": (5, 70)}])
def test_lengths(n, options):
    problem = Problem((n, n), n_q=n, d=3, batch=1, heads=1, kv_heads=1, **options)
    got = _with_gradients(tensor_attention_lowrank, problem)
    _assert_close(got, _with_gradients(masked_exact, problem), 1e-10, 1e-10)


@pytest.mark.parametrize("d, dv, degree", [(8, 8, 2), (16, 16, 2), (16, 5, 3), (40, 70, 2)])
def test_features(d, dv, degree):
    problem = Problem((30, 20), n_q=25, d=d, dv=dv, batch=1, degree=degree)
    got = _with_gradients(tensor_attention_lowrank, problem)
    _assert_close(got, _with_gradients(masked_exact, problem), 1e-10, 1e-10)


def test_layouts():
    problem = PROBLEMS["grouped_padded"]
    q, keys, values = problem.tensors()
    want = tensor_attention_lowrank(q, keys, values, problem.key_masks(), problem.settings())
    other = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, *keys, *values)]
    far = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in other]
    columns = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in other]
    for tensors in (other, far, columns):
        got = tensor_attention_lowrank(
            tensors[0], tensors[1:3], tensors[3:], problem.key_masks(), problem.settings()
        )
        _assert_close(got, want, 1e-12, 1e-12)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "windows": (2, 3)}])
def test_gradcheck(options):
    problem = Problem((4, 4), n_q=4, d=2, batch=1, heads=2, kv_heads=1, padded=True, **options)
    q, keys, values = problem.tensors()
    masks = problem.key_masks()
    masks[0][..., 0] = masks[1][..., 0] = True  # an lse of -inf has no numerical gradient

    def run(q, k1, k2, v1, v2):
        return tensor_attention_lowrank(q, (k1, k2), (v1, v2), masks, problem.settings())

    inputs = [t.requires_grad_() for t in (q, *keys, *values)]
    assert torch.autograd.gradcheck(run, inputs)


def test_rows_without_a_key():
    problem = Problem((6, 6), n_q=6, causal=True, q_offset=-2)
    out, lse, *grads = _with_gradients(tensor_attention_lowrank, problem)
    assert torch.equal(out[:, :, :2], torch.zeros_like(out[:, :, :2]))
    assert (lse[:, :, :2] == -math.inf).all() and torch.isfinite(lse[:, :, 2:]).all()
    assert torch.equal(grads[0][:, :, :2], torch.zeros_like(grads[0][:, :, :2]))
    assert all(torch.isfinite(g).all() for g in grads)


def test_everything_padded():
    problem = Problem()
    q, keys, values = problem.tensors()
    masks = [torch.zeros(2, 1, 7, dtype=torch.bool), None]
    leaves = [t.requires_grad_() for t in (q, *keys, *values)]
    out, lse = tensor_attention_lowrank(q, keys, values, masks, problem.settings())
    assert not out.any() and (lse == -math.inf).all()
    for g in torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse))):
        assert not g.any()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "windows": (4, 3)}])
def test_what_is_padded_does_not_matter(options):
    """NaN and infinity behind the mask, too."""
    problem = Problem((7, 7), padded=True, **options)
    q, keys, values = problem.tensors()
    masks = problem.key_masks()
    found = []
    for fill in (0.0, math.nan, math.inf):
        tensors = [q]
        for t, mask in zip((*keys, *values), masks * 2):
            tensors.append(t.masked_fill(~mask.unsqueeze(-1), fill).requires_grad_())
        tensors[0] = q.detach().requires_grad_()
        out, lse = tensor_attention_lowrank(
            tensors[0], tensors[1:3], tensors[3:], masks, problem.settings()
        )
        grads = torch.autograd.grad((out, lse), tensors, _upstream(out, lse), allow_unused=True)
        found.append([out.detach(), lse.detach(), *grads])
    for other in found[1:]:
        _assert_close(other, found[0], 1e-12, 1e-12)


@pytest.mark.parametrize(
    "lengths, n_q, batch, heads",
    [
        ((0, 5), 4, 1, 2),
        ((5, 0), 4, 1, 2),
        ((5, 5), 0, 1, 2),
        ((5, 5), 4, 0, 2),
        ((5, 5), 4, 1, 0),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_axes(lengths, n_q, batch, heads, causal):
    problem = Problem(lengths, n_q=n_q, batch=batch, heads=heads, kv_heads=heads, causal=causal)
    out, lse, *grads = _with_gradients(tensor_attention_lowrank, problem)
    assert out.shape == (batch, heads, n_q, 2) and not out.any()
    assert (lse == -math.inf).all()
    assert not any(g.any() for g in grads)


def test_sums_that_vanish_are_an_error():
    q, k = torch.full((1, 1, 3, 2), -3.0), torch.full((1, 1, 3, 2), 1.0)
    with pytest.raises(RuntimeError, match="positive"):
        pyloss.tensor_attention(q, k, k, k, k, method="lowrank", degree=1, check="none")
    k[0, 0, 1, 0] = math.nan
    for causal in (False, True):
        with pytest.raises(RuntimeError, match="finite"):
            pyloss.tensor_attention(
                k, k, k, k, k, method="lowrank", degree=2, check="none", is_causal=causal
            )


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_that_overflow_are_an_error(causal, backend):
    """n^m tuples are more than float32 can count, though each axis has few keys."""
    n, order = 130, 20
    q = torch.full((1, 1, n, 2), 0.1)
    options = dict(method="lowrank", degree=1, check="none", is_causal=causal)
    with pyloss.backend(backend), pytest.raises(RuntimeError, match="not finite"):
        tensor_attention_n(q, [q] * order, [q] * order, **options)
    wide = [q.double()] * order  # float64 can: all values are equal
    out = tensor_attention_n(q.double(), wide, wide, **options)
    torch.testing.assert_close(out, wide[0] ** order, rtol=1e-9, atol=0)
    # Features that overflow although the scores are small.
    big, tiny = torch.full((1, 1, 4, 2), 1e25), torch.full((1, 1, 4, 2), 1e-25)
    one = torch.ones(1, 1, 4, 2)
    with pyloss.backend(backend), pytest.raises(RuntimeError, match="finite"):
        pyloss.tensor_attention(tiny, big, one, one, one, **dict(options, degree=2))


def test_long_windows_do_not_drift():
    """What leaves a window is subtracted; in float32 the rest must not add up."""
    problem = Problem(
        (2000, 2000), n_q=2000, d=2, dv=1, batch=1, heads=1, kv_heads=1, causal=True,
        windows=(3, 5),
    )  # fmt: skip
    q, keys, values = problem.tensors()
    keys[0][:, :, :1000] *= 100.0  # large numbers that leave again
    args = (problem.key_masks(), problem.settings())
    want = tensor_attention_lowrank(q, keys, values, *args)[0]
    single = [t.float() for t in (q, *keys, *values)]
    got = tensor_attention_lowrank(single[0], single[1:3], single[3:], *args)[0]
    assert (got.double() - want)[:, :, 1020:].abs().max() < 1e-4


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "windows": (40, 90)}])
@pytest.mark.parametrize("batch", [1, 3])
def test_thread_count_does_not_matter(options, batch, keep_num_threads):
    problem = Problem((700, 700), n_q=700, d=6, dv=5, batch=batch, heads=2, kv_heads=1, **options)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(_with_gradients(tensor_attention_lowrank, problem, F32))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert torch.equal(a, b)


# --- properties ----------------------------------------------------------------------------------


def test_ones_on_one_axis_give_lower_order():
    q, k, v = torch.rand(3, 1, 2, 9, 4, dtype=F64)
    one = torch.ones(1, 2, 1, 4, dtype=F64)
    options = dict(method="lowrank", degree=3, check="none")
    got = tensor_attention_n(q, (k, one), (v, one), **options)
    torch.testing.assert_close(got, tensor_attention_n(q, (k,), (v,), **options))


def test_order_of_keys_and_axes():
    q, k1, k2, v1, v2 = torch.rand(5, 1, 2, 12, 4, dtype=F64)
    options = dict(method="lowrank", degree=2, check="none", return_lse=True)
    want = pyloss.tensor_attention(q, k1, k2, v1, v2, **options)
    _assert_close(pyloss.tensor_attention(q, k2, k1, v2, v1, **options), want, 1e-12, 1e-12)
    order = torch.randperm(12)
    moved = pyloss.tensor_attention(q, k1[:, :, order], k2, v1[:, :, order], v2, **options)
    _assert_close(moved, want, 1e-12, 1e-12)


def test_queries_by_chunks():
    q, k1, k2, v1, v2 = torch.rand(5, 1, 2, 20, 4, dtype=F64)
    options = dict(method="lowrank", degree=2, check="none", window=(4, 7))
    whole = pyloss.tensor_attention(q, k1, k2, v1, v2, **options)
    parts = [
        pyloss.tensor_attention(q[:, :, a : a + 5], k1, k2, v1, v2, q_offset=a, **options)
        for a in range(0, 20, 5)
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_options_of_exact_attention():
    """Scale, biases of k2 and v2, the determinant form, grouped heads: near the exact result."""
    g = torch.Generator().manual_seed(0)
    q = torch.rand(1, 4, 9, 6, generator=g, dtype=F64) - 0.5
    k1, k2, v1, v2 = torch.rand(4, 1, 2, 9, 6, generator=g, dtype=F64) - 0.5
    for options in (
        dict(scale=-0.3),
        dict(scale="kronecker", kv_bias=(0.2, 1.0)),
        dict(form="determinant"),
        dict(form="determinant", kv_bias=(0.1, 0.5)),
        dict(window=(3, 4)),
        dict(is_causal=False, window=(3, None)),
    ):
        options = dict(options, enable_gqa=True, return_lse=True)
        exact = pyloss.tensor_attention(q, k1, k2, v1, v2, **options)
        near = pyloss.tensor_attention(q, k1, k2, v1, v2, method="lowrank", degree=7, **options)
        _assert_close(near, exact, 1e-6, 1e-6)


@pytest.mark.parametrize("poly", ["taylor", "chebyshev", "fit"])
def test_higher_degrees_come_nearer(poly):
    q, k1, k2, v1, v2 = torch.rand(5, 1, 2, 40, 4, dtype=F64) - 0.5
    exact = pyloss.tensor_attention(q, k1, k2, v1, v2)
    errors = [
        (
            pyloss.tensor_attention(
                q, k1, k2, v1, v2, method="lowrank", degree=g, poly=poly, check="none"
            )
            - exact
        )
        .abs()
        .max()
        .item()
        for g in (1, 2, 3, 4, 6)
    ]
    assert all(b < a for a, b in zip(errors, errors[1:])), errors
    assert errors[-1] < 1e-7


# --- the bound -----------------------------------------------------------------------------------


def _bound_and_error(q, keys, values, dtype, **options):
    """(stated bound, measured error) of out and lse; values in units of the largest product."""
    inputs = [t.to(dtype) for t in (q, *keys, *values)]
    q, keys, values = inputs[0], inputs[1 : len(keys) + 1], inputs[len(keys) + 1 :]
    degree, poly, scale = options["degree"], options["poly"], options["scale"]
    found = tensor_attention_error(
        q, *keys, values=values, degree=degree, poly=poly, scale=scale, samples=1, tol=3.0
    )
    out, lse = tensor_attention_n(
        q, keys, values, method="lowrank", check="none", return_lse=True, **options
    )
    wide = [t.double() for t in (q, *keys, *values)]
    exact = exact_reference(wide[0], wide[1 : len(keys) + 1], wide[len(keys) + 1 :], scale=scale)
    return (
        (found["bound_out"], (out.double() - exact[0]).abs().max().item()),
        (found["bound_lse"], (lse.double() - exact[1]).abs().max().item()),
        found,
    )


def _drawn(g, shape, size, normal):
    if normal:
        return size * torch.randn(shape, generator=g, dtype=F64)
    return size * (2 * torch.rand(shape, generator=g, dtype=F64) - 1)


def test_bound_on_random_problems():
    g = torch.Generator().manual_seed(0)
    closest, finite = 0.0, 0
    for at in range(1000):
        pick = lambda *choices: choices[int(torch.randint(len(choices), (), generator=g))]  # noqa: E731
        order, d, n = pick(1, 2, 2, 3), pick(1, 2, 4, 6), pick(1, 3, 8)
        size, normal = pick(0.3, 0.6, 1.0, 1.4), pick(False, True)
        inputs = _drawn(g, (order + 1, 1, 1, n, d), size, normal)
        values = _drawn(g, (order, 1, 1, n, pick(1, 3)), size, normal)
        degree, poly = pick(1, 2, 3, 4, 6), pick("taylor", "chebyshev", "fit")
        dtype = pick(F64, F32, torch.bfloat16)
        try:
            found = _bound_and_error(
                inputs[0], list(inputs[1:]), list(values), dtype,
                degree=degree, poly=poly, scale=pick(1.0 / d, d**-0.5, -0.4),
            )  # fmt: skip
        except RuntimeError:  # sums that vanish, which a finite bound rules out
            continue
        (bound, error), (bound_lse, error_lse), _ = found
        assert error <= bound, (at, error, bound, dtype)
        assert error_lse <= bound_lse, (at, error_lse, bound_lse, dtype)
        if math.isfinite(bound):
            finite += 1
            closest = max(closest, error / bound)
    assert finite > 500
    assert closest > 0.3  # or the bound would say nothing


@pytest.mark.parametrize("poly", ["taylor", "chebyshev"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("radius", [0.25, 0.5, 1.0, 2.0])
def test_bound_is_met_by_an_adversary(poly, degree, radius):
    """Scores where p / exp is largest and least, values that tell the two apart.

    With d = 1 a key of 1 and scores q k1: key j has score x_j, so that any scores can be had.
    """
    found = polynomials.accuracy(
        polynomials.taylor(degree) if poly == "taylor" else polynomials.chebyshev(degree, radius),
        radius,
    )
    if not found.delta < 1.0:
        pytest.skip("no bound on this range")
    x = torch.linspace(-radius, radius, 2001, dtype=F64)
    p = polynomials.taylor(degree) if poly == "taylor" else polynomials.chebyshev(degree, radius)
    f = sum(c * x**t for t, c in enumerate(p.coefficients)) / x.exp()
    low, high = x[f.argmin()], x[f.argmax()]
    worst = 0.0
    # The exact weights of the two groups of keys decide how much of the bound is met.
    delta = found.delta
    share = 0.5 * (1.0 - (1.0 - math.sqrt(1.0 - delta**2)) / delta)  # of the group with high f
    many = 400
    ratio = share / (1.0 - share) * torch.exp(low - high)
    count = max(1, min(many - 1, round(many * (ratio / (1.0 + ratio)).item())))
    for counts in (count, max(1, count - 1), count + 1):
        keys = torch.cat([high.expand(counts), low.expand(many - counts)]).view(1, 1, many, 1)
        # The edge of the range must be there for the stated R; its weight is one key's.
        keys[0, 0, 0 if high.abs() >= low.abs() else -1, 0] = radius * (
            1.0 if (high if high.abs() >= low.abs() else low) > 0 else -1.0
        )
        values = torch.cat([torch.ones(counts), -torch.ones(many - counts)]).view(1, 1, many, 1)
        one = torch.ones(1, 1, 1, 1, dtype=F64)
        (bound, error), _, stated = _bound_and_error(
            one, [keys, one], [values.to(F64), one], F64, degree=degree, poly=poly, scale=1.0
        )
        assert stated["R_bound"] == pytest.approx(radius, rel=1e-12)
        assert error <= bound
        worst = max(worst, error / bound)
    assert worst > 0.9  # the bound is sharp


def test_bound_with_bands_and_padding():
    """The same on causal, windowed and padded problems, of shared heads and unequal lengths."""
    g = torch.Generator().manual_seed(0)
    finite, closest = 0, 0.0
    for at in range(150):
        pick = lambda *choices: choices[int(torch.randint(len(choices), (), generator=g))]  # noqa: E731
        order, d, size = pick(1, 2, 3), pick(1, 2, 4), pick(0.4, 0.8, 1.2)
        lengths = [pick(1, 4, 9) for _ in range(order)]
        dtype = pick(F64, F32, torch.bfloat16)
        q = _drawn(g, (2, 4, pick(1, 7), d), size, False).to(dtype)
        keys = [_drawn(g, (2, 2, n, d), size, False).to(dtype) for n in lengths]
        values = [_drawn(g, (2, 2, n, 2), 1.0, False).to(dtype) for n in lengths]
        options = dict(
            masks=[pick(None, torch.rand(2, 1, 1, n, generator=g) < 0.7) for n in lengths],
            is_causal=pick(True, False),
            window=[pick(None, 1, 3, 20) for _ in range(order)],
            scale=pick(None, -0.4),
            enable_gqa=True,
        )
        low = dict(degree=pick(1, 2, 3, 5), poly=pick("taylor", "chebyshev", "fit"))
        stated = tensor_attention_error(q, *keys, values=values, samples=1, **low, **options)
        if not math.isfinite(stated["bound"]):
            continue
        options["q_offset"] = pick(0, 3, -2, 30)
        out, lse = tensor_attention_n(
            q, keys, values, method="lowrank", check="none", return_lse=True, **low, **options
        )
        wide = [q.double(), [k.double() for k in keys], [v.double() for v in values]]
        exact, exact_lse = tensor_attention_n(*wide, return_lse=True, **options)
        assert (out.double() - exact).abs().max() <= stated["bound_out"], at
        assert torch.equal(lse == -math.inf, exact_lse == -math.inf)
        off = (lse.double() - exact_lse).nan_to_num(0.0).abs().max()  # -inf - -inf
        assert off <= stated["bound_lse"], at
        finite += 1
        closest = max(closest, ((out.double() - exact).abs().max() / stated["bound_out"]).item())
    assert finite > 80 and closest > 0.1


@pytest.mark.parametrize(
    "sizes, scale, degree",
    [
        ((1e8, 1e8, 1e8), 1e-24, 4),  # the third power of the scale is 0 in float32
        ((1e8, 1e8, 1e-16), 1.0, 4),  # that of a key
        ((1e9, 1e-18, 1e9), 1.0, 3),
        ((1e-13, 1e-13, 1e-12), 1e38, 3),  # that of the scale is infinite
        ((1e-8, 1.0, 1e8), 1.0, 5),
    ],
)
def test_bound_with_entries_of_very_different_sizes(sizes, scale, degree):
    """The adversary of two scores, R and -R, whose entries multiply to them only together."""
    root, n = 0.5 ** (1 / 3), 64
    q, k2 = (torch.full((1, 1, 1, 1), root * size) for size in (sizes[0], sizes[2]))
    k1, one = torch.full((1, 1, n, 1), root * sizes[1]), torch.ones(1, 1, 1, 1)
    closest = 0.0
    for negative in range(8, n, 8):
        k1[:, :, :negative] = -root * sizes[1]
        stated = tensor_attention_error(q, k1, k2, scale=scale, degree=degree)["bound"]
        options = dict(scale=scale, method="lowrank", degree=degree, tol=0.1)
        tensors = [t.clone().requires_grad_() for t in (q, k1, k2, k1.sign(), one)]
        out = tensor_attention(*tensors, **options)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        exact = tensor_attention(*wide, scale=scale)
        error = (out - exact).abs().item()
        assert error <= stated
        closest = max(closest, error / stated)
        # Gradients are in units of the entries.
        out.backward()
        exact.backward()
        for got, want in zip(tensors, wide):
            torch.testing.assert_close(got.grad.double(), want.grad, rtol=0.05, atol=0.0)
    assert closest > 0.1  # odd degrees are worst elsewhere


@pytest.mark.parametrize(
    "dtype, size", [(torch.float16, 3e-4), (torch.bfloat16, 1e-20), (F32, 1e-22)]
)
def test_bound_with_outputs_below_the_normal_numbers(dtype, size):
    g = torch.Generator().manual_seed(0)
    inputs = _drawn(g, (3, 1, 1, 8, 4), 0.5, False)
    values = _drawn(g, (2, 1, 1, 8, 3), size, False)
    (bound, error), _, found = _bound_and_error(
        inputs[0], list(inputs[1:]), list(values), dtype, degree=6, poly="taylor", scale=0.25
    )
    assert found["bound"] * size**2 < error <= bound


@pytest.mark.parametrize("dtype", [F32, F64, torch.bfloat16])
def test_features_and_heads_of_very_different_sizes(dtype):
    """Balanced one by one; padding may be of any size, or no number."""
    g = torch.Generator().manual_seed(0)
    q, *keys = (0.6 * _drawn(g, (1, h, 9, 4), 1.0, False) for h in (4, 2, 2))
    values = [_drawn(g, (1, 2, 9, 3), 1.0, False) for _ in range(2)]
    apart = torch.tensor([[1e9, 1e-9, 1.0, 0.0], [1e-9, 1e5, 1e-7, 1.0]], dtype=F64).view(
        1, 2, 1, 4
    )
    keys[0] = keys[0] * apart
    q = q / torch.where(apart > 0, apart, 1.0).repeat_interleave(2, 1)
    q, *keys = (t.to(dtype) for t in (q, *keys))
    values = [v.to(dtype) for v in values]
    mask = torch.arange(9) < 7
    keys[0][:, :, 7], keys[0][:, :, 8] = 1e30, math.nan
    options = dict(enable_gqa=True, mask1=mask, scale=-1.0)
    wide = [t.double() for t in (q, *keys, *values)]
    wide[1] = wide[1].nan_to_num(0.0)
    exact = tensor_attention(*wide, **options)
    for causal in (False, True):
        out = tensor_attention(
            q, *keys, *values, method="lowrank", degree=6, tol=0.1, is_causal=causal, **options
        )
        assert out.dtype == dtype
        exact = tensor_attention(*wide, is_causal=causal, **options)
        tolerance = 5e-3 if dtype == torch.bfloat16 else 2e-4  # R^7 / 7!
        torch.testing.assert_close(out.double(), exact, rtol=0.0, atol=tolerance)
    # No key on one axis: nothing is seen, whatever the powers of the others are.
    none = keys[1][:, :, :0], values[1][:, :, :0]
    out = tensor_attention(
        1e20 * q, keys[0].nan_to_num(0.0), none[0], values[0], none[1],
        method="lowrank", degree=6, enable_gqa=True,
    )  # fmt: skip
    assert not out.any()
    # Nobody has looked at the numbers here.
    with pytest.raises(RuntimeError, match="not finite"):
        scaled = q * 1e-20, keys[0].nan_to_num(0.0) * 1e20
        options = dict(enable_gqa=True, method="lowrank", degree=9, check="none")
        tensor_attention(*(t.float() for t in (*scaled, keys[1], *values)), **options)


def test_bound_with_many_keys_in_float32():
    g = torch.Generator().manual_seed(0)
    q, k1, k2 = (2 * torch.rand(1, 1, n, 4, generator=g) - 1 for n in (16, 5000, 70))
    v1, v2 = torch.ones(1, 1, 5000, 2), torch.ones(1, 1, 70, 2)
    (bound, error), (bound_lse, error_lse), _ = _bound_and_error(
        q.double(), [k1.double(), k2.double()], [v1.double(), v2.double()], F32,
        degree=8, poly="taylor", scale=0.25,
    )  # fmt: skip
    assert error <= bound < 1e-2
    assert error_lse <= bound_lse


def _rounding(device, dtype=F32, n=4096, d=16, degree=2, order=2, causal=False, window=0, dv=None):
    from pyloss.functional import _lowrank as lowrank

    q = torch.zeros((), dtype=dtype).expand(1, 1, n, d)
    p = lowrank.Problem(
        q, [q] * order, dv or d, [None] * order, 1.0, causal, (window,) * order, device
    )
    return lowrank.rounding_bound(p, 1.0, rank(d, degree), degree)


def test_rounding_of_tensor_cores():
    """On CUDA factors are split into tf32 and sums are cut off.

    The numbers are those of kernels/tensor_attention_lowrank: 256 tokens, n / 256 of them,
    ranges of 1024, all features in one sum; three products, each off by 3 * 2^-20.
    """
    cpu, cuda = _rounding("cpu"), _rounding("cuda")
    chain = 2 * (256 + 16 + 1 + 4) + rank(16, 2) + 3 * 4 + 4
    want = 2.0 * (chain * 2.0**-23 + 3 * 3 * 2.0**-20)
    assert cuda == pytest.approx(want, rel=1e-3)
    assert cpu < cuda < 1e-3
    # More rounds: more features, more axes, more keys.
    assert _rounding("cuda", degree=3) > cuda and _rounding("cuda", order=3) > cuda
    assert _rounding("cuda", n=65536) > cuda
    # What the kernels do not take runs on the reference, in float32 sums.
    for options in (dict(d=129, degree=1), dict(dv=200), dict(d=129, degree=1, window=8)):
        assert 0.0 < _rounding("cuda", **options) < 1e-2
    # Causal: chunks of 256 tokens, their states one after the other, then token by token.
    chain += 2 * (256 + 16)
    want = 2.0 * (chain * 2.0**-23 + 3 * 3 * 2.0**-20)
    assert _rounding("cuda", causal=True) == pytest.approx(want, rel=1e-3)
    # Windows: chunks no shorter than one, in which a key comes and one goes with each token.
    for window, length in ((100, 256), (300, 768)):  # 2 window - 1 keys in sight
        chain = 2 * (256 + 16 + 1 + 4 + 2 * length) + rank(16, 2) + 3 * 4 + 4
        want = 2.0 * (chain * 2.0**-23 + 3 * 3 * 2.0**-20)
        assert _rounding("cuda", window=window) == pytest.approx(want, rel=1e-3)
    assert _rounding("cuda", F64) < 1e-11
    assert _rounding("cpu") < _rounding("mps") < 1e-2
    half = _rounding("cuda", torch.bfloat16)
    assert half == pytest.approx(cuda + 2.0**-8)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_rounding_where_torch_may_use_tf32(tf32):
    """Wide heads on CUDA run on products of PyTorch, which the user may have set to tf32."""
    assert _rounding("cuda", d=129, degree=1) > 2.0 * 3 * 2.0**-10
    assert _rounding("cuda", F64, causal=True) < 1e-11
    assert _rounding("cuda", causal=True, window=8) < 1e-3
    assert _rounding("cuda") < 1e-3  # the kernels ask for what they want


def test_rounding_has_no_bound_where_it_may_eat_the_sum():
    from pyloss.functional import _lowrank as lowrank

    q = torch.zeros(()).expand(1, 1, 4096, 16)
    p = lowrank.Problem(q, [q, q], 16, [None, None], 1.0, False, (0, 0))
    assert lowrank.rounding_bound(p, 1e5, 153, 2) == math.inf
    assert lowrank.rounding_bound(p, 1e3, 153, 2) > 1e3 * lowrank.rounding_bound(p, 1.0, 153, 2)


def test_problems_know_their_device(monkeypatch):
    """The bound is that of the device the tensors are on, also when it is judged later."""
    from pyloss.functional import _lowrank as lowrank

    seen = []
    kept = lowrank.choose
    monkeypatch.setattr(lowrank, "choose", lambda p, o: seen.append(p) or kept(p, o))
    q = torch.rand(1, 1, 4, 2)
    for t in (q, torch.empty(1, 1, 4, 2, device="meta")):
        pyloss.tensor_attention(t, t, t, t, t, method="lowrank", degree=2, check="none")
    assert [p.device for p in seen] == ["cpu", "meta"]
    seen[0].device = "cuda"
    assert seen[0].without_numbers().device == "cuda"


def test_split_products_are_as_near_as_the_bound_says():
    """Three products of factors cut to tf32, the parts cut off too, as the bound has them."""
    from pyloss.ops.tensor_attention_lowrank.rounding import _TF32, _TF32X3

    def cut(x):  # 10 bits after the point, toward 0: the worse of what hardware does
        return (x.view(torch.int32) & ~0x1FFF).view(F32)

    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1 << 20, generator=g) + 0.5 for _ in range(2))
    large = [cut(x) for x in (a, b)]
    small = [cut(x - x_large) for x, x_large in zip((a, b), large)]
    product = a.double() * b.double()
    split = sum(
        x.double() * y.double()
        for x, y in ((large[0], large[1]), (small[0], large[1]), (large[0], small[1]))
    )
    error = ((split - product) / product).abs().max().item()
    assert _TF32X3 / 8 < error <= _TF32X3
    plain = ((large[0].double() * large[1].double() - product) / product).abs().max().item()
    assert _TF32 / 4 < plain <= _TF32


def test_bounds_of_scores():
    from pyloss.functional import _lowrank as lowrank

    g = torch.Generator().manual_seed(0)
    for order in (1, 2, 3):
        for size in (0.5, 3.0):
            q = size * torch.randn(2, 4, 6, 5, generator=g, dtype=F64)
            keys = [torch.randn(2, 2, 4 + x, 5, generator=g, dtype=F64) for x in range(order)]
            masks = [None] * order
            p = lowrank.Problem(q, keys, 1, masks, -0.7, False, (0,) * order)
            names = ",".join(f"bh{a}l" for a in "jkm"[:order])
            s = 0.7 * torch.einsum(
                f"bhil,{names}->bhi{'jkm'[:order]}", q, *(k.repeat_interleave(2, 1) for k in keys)
            )
            largest = s.abs().max().item()
            for bound in (lowrank.bound_by_features(p), lowrank.bound_by_norms(p)):
                assert largest <= bound.item()
            assert largest <= lowrank.bound_by_entries(p, lowrank.largest_entries(p))
            assert lowrank.measured_bound(p) == min(
                lowrank.bound_by_features(p).item(), lowrank.bound_by_norms(p).item()
            )
            assert lowrank.sampled_scores(p, 20000).abs().max().item() == pytest.approx(
                largest, rel=0.2
            )
    # Equal entries: the norms know the score, the features too.
    one = torch.full((1, 1, 3, 4), 0.5)
    p = lowrank.Problem(one, [one, one], 1, [None, None], 1.0, False, (0, 0))
    assert lowrank.bound_by_features(p).item() == pytest.approx(0.5)
    assert lowrank.bound_by_norms(p).item() == pytest.approx(0.5, rel=1e-4)
    # Heads of very different sizes: the powers of the small one are not lost beside the large one.
    q, k1 = torch.ones(1, 2, 1, 1), torch.ones(1, 2, 3, 1)
    q[0, 0], k1[0, 0], k1[0, 1] = 1e-20, 1e20, 1e-20
    p = lowrank.Problem(q, [k1, torch.ones(1, 2, 3, 1)], 1, [None, None], 1.0, False, (0, 0))
    assert lowrank.measured_bound(p) == pytest.approx(1.0, rel=1e-4)


# --- polynomials ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_largest_entry(dtype):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 3, 17, 1000, (1 << 17) + 5):
        x = torch.randn(n, generator=generator).to(dtype)
        for at, value in ((0, -9.0), (n - 1, 9.5), (n // 2, -math.inf), (n // 2, math.inf)):
            y = x.clone()
            y[at] = value
            for t in (x, y, y.requires_grad_()):
                assert largest_entry(t) == t.abs().max().item()
            for bad in (math.nan, -math.nan):
                y = y.detach().clone()
                y[n // 3] = bad
                assert math.isnan(largest_entry(y))
    x = torch.randn(7, 40, generator=generator).to(dtype)
    assert largest_entry(x[:, ::3]) == x[:, ::3].abs().max().item()
    assert largest_entry(x[1:3].T) == x[1:3].abs().max().item()
    assert largest_entry(-torch.zeros(5, dtype=dtype)) == 0.0


@pytest.mark.parametrize(
    "radius, taylor, chebyshev",
    [(0.125, 2, 2), (0.25, 3, 2), (0.5, 4, 3), (1.0, 6, 5), (2.0, 9, 7), (4.0, 17, 11)],
)
def test_degrees_for_a_thousandth(radius, taylor, chebyshev):
    for want, make in (
        (taylor, polynomials.taylor),
        (chebyshev, lambda g: polynomials.chebyshev(g, radius)),
    ):
        degree = next(
            g for g in range(1, 30) if polynomials.accuracy(make(g), radius).delta <= 1e-3
        )
        assert degree == want


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("radius", [0.1, 1.0, 3.0])
def test_accuracy_holds_between_the_points(degree, radius):
    x = torch.rand(200000, dtype=F64) * 2 * radius - radius
    samples = torch.randn(2000, dtype=F64) * radius / 3
    for p in (
        polynomials.taylor(degree),
        polynomials.chebyshev(degree, radius),
        polynomials.fit(degree, polynomials.clustered(samples)),
    ):
        found = polynomials.accuracy(p, radius)
        f = sum(c * x**t for t, c in enumerate(p.coefficients)) / (x - p.centre).exp()
        assert found.low <= f.min().item() and f.max().item() <= found.high
        if math.isfinite(found.delta):
            tight = (f.max() - f.min()) / (f.max() + f.min())
            assert tight.item() <= found.delta <= 1.02 * tight.item() + 1e-9


def test_chebyshev_interpolates():
    for degree in (1, 4, 9):
        nodes = [math.cos(math.pi * (k + 0.5) / (degree + 1)) for k in range(degree + 1)]
        p = polynomials.chebyshev(degree, 1.5)
        for x in nodes:
            value = sum(c * (1.5 * x) ** t for t, c in enumerate(p.coefficients))
            assert value == pytest.approx(math.exp(1.5 * x), rel=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
@pytest.mark.parametrize("degree", [1, 3, 20])
def test_polynomials_for_tiny_scores(degree, size):
    """Powers of the range leave the numbers; value and slope near 0 are those of exp."""
    x = torch.tensor([-size, 0.0, size], dtype=F64)
    for p in (
        polynomials.chebyshev(degree, size), polynomials.fit(degree, polynomials.clustered(x))
    ):  # fmt: skip
        found = polynomials.accuracy(p, size)
        assert found.delta < 1e-11 and found.condition < 1.01
        c = torch.tensor(p.coefficients, dtype=F32)
        assert torch.isfinite(c).all()
        assert (c[0].item(), c[1].item()) == pytest.approx((1.0, 1.0), rel=1e-4)
        for poly in ("chebyshev", "fit"):
            q, k, v = torch.full((1, 1, 2, 1), size), torch.ones(1, 1, 3, 1), torch.rand(1, 1, 3, 1)
            q.requires_grad_()
            options = dict(method="lowrank", degree=degree, poly=poly, tol=0.1)
            out = tensor_attention(q, k, k, v, v, **options)
            torch.testing.assert_close(out, (v.mean() ** 2).expand_as(out))
            (slope,) = torch.autograd.grad(out.sum(), q)
            assert slope.abs().max() < 1e-4  # equal keys: it is rounding


def test_fit_finds_a_polynomial():
    """Where exp itself is nearly a polynomial of the degree, the fit is it."""
    x = torch.linspace(-0.01, 0.01, 500, dtype=F64)
    p = polynomials.fit(3, polynomials.clustered(x))
    value = sum(c * x**t for t, c in enumerate(p.coefficients))
    torch.testing.assert_close(value, (x - p.centre).exp(), rtol=1e-9, atol=0)


def test_weight_bound_is_sharp():
    for delta in (0.01, 0.3, 0.9):
        best = 0.0
        for share in torch.linspace(0, 1, 10001, dtype=F64)[1:-1].tolist():
            mean = 1 + delta * (2 * share - 1)
            moved = share * abs((1 + delta) / mean - 1) + (1 - share) * abs((1 - delta) / mean - 1)
            best = max(best, moved)
        assert best <= polynomials.weight_bound(delta) <= best * (1 + 1e-6)
    assert polynomials.weight_bound(0.0) == 0.0
    assert polynomials.weight_bound(1.0) == math.inf


def test_the_triton_kernels_say_what_they_leave_to_the_reference(monkeypatch, caplog):
    pytest.importorskip("triton")
    problem = PROBLEMS["plain"]
    q, keys, values = problem.tensors(F64)
    masks = problem.key_masks()
    args = (q, keys, values, masks, *problem.settings())
    monkeypatch.setattr(backends, "_fallbacks_logged", set())
    with caplog.at_level(logging.INFO, logger=backends._log.name):
        out, lse, y, states = triton.forward(*args)
    assert "tensor_attention_lowrank_fwd runs on the reference" in caplog.text
    torch.testing.assert_close(out, cpu.forward(*args)[0])
    monkeypatch.setenv("PYLOSS_STRICT", "1")
    with pytest.raises(RuntimeError, match="PYLOSS_STRICT is set and tensor_attention_lowrank_fwd"):
        triton.forward(*args)
    saved = (q, keys, values, masks, out, y, states, *problem.settings())
    with pytest.raises(RuntimeError, match="PYLOSS_STRICT is set and tensor_attention_lowrank_bwd"):
        triton.backward(torch.ones_like(out), None, *saved)


def test_settings_are_hashable():
    """torch.compile guards on them."""
    assert isinstance(hash(Problem().settings()), int)
    assert Settings((1.0,), 0.0, False, (0, 3), 0).banded
