"""Inductive bias: distributions against scipy's and against exact ones, fits against known
parameters, the posterior of a Gaussian process against its draws."""

from __future__ import annotations

import math

import pytest
import torch

import pyloss
from pyloss.analysis import (
    chi2_mixture_logcdf,
    gp_inductive_bias,
    inductive_bias,
    ncx2_logcdf,
)

F64 = torch.float64
TAIL = torch.tensor([1e-9, 1e-3, 0.1, 1.0, 5.0, 10.0, 20.0, 60.0], dtype=F64)


def ncx2(rows: int, df: float, nc: float, scale: float) -> torch.Tensor:
    """Draws of scaled noncentral chi-square, df >= 1."""
    generator = torch.Generator().manual_seed(0)
    shifted = (torch.randn(rows, generator=generator, dtype=F64) + math.sqrt(nc)).square()
    rest = torch.randn(rows, round(df) - 1, generator=generator, dtype=F64).square().sum(1)
    return scale * (shifted + rest)


@pytest.mark.parametrize(("df", "nc"), [(10, 5), (1, 0), (0.3, 2), (3, 400), (10, 1e-8)])
def test_ncx2_against_scipy(df, nc) -> None:
    special = pytest.importorskip("scipy.special")
    expected = torch.from_numpy(special.chndtr(TAIL.numpy(), df, nc)).log()
    known = expected > -80  # beyond, scipy has 0
    found = ncx2_logcdf(3 * TAIL, df, nc, scale=3.0)
    torch.testing.assert_close(found[known], expected[known], rtol=1e-9, atol=1e-12)
    assert found.isfinite().all() and (found.diff() > 0).all()


def test_ncx2_deep_tail_and_ends() -> None:
    # x -> 0: the density of chi-square at 0 times exp(-nc / 2)
    x = torch.tensor(1e-9, dtype=F64)
    leading = -200 + 1.5 * torch.log(x / 2) - math.lgamma(2.5)
    torch.testing.assert_close(ncx2_logcdf(x, 3.0, 400.0), leading, rtol=1e-6, atol=0)
    ends = ncx2_logcdf(torch.tensor([-1.0, 0.0, math.inf, math.nan]), 3.0, 4.0)
    assert ends[:3].tolist() == [-math.inf, -math.inf, 0] and ends[3].isnan()
    assert ncx2_logcdf(torch.ones(2), math.nan, 1.0).isnan().all()


def test_ncx2_of_very_many_degrees_is_continued_by_the_saddlepoint(monkeypatch) -> None:
    from pyloss.analysis import inductive

    x = torch.tensor([2400.0, 2700, 3000, 3000.1, 3300, 3600], dtype=F64)
    by_sum = ncx2_logcdf(x, 2000.0, 1000.0)
    monkeypatch.setattr(inductive, "_TERMS", 10)
    by_saddlepoint = ncx2_logcdf(x, 2000.0, 1000.0)
    torch.testing.assert_close(by_saddlepoint, by_sum, rtol=1e-4, atol=1e-11)
    normal = ncx2_logcdf(
        1e12 + torch.tensor([-3.0, 0.0, 2.0], dtype=F64) * math.sqrt(2e12), 1e12, 0
    )
    expected = torch.special.log_ndtr(torch.tensor([-3.0, 0.0, 2.0], dtype=F64))
    torch.testing.assert_close(normal, expected, rtol=1e-4, atol=0)
    monkeypatch.undo()
    beside = ncx2_logcdf(torch.tensor([1e8, 1.0]), 3.0, 2.0)  # which leaves others to the sum
    assert beside[0] == 0 and beside[1] == ncx2_logcdf(1.0, 3.0, 2.0)


# --------------------------------------------------------------------------------------------------
# Sums of squares


def test_saddlepoint_against_exact_chi_square() -> None:
    """To 0.1 % of the nats in the lower tail, also 30 of them out."""
    x = torch.tensor([1e-4, 0.01, 0.1, 1.0, 3.0, 5.0, 9.0, 10.0, 12.0], dtype=F64)
    found, exact = chi2_mixture_logcdf(x, torch.ones(10)), ncx2_logcdf(x, 10, 0)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0)
    for nats in (8.6673, 31.283):
        low, high = torch.tensor([1e-6, 9.0], dtype=F64)
        for _ in range(60):
            middle = (low * high).sqrt()
            low, high = (middle, high) if -ncx2_logcdf(middle, 10, 0) > nats else (low, middle)
        assert abs(-float(chi2_mixture_logcdf(low, torch.ones(10))) / nats - 1) < 1e-3
    shifted = chi2_mixture_logcdf(2 * x + 1, torch.full((10,), 2.0), math.sqrt(0.4), offset=1.0)
    torch.testing.assert_close(shifted, ncx2_logcdf(x, 10, 4), rtol=1.5e-3, atol=0)


@pytest.mark.parametrize("d", [1, 10, 1000])
def test_saddlepoint_is_smooth_at_the_mean(d) -> None:
    mean = float(d)
    width = math.sqrt(2 * d)
    x = mean + width * torch.linspace(-0.05, 0.05, 401, dtype=F64)
    found = chi2_mixture_logcdf(x, torch.ones(d))
    exact = ncx2_logcdf(x, d, 0)
    assert (found.diff() > 0).all()
    assert (found - exact).diff().abs().max() < 2e-5
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-2 / d)
    at_mean = chi2_mixture_logcdf(mean, torch.ones(d))
    torch.testing.assert_close(at_mean, found[200], rtol=1e-9, atol=0)


def test_saddlepoint_of_weights_over_many_decades() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.logspace(0, -12, 100, dtype=F64)
    shift = torch.randn(100, generator=generator, dtype=F64)
    mean = (weights * (1 + shift**2)).sum()
    found = chi2_mixture_logcdf(mean * torch.logspace(-12, 2, 60, dtype=F64), weights, shift)
    assert found.isfinite().all() and (found <= 0).all() and (found.diff() > 0).all()
    plain = chi2_mixture_logcdf(mean * 0.1, weights, shift)
    for unit in (1e-290, 1e300):  # with no room for squares
        scaled = chi2_mixture_logcdf(unit * mean * 0.1, unit * weights, shift)
        torch.testing.assert_close(scaled, plain)


def test_saddlepoint_ends() -> None:
    x = torch.tensor([[0.5, 2.0], [math.inf, math.nan]])
    found = chi2_mixture_logcdf(x, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0]), offset=2.0)
    assert found[0].tolist() == [-math.inf, -math.inf]
    assert found[1, 0] == 0 and found[1, 1].isnan()
    certain = chi2_mixture_logcdf(x, torch.zeros(2), offset=2.0)
    assert certain[0].tolist() == [-math.inf, 0] and certain[1, 1].isnan()
    assert chi2_mixture_logcdf(1.0, torch.tensor([1.0, math.nan])).isnan()


# --------------------------------------------------------------------------------------------------
# From losses


@pytest.mark.parametrize(("df", "nc", "scale"), [(10, 5, 0.2), (6, 2, 1.0)])
def test_fit_recovers_the_parameters(df, nc, scale) -> None:
    found = inductive_bias(ncx2(100_000, df, nc, scale), scale / 20)
    assert abs(float(found.df) / df - 1) < 0.05
    assert abs(float(found.scale) / scale - 1) < 0.05
    exact = -ncx2_logcdf(scale / 20, df, nc, scale)
    torch.testing.assert_close(found.nats, exact, rtol=0.05, atol=0)


def log_likelihood(x, df, nc, scale) -> float:
    special = pytest.importorskip("scipy.special")
    import numpy as np

    x = x.numpy() / scale
    order, z = df / 2 - 1, np.sqrt(nc * x)
    log_i = np.log(special.ive(order, z)) + z
    each = -(x + nc) / 2 + order * np.log(x / nc) / 2 + log_i - math.log(2 * scale)
    return float(each.mean())


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param(ncx2(300, 10, 5, 0.2), id="300"),
        pytest.param(ncx2(2000, 1, 0.1, 1.0), id="skew"),
        pytest.param(torch.linspace(0.5, 1.5, 50, dtype=F64), id="df at its boundary"),
    ],
)
def test_no_parameters_near_by_are_more_likely(losses) -> None:
    found = inductive_bias(losses, 0.1)
    best = log_likelihood(losses, *map(float, found[1:]))
    for at in range(3):
        for factor in (0.5, 0.98, 1.02, 2.0):
            other = [float(v) * (factor if i == at else 1) for i, v in enumerate(found[1:])]
            assert log_likelihood(losses, *other) <= best + 1e-7
    rescaled = inductive_bias(1000 * losses, 100.0)
    torch.testing.assert_close(rescaled.nats, found.nats, rtol=1e-5, atol=0)


@pytest.mark.exhaustive
def test_fit_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = ncx2(1000, 3, 6, 0.5)
    df, nc, _, scale = stats.ncx2.fit(x.numpy(), floc=0)
    found = inductive_bias(x, 0.1)
    best = log_likelihood(x, *map(float, found[1:]))
    assert best >= log_likelihood(x, df, nc, scale) - 1e-7


def test_losses_that_hardly_differ_are_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = 3 + 1e-6 * torch.randn(500, generator=generator, dtype=F64)
    z = torch.tensor([-2.0, 0.0], dtype=F64)
    nats = inductive_bias(losses, losses.mean() + z * losses.std()).nats
    torch.testing.assert_close(nats, -torch.special.log_ndtr(z), rtol=1e-3, atol=0)


def test_nats_fall_with_the_target_and_empirical_counts() -> None:
    losses = ncx2(500, 3, 2, 0.1)
    target = torch.cat([torch.zeros(1), torch.logspace(-4, 1, 50)])
    for method in ("ncx2", "empirical"):
        nats = inductive_bias(losses, target, method=method).nats
        assert nats[0].isinf() and (nats >= 0).all()
        finite = nats[nats.isfinite()]
        assert (finite.diff() <= 0).all()
    counted = inductive_bias(losses, losses.sort().values[9], method="empirical")
    torch.testing.assert_close(counted.nats, torch.tensor(math.log(50.0), dtype=F64))
    assert counted.df.isnan()
    bad = inductive_bias(losses * math.nan, target)
    assert bad.nats.isnan().all() and bad.nats.shape == target.shape


# --------------------------------------------------------------------------------------------------
# A Gaussian process


def rbf(a, b):
    return torch.exp(-torch.cdist(a, b).square() / 2)


def problem(outputs: int = 1):
    """20 points to train on, 30 to test."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, dtype=F64, generator=generator)
    y = torch.stack([x[:, 0].sin() + x[:, 1] * x[:, 2], x[:, 2].cos()], 1)[:, :outputs]
    return x[:20], y[:20], x[20:], y[20:]


def imhof(x: float, a: torch.Tensor, b: torch.Tensor) -> float:
    """P(sum a (z + b)^2 <= x), by the inversion of the characteristic function."""
    integrate = pytest.importorskip("scipy.integrate")
    import numpy as np

    a, b2 = a.numpy(), b.numpy() ** 2

    def integrand(u):
        au = a * u
        angle = 0.5 * (np.arctan(au) + b2 * au / (1 + au**2)).sum() - 0.5 * x * u
        size = 0.25 * np.log1p(au**2).sum() + 0.5 * (b2 * au**2 / (1 + au**2)).sum()
        return np.sin(angle) * np.exp(-size) / u

    value = integrate.quad(integrand, 0, 4000, limit=4000, epsabs=1e-12, epsrel=1e-10)[0]
    return 0.5 - value / math.pi


def test_gp_tails() -> None:
    """Draws, the exact inversion, the saddlepoint, and the fit, which errs far out."""
    from pyloss.analysis.inductive import _posterior_loss

    data = problem()
    a, b, c = _posterior_loss(*data, rbf, 1e-8)
    generator = torch.Generator().manual_seed(0)
    losses = (torch.randn(200_000, len(a), dtype=F64, generator=generator) + b).square() @ a + c
    target = torch.quantile(losses, torch.tensor([0.5, 0.01, 0.001], dtype=F64))
    nats = gp_inductive_bias(*data, rbf, target).nats
    counted = torch.tensor([math.log(2), math.log(100), math.log(1000)], dtype=F64)
    torch.testing.assert_close(nats, counted, rtol=0.01, atol=0)
    deep = torch.cat([target, target[2:] * 0.3])
    saddlepoint = gp_inductive_bias(*data, rbf, deep).nats
    exact = torch.tensor([-math.log(imhof(float(t - c), a, b)) for t in deep], dtype=F64)
    torch.testing.assert_close(saddlepoint, exact, rtol=0.002, atol=0)
    deeper = target[2:] / 20
    fit = gp_inductive_bias(
        *data, rbf, deeper, method="ncx2", samples=10_000, generator=generator.manual_seed(1)
    )
    apart = fit.nats / gp_inductive_bias(*data, rbf, deeper).nats
    assert apart < 0.95 and fit.df > 0


def test_gp_with_outputs_and_points_that_are_known() -> None:
    x, y, x_test, y_test = problem(2)
    target = torch.tensor([0.1, 1.0], dtype=F64)
    together = gp_inductive_bias(x, y, x_test, y_test, rbf, target).nats
    assert together.isfinite().all() and together[0] > together[1]
    # A test point of the training set varies no more: its error is a constant, here 4 of 2 x 4.
    x_more, y_more = torch.cat([x_test[:3], x[:1]]), torch.cat([y_test[:3], y[:1] + 2.0])
    least = torch.tensor([0.999, 1.3], dtype=F64)
    found = gp_inductive_bias(x, y, x_more, y_more, rbf, least, jitter=0.0).nats
    assert found[0].isinf() and found[1].isfinite()
    known = gp_inductive_bias(x, y, x[:2], y[:2], rbf, torch.tensor([-1.0, 1e-3]), jitter=0.0).nats
    assert known[0].isinf() and known[1] == 0


@pytest.mark.parametrize("at", range(4))
def test_gp_with_nan(at) -> None:
    data = list(problem())
    data[at][0, 0] = math.nan
    for method in ("saddlepoint", "ncx2"):
        found = gp_inductive_bias(*data, rbf, torch.ones(2), method=method, samples=8)
        assert found.nats.isnan().all()


def test_gp_of_another_unit() -> None:
    """Jitter is relative to the kernel."""
    x, x_test = torch.linspace(-1, 1, 5, dtype=F64)[:, None], torch.tensor([[0.3], [1.4]])

    def nats(unit: float) -> torch.Tensor:
        def kernel(a, b):
            return unit**2 * torch.exp(-torch.cdist(a, b).square() / 2)

        y, y_test = unit * x.sin()[:, 0], unit * x_test.double().sin()[:, 0]
        target = unit**2 * torch.tensor([1e-2, 1e-4], dtype=F64)
        return gp_inductive_bias(x, y, x_test, y_test, kernel, target).nats

    torch.testing.assert_close(nats(1e-5), nats(1.0), rtol=1e-6, atol=0)


def test_gp_draws_are_of_the_generator() -> None:
    def nats(seed):
        generator = torch.Generator().manual_seed(seed)
        return gp_inductive_bias(
            *problem(), rbf, 0.3, method="ncx2", samples=200, generator=generator
        ).nats

    state = torch.get_rng_state()
    assert nats(1) == nats(1) != nats(2)
    assert torch.equal(state, torch.get_rng_state())


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    target = torch.tensor([0.01, 0.1, 1.0])
    found = inductive_bias(ncx2(50, 3, 2, 0.1), target)
    ax = pyloss.visualize.draw_inductive_bias(target, {"fit": found, "nats": found.nats})
    assert [line.get_label() for line in ax.lines] == ["fit", "nats"]
    assert pyloss.visualize.draw_inductive_bias(target, {"more": found}, ax) is ax
    with pytest.raises(TypeError, match="biases must be a mapping, got InductiveBias"):
        pyloss.visualize.draw_inductive_bias(target, found)
    with pytest.raises(ValueError, match=r"must be \(T,\), got \[2\] and \[3\]"):
        pyloss.visualize.draw_inductive_bias(target[:2], {"fit": found})
