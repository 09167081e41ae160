"""Relative accuracy of losses and gradient entries over every magnitude, and property tests.

The bound is that of ``pyloss.testing.accuracy_bound``: eight float32 roundings plus the rounding of
the exponent.  ``F.cross_entropy`` misses it by five orders of magnitude for confident rows, where
its loss rounds to 0.
"""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyloss
from pyloss.reference import row_softmax as reference
from pyloss.testing import accuracy_bound, make_logits, make_target, relative_error

TAUS = (0.0, 0.3, 0.5, 1.0, 1 + 1e-6, 1.5, 1.7, 2.0, 3.0)


def _rows_of_every_magnitude(classes: int, offset: float, dtype=torch.float32):
    """Logits whose target is from 1e4 below to 75 above the others, and the target's class."""
    gaps = torch.cat(
        [
            torch.linspace(-20, 75, 120, dtype=torch.float64),
            -torch.logspace(1, 4, 40, dtype=torch.float64),
        ]
    )
    x = make_logits((len(gaps), classes), torch.float64, scale=1.0)
    y = torch.arange(len(gaps)) % classes
    x.scatter_(1, y[:, None], gaps[:, None])
    return (x + offset).to(dtype), y


def _check_bound(actual, exact, tau, nll, what):
    """Every entry of a size in [1e-30, 1e4] is within the bound."""
    size = exact.abs()
    judged = (size >= 1e-30) & (size <= 1e4)
    assert judged.any()
    error = relative_error(actual, exact) / accuracy_bound(exact, tau, nll)
    error = error[judged]
    assert not error.isnan().any(), what
    assert error.max() <= 1.0, f"{what}: {error.max().item():.3g} times the bound"


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("classes", [2, 5, 40, 1000])
@pytest.mark.parametrize("tau", TAUS)
def test_float32_rows(tau, classes, offset):
    x, y = _rows_of_every_magnitude(classes, offset)
    z = x.double().requires_grad_()
    exact = reference(z, y, tau=tau, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), z)
    nll = reference(x.double(), y, reduction="none")

    x.requires_grad_()
    for reduction in ("none", "sum"):
        loss = pyloss.fused_cross_entropy(x, y, tau=tau, reduction=reduction)
        if reduction == "none":
            _check_bound(loss, exact, tau, nll, "loss")
        (g,) = torch.autograd.grad(loss.sum(), x)
        _check_bound(g, exact_grad, tau, nll[:, None], f"gradient of {reduction}")


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7, 2.0])
def test_float32_strided_rows(tau, offset):
    """The kernel for (N, C, d) has its own loops."""
    x, y = _rows_of_every_magnitude(21, offset)
    z = x.double().requires_grad_()
    exact = reference(z, y, tau=tau, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), z)
    nll = reference(x.double(), y, reduction="none")
    volume = x.view(2, -1, 21).transpose(1, 2).contiguous().requires_grad_()
    loss = pyloss.fused_cross_entropy(volume, y.view(2, -1), tau=tau, reduction="none")
    _check_bound(loss.flatten(), exact, tau, nll, "loss")
    (g,) = torch.autograd.grad(loss.sum(), volume)
    g = g.transpose(1, 2).reshape(x.shape)
    _check_bound(g, exact_grad, tau, nll[:, None], "gradient")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tau", [0.0, 1.0, 1.7, 2.0])
def test_half_logits(dtype, tau):
    """float32 loss as accurate as for float32 logits; gradient entries within one ulp."""
    x, y = _rows_of_every_magnitude(40, 0.0, dtype)
    z = x.double().requires_grad_()
    exact = reference(z, y, tau=tau, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), z)
    nll = reference(x.double(), y, reduction="none")
    x.requires_grad_()
    loss = pyloss.fused_cross_entropy(x, y, tau=tau, reduction="none", loss_dtype=torch.float32)
    _check_bound(loss, exact, tau, nll, "loss")
    (g,) = torch.autograd.grad(loss.sum(), x)
    size = exact_grad.abs()
    judged = (size > 1e-30 if dtype == torch.bfloat16 else size > 1e-4) & (size <= 1e4)
    eps = torch.finfo(dtype).eps
    assert (relative_error(g, exact_grad)[judged] <= eps).all()


def _decimal_row(x: list[float], y: int, tau: float) -> tuple[float, list[float]]:
    """Loss and gradient of one row in 60 digits."""
    z = [Decimal(v) for v in x]
    weights = [(v - z[y]).exp() for v in z]
    total = sum(weights)
    others = sum(w for j, w in enumerate(weights) if j != y)
    a = Decimal(1) - Decimal(tau)
    loss = total.ln() if a == 0 else ((a * total.ln()).exp() - 1) / a
    slope = (a * total.ln()).exp()
    grad = [slope * w / total for w in weights]
    grad[y] = -slope * others / total
    return float(loss), [float(g) for g in grad]


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("function", ["pyloss", "reference"])
def test_float64_against_decimal(function, tau):
    getcontext().prec = 60
    f = pyloss.fused_cross_entropy if function == "pyloss" else reference
    x = make_logits((8, 4), torch.float64)
    y = torch.arange(8) % 4
    gaps = torch.tensor([-200.0, -30, -5, 0, 3, 20, 45, 72], dtype=torch.float64)
    x = x.scatter(1, y[:, None], gaps[:, None]).requires_grad_()
    loss = f(x, y, tau=tau, reduction="none")
    (g,) = torch.autograd.grad(loss.sum(), x)
    for row in range(8):
        value, grad = _decimal_row(x[row].tolist(), int(y[row]), tau)
        assert loss[row].item() == pytest.approx(value, rel=1e-12, abs=0)
        assert g[row].tolist() == pytest.approx(grad, rel=1e-12, abs=0)


@pytest.mark.parametrize("classes", [128256, 262144])
def test_large_vocabulary_does_not_drift(classes):
    """A float32 running sum over 262144 nearly equal terms would be off by 1e-4 and more."""
    x = make_logits((2, classes), scale=0.01)
    y = torch.tensor([0, classes - 1])
    exact = reference(x.double(), y, reduction="none")
    loss = pyloss.fused_cross_entropy(x, y, reduction="none")
    assert (relative_error(loss, exact) < 1e-6).all()


def test_mean_of_many_rows_does_not_drift():
    x = make_logits((50_000, 4))
    y = make_target((50_000, 4))
    exact = reference(x.double(), y)
    assert relative_error(pyloss.fused_cross_entropy(x, y), exact) < 5e-7
    one = torch.zeros(300_000, 2)
    loss = pyloss.fused_cross_entropy(one, torch.zeros(300_000, dtype=torch.long), reduction="sum")
    assert loss.item() == pytest.approx(300_000 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.5, 2.0])
def test_gradient_rows_sum_to_zero(tau):
    x = make_logits((20, 1000), requires_grad=True)
    loss = pyloss.fused_cross_entropy(x, make_target((20, 1000)), tau=tau, reduction="none")
    (g,) = torch.autograd.grad(loss.sum(), x)
    assert (g.double().sum(1).abs() <= 1e-6 * g.abs().amax(1)).all()


# --- properties ------------------------------------------------------------------------------

taus = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0]), st.floats(0.0, 4.0))
seeds = st.integers(0, 2**31 - 1)
class_counts = st.integers(1, 70)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def _sample(seed: int, classes: int, rows: int = 4):
    x = make_logits((rows, classes), torch.float64, seed=seed)
    y = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return x, y


def _rows_and_gradient(x, y, **options):
    x = x.detach().requires_grad_()
    loss = pyloss.fused_cross_entropy(x, y, reduction="none", **options)
    (g,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), g


@quick
@given(seeds, class_counts, taus, st.floats(-1e3, 1e3))
def test_shift_invariance(seed, classes, tau, shift):
    x, y = _sample(seed, classes)
    for smoothing in (0.0, 0.2):
        a, g = _rows_and_gradient(x, y, tau=tau, label_smoothing=smoothing)
        b, h = _rows_and_gradient(x + shift, y, tau=tau, label_smoothing=smoothing)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-10 * max(1.0, g.abs().max().item()))


@quick
@given(seeds, class_counts, taus)
def test_permutation_equivariance(seed, classes, tau):
    x, y = _sample(seed, classes)
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    for smoothing in (0.0, 0.2):
        a, g = _rows_and_gradient(x, y, tau=tau, label_smoothing=smoothing)
        b, h = _rows_and_gradient(x[:, order], place[y], tau=tau, label_smoothing=smoothing)
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(g[:, order], h, rtol=1e-11, atol=1e-13 * (1 + g.abs().max()))
    rows = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    c, _ = _rows_and_gradient(x[rows], y[rows], tau=tau)
    d, _ = _rows_and_gradient(x, y, tau=tau)
    assert torch.equal(c, d[rows])


@quick
@given(seeds, class_counts, taus)
def test_bounds(seed, classes, tau):
    x, y = _sample(seed, classes)
    loss, g = _rows_and_gradient(x, y, tau=tau)
    assert (loss >= 0).all()
    if tau > 1:
        assert (loss <= 1 / (tau - 1)).all()
    at_target = g.gather(1, y[:, None]).squeeze(1)
    assert (at_target <= 0).all()
    others = g.scatter(1, y[:, None], 0.0)
    assert (others >= 0).all()
    torch.testing.assert_close(others.sum(1), -at_target, rtol=1e-11, atol=1e-14)
    if tau >= 1:
        assert (at_target >= -1).all()
    if classes == 1:
        assert (loss == 0).all() and (g == 0).all()


@quick
@given(seeds, class_counts, taus, taus)
def test_monotone_in_tau(seed, classes, a, b):
    x, y = _sample(seed, classes)
    low, high = sorted((a, b))
    loss_low, _ = _rows_and_gradient(x, y, tau=low)
    loss_high, _ = _rows_and_gradient(x, y, tau=high)
    assert (loss_high <= loss_low * (1 + 1e-13)).all()


@quick
@given(seeds, st.integers(2, 70), st.floats(0.0, 1.0))
def test_smoothing_is_linear(seed, classes, smoothing):
    x, y = _sample(seed, classes)
    for tau in (1.0, 1.5):
        plain, _ = _rows_and_gradient(x, y, tau=tau)
        flat, _ = _rows_and_gradient(x, y, tau=tau, label_smoothing=1.0)
        mixed, _ = _rows_and_gradient(x, y, tau=tau, label_smoothing=smoothing)
        torch.testing.assert_close(mixed, (1 - smoothing) * plain + smoothing * flat)


@quick
@given(seeds, st.integers(2, 40), taus, st.floats(0.3, 3.0), st.floats(0.3, 3.0))
def test_transforms_are_a_change_of_logits(seed, classes, tau, scale, temperature):
    x, y = _sample(seed, classes)
    a, _ = _rows_and_gradient(x, y, tau=tau, logit_scale=scale, temperature=temperature)
    b, _ = _rows_and_gradient(x * (scale / temperature), y, tau=tau)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    a, _ = _rows_and_gradient(
        x, y, tau=tau, logit_scale=scale, softcap=3.0, temperature=temperature
    )
    b, _ = _rows_and_gradient(3.0 * torch.tanh(scale * x / 3.0) / temperature, y, tau=tau)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
