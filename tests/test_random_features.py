"""Risk of kernel and random-feature regression: the equations, closed forms, and regressions that
are simulated."""

from __future__ import annotations

import math

import pytest
import torch

import pyloss
from pyloss.analysis import kernel_eigensystem, optimal_ridge, powerlaw_fit_ratio, rf_risk

F64 = torch.float64


def power(modes: int, alpha: float, beta: float):
    i = torch.arange(1, modes + 1, dtype=F64)
    return i**-alpha, i**-beta


LAM, COEFFS = power(1000, 1.5, 1.8)
N = torch.tensor([1.0, 10, 64, 500, 999, 1000, 1001, 5000], dtype=F64).unsqueeze(1)
K = torch.tensor([1.0, 20, 64, 999.5, 1000, 3000, math.inf], dtype=F64)


@pytest.mark.parametrize("ridge", [0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e6])
def test_equations_hold_and_errors_are_those_of_the_formula(ridge) -> None:
    found = rf_risk(LAM, COEFFS, N, K, ridge=ridge, noise=0.1)
    gamma, kappa = found.gamma.unsqueeze(-1), found.kappa.unsqueeze(-1)
    p = LAM / (LAM + gamma)
    z, q = p.sum(-1), p.square().sum(-1)
    if ridge:
        first = (z + ridge / found.kappa - N) / N
        assert first[found.kappa > 1e-200].abs().max() < 1e-10
        assert (z + K * found.kappa / found.gamma - K)[:, :-1].abs().max() < 1e-9
        torch.testing.assert_close(found.kappa[:, -1], found.gamma[:, -1])
    torch.testing.assert_close(found.z, z, rtol=1e-11, atol=0)
    torch.testing.assert_close(found.q, q, rtol=1e-11, atol=0)
    # As the paper writes them, where nothing cancels.
    k = K.clamp(max=1e12)
    above = gamma / (LAM + gamma) - kappa * LAM / (LAM + gamma) ** 2 * (k / (k - q)).unsqueeze(-1)
    below = 1 - (q * (k - 2 * z) + z**2) / (N * (k - q))
    test = (above @ COEFFS + 0.1) / below
    safe = below > 1e-3
    assert safe.sum() > 20
    torch.testing.assert_close(found.test[safe], test[safe], rtol=1e-8, atol=0)
    train = ((N - z) / N) ** 2 * found.test
    torch.testing.assert_close(found.train[safe], train[safe], rtol=1e-8, atol=1e-12)


def test_without_a_ridge() -> None:
    found = rf_risk(LAM, COEFFS, N, K, noise=0.1)
    least = torch.minimum(N, K)
    torch.testing.assert_close(found.z, least.clamp(max=1000.0))
    assert torch.equal(found.test.isinf(), (least.minimum(torch.tensor(1000.0)) == N)
                       & ((N == K) | (N == 1000)))  # fmt: skip
    assert (found.train[:6][(least == N)[:6]] == 0).all()
    assert (found.kappa[N.expand_as(least) > K.expand_as(least)] == 0).all()
    # All that can be learnt is: the error is that of the noise alone, as of least squares.
    torch.testing.assert_close(found.test[-1, -2:], torch.full((2,), 0.1 / (1 - 0.2), dtype=F64))
    torch.testing.assert_close(found.train[-1, -2:], torch.full((2,), 0.1 * 0.8, dtype=F64))
    assert found.gamma[-1, -1] == 0
    exact = rf_risk(LAM, COEFFS, torch.tensor([1000, 2000]), noise=0.0)
    assert exact.test.tolist() == exact.train.tolist() == [0, 0]


def test_a_coefficient_that_cannot_be_learnt_is_noise() -> None:
    lam = torch.cat([LAM[:20], torch.zeros(2, dtype=F64)])
    coeffs = torch.cat([COEFFS[:20], torch.tensor([0.2, 0.1], dtype=F64)])
    n = torch.tensor([10.0, 50.0])
    for options in (dict(), dict(ridge=0.1), dict(k=15), dict(k=30, ridge=0.1)):
        found = rf_risk(lam, coeffs, n, **options)
        same = rf_risk(LAM[:20], COEFFS[:20], n, noise=0.3, **options)
        for a, b in zip(found, same, strict=True):
            torch.testing.assert_close(a, b)
    nothing = rf_risk(torch.zeros(3), torch.ones(3), 5, ridge=torch.tensor([0, 1e-3, math.inf]))
    torch.testing.assert_close(nothing.test, torch.full((3,), 3.0, dtype=F64))
    torch.testing.assert_close(nothing.train, nothing.test)


def test_limits_of_features_and_ridge() -> None:
    kernel = rf_risk(LAM, COEFFS, 64, ridge=1e-3)
    many = rf_risk(LAM, COEFFS, 64, 1e7, ridge=1e-3)
    for a, b in zip(many, kernel, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1.0, float(b)))
    endless = rf_risk(LAM, COEFFS, 64, K, ridge=math.inf, noise=0.1)
    large = rf_risk(LAM, COEFFS, 64, K, ridge=1e12, noise=0.1)
    torch.testing.assert_close(endless.test, large.test)
    torch.testing.assert_close(endless.test, (COEFFS.sum() + 0.1).expand(7))
    assert endless.gamma.isinf().all() and (endless.z == 0).all()


def test_nothing_to_learn() -> None:
    """Without noise the error is 0, but where n = k, where no number bounds it."""
    found = rf_risk(LAM, 0 * COEFFS, 8, torch.tensor([4.0, 8.0, 16.0])).test
    assert found.tolist() == [0, math.inf, 0]


def test_isotropic_closed_form() -> None:
    """p equal eigenvalues: gamma solves p l / (l + gamma) + delta / gamma = n, a quadratic."""
    p, level, n = 30, 0.7, torch.tensor([5.0, 29.0, 30.0, 31.0, 200.0], dtype=F64)
    for ridge in (1e-3, 1.0):
        found = rf_risk(torch.full((p,), level), torch.ones(p), n, ridge=ridge, noise=0.5)
        b = n * level - p * level - ridge
        gamma = (-b + (b * b + 4 * n * ridge * level).sqrt()) / (2 * n)
        torch.testing.assert_close(found.gamma, gamma, rtol=1e-6, atol=0)  # level is a float32
        g = gamma / (level + gamma)
        test = (p * g**2 + 0.5) / (1 - p * (1 - g) ** 2 / n)
        torch.testing.assert_close(found.test, test, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("n", "k", "ridge", "differentiable"),
    [
        (3.0, math.inf, 0.01, ("n", "ridge")),
        (3.0, 6.0, 0.01, ("n", "k", "ridge")),
        (3.0, 6.0, 0.0, ("n", "k")),
        (6.0, 3.0, 0.0, ("n", "k")),
        (4.0, 4.0, 0.1, ("ridge",)),
        (20.0, 15.0, 0.0, ("n", "k")),  # gamma is 0
    ],
)
def test_derivatives(n, k, ridge, differentiable) -> None:
    lam, coeffs = power(5, 1.5, 1.8)
    args = dict(n=n, k=k, ridge=ridge, noise=0.1)
    tensors = [lam.requires_grad_(), coeffs.requires_grad_()]
    names = [*differentiable, "noise"]
    tensors += [torch.tensor(args[name], dtype=F64, requires_grad=True) for name in names]

    def function(lam, coeffs, *rest):
        return rf_risk(lam, coeffs, **{**args, **dict(zip(names, rest))})[:5]

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(lambda *a: function(*a)[0], tensors, fast_mode=True)
    if ridge == 0:  # at the edge: from one side
        at = torch.zeros((), dtype=F64, requires_grad=True)
        args["ridge"] = at
        test = rf_risk(lam, coeffs, **args).test
        (slope,) = torch.autograd.grad(test, at)
        args["ridge"] = 1e-8
        quotient = (rf_risk(lam, coeffs, **args).test - test).detach() / 1e-8
        torch.testing.assert_close(slope, quotient, rtol=1e-4, atol=0)


def test_an_infinite_risk_leaves_the_gradients_of_others_alone() -> None:
    lam, coeffs = power(8, 1.5, 1.8)
    lam.requires_grad_()
    test = rf_risk(lam, coeffs, torch.tensor([4, 4, 8]), torch.tensor([4.0, 6.0, math.inf])).test
    assert test.isinf().tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(test[1], lam)
    (alone,) = torch.autograd.grad(rf_risk(lam, coeffs, 4, 6).test, lam)
    torch.testing.assert_close(gradient, alone)


def test_nan_stays_with_what_it_belongs_to() -> None:
    found = rf_risk(LAM, COEFFS, torch.tensor([8, math.nan]), ridge=0.1)
    assert found.test.isnan().tolist() == [False, True]
    assert rf_risk(LAM * math.nan, COEFFS, 8, ridge=0.1).test.isnan()
    assert optimal_ridge(LAM * math.nan, COEFFS, 8).isnan()
    assert optimal_ridge(0 * LAM, COEFFS, 8, noise=math.nan).isnan()


def test_settings_in_parts(monkeypatch) -> None:
    from pyloss.analysis import random_features

    whole = rf_risk(LAM, COEFFS, N, K, ridge=0.01)
    best = optimal_ridge(LAM[:50], COEFFS[:50], N, K[2:4], noise=0.1)
    monkeypatch.setattr(random_features, "_CHUNK", 300)
    for a, b in zip(whole, rf_risk(LAM, COEFFS, N, K, ridge=0.01), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        best, optimal_ridge(LAM[:50], COEFFS[:50], N, K[2:4], noise=0.1), rtol=1e-5, atol=0
    )


# --------------------------------------------------------------------------------------------------
# The best ridge


def test_the_best_ridge_is_best_and_with_it_more_is_better() -> None:
    lam, coeffs = power(300, 1.5, 1.8)
    k = torch.tensor([20, 32, 64, 128, 256, 1000, math.inf])
    n = torch.tensor([[16.0], [64.0], [256.0]])
    ridge = optimal_ridge(lam, coeffs, n, k, noise=0.1)
    best = rf_risk(lam, coeffs, n, k, ridge=ridge, noise=0.1).test
    assert (best.diff(dim=0) < 0).all() and (best.diff(dim=1) < 0).all()
    for factor in (0.0, 0.5, 0.99, 1.01, 2.0, math.inf):
        other = rf_risk(lam, coeffs, n, k, ridge=ridge * factor, noise=0.1).test
        assert (other >= best * (1 - 1e-12)).all()
    # Without tuning they harm: double descent in n = k.
    fixed = rf_risk(lam, coeffs, 64, k, ridge=1e-6, noise=0.1).test
    assert fixed[2] > 5 * fixed[1] and fixed[2] > 5 * fixed[3]
    at = ridge[1, 3].clone().requires_grad_()
    (slope,) = torch.autograd.grad(rf_risk(lam, coeffs, 64, 128, ridge=at, noise=0.1).test, at)
    assert slope.abs() * at < 1e-6


def test_where_no_ridge_or_an_infinite_one_is_best() -> None:
    assert optimal_ridge(LAM, COEFFS, 64) == 0
    noise_alone = optimal_ridge(LAM, torch.zeros(1000), torch.tensor([8, 64]), noise=1.0)
    assert noise_alone.isinf().all()
    assert rf_risk(LAM, 0 * COEFFS, 64, ridge=math.inf, noise=1.0).test == 1
    # Least squares in p dimensions: p s2 / |v|^2 for the best of isotropic coefficients.
    found = optimal_ridge(torch.ones(10), torch.full((10,), 0.2), torch.tensor([40.0]), noise=0.5)
    torch.testing.assert_close(found, torch.tensor([0.5 / 0.2], dtype=F64), rtol=1e-6, atol=0)


def test_threshold_of_interpolation() -> None:
    """alpha = 2, beta = 3: to fit all of the noise is best up to a relative noise of 1/2."""
    lam, coeffs = power(10000, 2.0, 3.0)
    relative = torch.tensor([0.0, 0.4, 0.6, 2.0], dtype=F64)
    noise = relative * rf_risk(lam, coeffs, 50).test
    ridge = optimal_ridge(lam, coeffs, 50, noise=noise)
    found = rf_risk(lam, coeffs, 50, ridge=ridge, noise=noise)
    ratio = powerlaw_fit_ratio(2.0, 3.0, relative)
    assert (ratio[:2] == 0).all() and (ratio[2:] > 0).all()
    torch.testing.assert_close(found.train / found.test, ratio, rtol=0.1, atol=2e-4)
    flat = rf_risk(lam, coeffs, 50)
    torch.testing.assert_close(
        1 / (1 - flat.q / 50), torch.tensor(2.0, dtype=F64), rtol=0.02, atol=0
    )


def test_powerlaw_fit_ratio() -> None:
    found = powerlaw_fit_ratio(1.5, 2.2, torch.tensor([0.0, 0.5, 0.93, 0.94, 2.0, 1e6]))
    assert found[:3].tolist() == [0, 0, 0] and 0 < found[3] < 1e-4 and found[5] > 0.99
    torch.testing.assert_close(found[4], torch.tensor(0.0398, dtype=F64), rtol=2e-3, atol=0)
    # against a search
    a, b, s = 1.5, 2.2, 2.0
    r = torch.linspace(1e-4, 1, 100001, dtype=F64)
    best = r[((r ** (1 - b) + a * s) / (a - r * (a - 1))).argmin()]
    torch.testing.assert_close(found[4], (1 - best) ** 2, rtol=1e-3, atol=0)
    assert powerlaw_fit_ratio(2.0, 3.0, torch.tensor(math.nan)).isnan()


@pytest.mark.exhaustive
def test_powerlaw_fit_ratio_with_a_slow_tail() -> None:
    """The published pair of exponents, whose sums end far out."""
    lam, coeffs = power(10**6, 1.5, 2.2)
    relative = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    noise = relative * rf_risk(lam, coeffs, 100).test
    found = rf_risk(
        lam, coeffs, 100, ridge=optimal_ridge(lam, coeffs, 100, noise=noise), noise=noise
    )
    ratio = powerlaw_fit_ratio(1.5, 2.2, relative)
    torch.testing.assert_close(found.train / found.test, ratio, rtol=0.04, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Simulation


def simulate(lam, coeffs, n, k, ridge, noise, trials):
    """(trials, 2) test and train errors of regressions with Gaussian features."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    root, errors = lam.sqrt(), []
    for _ in range(trials):
        x, v = normal(n, len(lam)), coeffs.sqrt() * normal(len(lam)).sign()
        y = x @ v + math.sqrt(noise) * normal(n)
        if math.isinf(k):
            features, back = x * root, root.diag()
        else:
            back = root.unsqueeze(1) * normal(len(lam), k) / math.sqrt(k)
            features = x @ back
        solved = torch.linalg.solve(features @ features.T + ridge * torch.eye(n, dtype=F64), y)
        weights = back @ (features.T @ solved)
        test = (weights - v).square().sum() + noise
        errors.append(torch.stack([test, (ridge * solved).square().mean()]))
    return torch.stack(errors)


def check_simulation(lam, coeffs, n, k, ridge, noise, trials):
    errors = simulate(lam, coeffs, n, k, ridge, noise, trials)
    found = rf_risk(lam, coeffs, n, k, ridge=ridge, noise=noise)
    for name, runs, theory in zip(("test", "train"), errors.T, found, strict=False):
        deviation = runs.std() / math.sqrt(trials)
        assert (runs.mean() - theory).abs() < 3 * deviation, name
        assert (runs.mean() / theory - 1).abs() < (0.05 if name == "test" else 0.1), name


@pytest.mark.parametrize("k", [16, 100, math.inf])
def test_theory_against_simulation(k) -> None:
    lam, coeffs = power(200, 1.5, 1.8)
    check_simulation(lam, coeffs, 40, k, 0.05, 0.1, trials=100)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("n", "k", "ridge", "noise"),
    [(64, math.inf, 1e-2, 0.1), (64, 256, 1e-2, 0.1), (128, 64, 1e-2, 0.1), (128, 32, 0.1, 0.5)],
)
def test_theory_against_more_simulation(n, k, ridge, noise) -> None:
    check_simulation(LAM, COEFFS, n, k, ridge, noise, trials=200)


def test_kernel_eigensystem() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=F64))[0]
    values = torch.arange(1, 41, dtype=F64).flip(0) ** 2
    values[30:] = 0
    matrix = (basis * values) @ basis.T
    y = torch.randn(40, 3, generator=generator, dtype=F64)
    found = kernel_eigensystem((matrix + matrix.T) / 2, y)
    torch.testing.assert_close(found.eigvals, values / 40, rtol=1e-9, atol=1e-12)
    assert (found.eigvals >= 0).all() and (found.eigvals.diff() <= 0).all()
    sums = ((basis.T @ y) ** 2 / 40).sum(1)
    torch.testing.assert_close(found.coeffs_sq[:30], sums[:30])
    torch.testing.assert_close(found.coeffs_sq.sum(), y.square().sum(1).mean())
    gram = found.vectors.T @ found.vectors / 40
    torch.testing.assert_close(gram, torch.eye(40, dtype=F64))
    again = (found.vectors * found.eigvals) @ found.vectors.T
    torch.testing.assert_close(again, matrix, rtol=1e-9, atol=1e-9)
    single = kernel_eigensystem(matrix.float(), y[:, 0].float())
    torch.testing.assert_close(single.eigvals[:20], found.eigvals[:20], rtol=1e-4, atol=0)


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    k = torch.tensor([4.0, 64.0, math.inf])
    found = rf_risk(LAM, COEFFS, 64, k, ridge=torch.tensor([[0.0], [0.1]]))
    left, right = pyloss.visualize.draw_rf_risk(found, k, ["none", "0.1"])
    assert [line.get_label() for line in left.lines] == ["none", "0.1"]
    shown = torch.as_tensor(left.lines[0].get_ydata()).isfinite()
    assert shown.tolist() == [True, False, False]
    again = pyloss.visualize.draw_rf_risk(rf_risk(LAM, COEFFS, 64, k), k, axes=(left, right))
    assert again == (left, right) and len(right.lines) == 3
    with pytest.raises(TypeError, match="risk must be an RFRisk, got int"):
        pyloss.visualize.draw_rf_risk(3, k)
    with pytest.raises(ValueError, match="for x of shape"):
        pyloss.visualize.draw_rf_risk(found, k[:2])
    with pytest.raises(ValueError, match="labels must name 2 lines, got 1"):
        pyloss.visualize.draw_rf_risk(found, k, ["one"])
