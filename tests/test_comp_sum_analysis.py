"""H-consistency bounds and minimizability gaps: that they hold, where they are tight, closed forms
against searches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pyloss
from pyloss.analysis.comp_sum import (
    analyze,
    conditional_minimizer,
    conditional_minimum,
    conditional_risk,
    gamma,
    gamma_bound,
    h_consistency_bound,
    minimizability_gap,
    t_function,
)

TAUS = (0.0, 0.3, 0.7, 1.0, 1.2, 1.5, 1.8, 2.0, 2.5)
CLASSES = (2, 3, 5)
F64 = torch.float64


def distributions(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    """From all but uniform to all but certain; some classes never happen."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, classes, generator=generator, dtype=F64)
    z = z * torch.empty(rows, 1, dtype=F64).log_normal_(0, 1.5, generator=generator)
    z[::17, 0] = -math.inf
    return z.softmax(1)


def regrets(scores, prob, tau):
    surrogate = conditional_risk(scores, prob, tau) - conditional_minimum(prob, tau)
    zero_one = prob.amax(1) - prob.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    return surrogate, zero_one


@pytest.mark.parametrize("tau", TAUS)
def test_bound_holds_on_random_distributions_and_scores(tau) -> None:
    """2 10^4 of them, half of the scores near those of the least risk, where bounds are close."""
    for classes in CLASSES:
        prob = distributions(7000, classes)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(prob.shape, generator=generator, dtype=F64)
        near = prob.clamp(min=1e-12).log() / max(2 - tau, 0.5)
        scores = torch.where(torch.arange(7000)[:, None] % 2 == 0, near + 0.3 * noise, 3 * noise)
        surrogate, zero_one = regrets(scores, prob, tau)
        assert (surrogate >= -1e-12).all()
        assert (t_function(zero_one, tau, classes) <= surrogate * (1 + 1e-9) + 1e-12).all()
        assert (gamma(surrogate, tau, classes) >= zero_one - 1e-9).all()


@pytest.mark.parametrize("tau", [t for t in TAUS if t <= 2])
def test_bound_is_tight_with_two_classes(tau) -> None:
    """Equal scores, of which the wrong class is the one predicted."""
    b = torch.linspace(0.01, 0.99, 50, dtype=F64)
    prob = torch.stack([1 - b, 1 + b], 1) / 2
    surrogate, zero_one = regrets(torch.zeros(50, 2, dtype=F64), prob, tau)
    torch.testing.assert_close(zero_one, b)
    torch.testing.assert_close(surrogate, t_function(b, tau))
    torch.testing.assert_close(gamma(surrogate, tau), b)


@pytest.mark.parametrize("tau", [*TAUS, 1.99, 1.9995])
@pytest.mark.parametrize("classes", [2, 10])
def test_gamma_is_the_inverse_and_below_its_closed_form(tau, classes) -> None:
    b = torch.cat([torch.logspace(-7, -1, 20, dtype=F64), torch.linspace(0.11, 1, 40, dtype=F64)])
    t = t_function(b, tau, classes)
    assert (t.diff() > 0).all()
    torch.testing.assert_close(gamma(t, tau, classes), b, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(gamma(t[20:], tau, classes), b[20:], rtol=1e-9, atol=0)
    assert (gamma_bound(t, tau, classes) >= b * (1 - 1e-6)).all()
    ends = torch.tensor([-1e-18, 0.0, 1e3, math.inf, math.nan], dtype=F64)
    found = gamma(ends, tau, classes)
    assert found[:4].tolist() == [0, 0, 1, 1]
    assert found[4].isnan()


def test_t_is_continuous_at_one() -> None:
    b = torch.linspace(0, 1, 11, dtype=F64)
    for near in (1 - 1e-7, 1 + 1e-7):
        torch.testing.assert_close(t_function(b, near, 5), t_function(b, 1.0), rtol=1e-5, atol=1e-7)


def test_the_bound_of_the_logistic_loss() -> None:
    t = torch.logspace(-6, 0, 30, dtype=F64)
    bound = h_consistency_bound(t)
    assert (bound <= torch.sqrt(2 * t)).all()
    assert torch.equal(h_consistency_bound(t, closed_form=True), torch.sqrt(2 * t))
    assert torch.equal(bound, h_consistency_bound(t, 1.0, classes=7))
    for name, tau in (("sum_exponential", 0.0), ("mae", 2.0), ("cross_entropy", 1.0)):
        assert torch.equal(h_consistency_bound(t, name, classes=3), gamma(t, tau, 3))


# --------------------------------------------------------------------------------------------------
# Least risks


@pytest.mark.parametrize("tau", TAUS)
def test_least_risk_is_that_of_its_scores_and_of_none_less(tau) -> None:
    prob = distributions(300, 4)
    least = conditional_minimum(prob, tau)
    if tau < 2:
        scores = conditional_minimizer(prob, tau)
        torch.testing.assert_close(conditional_risk(scores, prob, tau), least)
    else:  # attained by no scores: one of them grows
        top = torch.nn.functional.one_hot(prob.argmax(1), 4).double()
        torch.testing.assert_close(conditional_risk(60 * top, prob, tau), least)
        with pytest.raises(ValueError, match="no scores without a bound"):
            conditional_minimizer(prob, tau)
    scores = 4 * torch.randn(50, 300, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert (conditional_risk(scores, prob, tau) >= least - 1e-12).all()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("bound", [0.3, 1.5])
def test_bounded_scores_against_a_grid(tau, bound) -> None:
    """One score may be taken to be L: to add a number to all changes nothing."""
    prob = distributions(60, 3)
    line = torch.linspace(-bound, bound, 61, dtype=F64)
    grid = []
    for at in range(3):
        others = torch.cartesian_prod(line, line)
        full = torch.full((len(others), 3), bound, dtype=F64)
        full[:, [i for i in range(3) if i != at]] = others
        grid.append(full)
    found = conditional_risk(torch.cat(grid)[:, None], prob, tau).amin(0)
    scores = conditional_minimizer(prob, tau, bound)
    assert scores.abs().max() <= bound
    least = conditional_minimum(prob, tau, bound)
    torch.testing.assert_close(conditional_risk(scores, prob, tau), least)
    assert (least <= found + 1e-12).all()
    assert (found <= least + 0.02 * bound**2 * (1 + least)).all()
    wide = conditional_minimum(prob, tau, 60.0)
    torch.testing.assert_close(wide, conditional_minimum(prob, tau), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("tau", TAUS)
def test_certain_labels_with_bounded_scores(tau) -> None:
    for classes, bound in itertools.product((2, 6), (0.5, 2.0)):
        u = (classes - 1) * math.exp(-2 * bound)
        phi = math.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
        prob = torch.eye(classes, dtype=F64)
        least = conditional_minimum(prob, tau, bound)
        torch.testing.assert_close(least, torch.full_like(least, phi))
        gap = minimizability_gap(prob, tau, 2.0, bound)
        torch.testing.assert_close(gap, torch.tensor(2 - phi, dtype=F64))


def test_gaps_fall_with_tau() -> None:
    """Of the best constant scores on inputs of different distributions."""
    prob = distributions(50, 3)
    gaps = []
    for tau in (0.0, 0.5, 1.0, 1.5):
        mean = prob.mean(0)
        best = conditional_risk(conditional_minimizer(mean, tau), prob, tau).mean()
        gaps.append(minimizability_gap(prob, tau, best))
    gaps = torch.stack(gaps)
    assert (gaps > 0).all()
    assert (gaps.diff() < 0).all()


# --------------------------------------------------------------------------------------------------
# Of a model


def test_analysis() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(40, 4, generator=generator), torch.arange(40) % 4
    found = analyze(logits, target, [0.0, 1.0, 2.0], best_risk=[1.0, 0.9, 0.4], best_zero_one=0.1)
    for k, tau in enumerate((0.0, 1.0, 2.0)):
        risk = pyloss.comp_sum_loss(logits.double(), target, tau)
        torch.testing.assert_close(found.surrogate_risk[k], risk)
        torch.testing.assert_close(found.bound[k], gamma(risk, tau, 4) - 0.1)
        torch.testing.assert_close(found.bound_closed_form[k], gamma_bound(risk, tau, 4) - 0.1)
    assert found.gap.tolist() == [1.0, 0.9, 0.4]
    assert found.conditional_minimum.tolist() == [0, 0, 0]
    error = (logits.argmax(1) != target).double().mean()
    torch.testing.assert_close(found.zero_one_risk, error)
    assert found.zero_one_gap == 0.1
    soft = analyze(logits, torch.nn.functional.one_hot(target, 4).double(), 1.0, score_bound=1.0)
    hard = analyze(logits, target, 1.0, score_bound=1.0)
    torch.testing.assert_close(soft._asdict(), hard._asdict())


def test_tau_of_numpy_and_of_tensors() -> None:
    numpy = pytest.importorskip("numpy")
    for tau in (numpy.float32(1.5), torch.tensor(1.5), numpy.array([1.5]), (1.5,)):
        assert analyze(X, Y, tau).tau.tolist() == [1.5]


def test_picture() -> None:
    pytest.importorskip("matplotlib")
    found = analyze(torch.randn(9, 3), torch.arange(9) % 3)
    left, right = pyloss.visualize.draw_comp_sum(found)
    assert len(left.lines) == 2
    assert len(right.lines) == 3
    assert pyloss.visualize.draw_comp_sum(found, (left, right)) == (left, right)
    with pytest.raises(TypeError, match="must be a CompSumAnalysis, got int"):
        pyloss.visualize.draw_comp_sum(3)


X, Y, P = torch.zeros(4, 3), torch.zeros(4).long(), torch.full((4, 3), 1 / 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: t_function(1.5, 1.0), ValueError, r"b must be in \[0, 1\], got 1.5"),
        (lambda: t_function(0.5, -1.0), ValueError, "tau must be finite and >= 0, got -1"),
        (lambda: gamma(0.5, 1.5, 1), ValueError, "classes must be at least 2, got 1"),
        (lambda: gamma("x", 1.5), TypeError, "t must be a number, got str"),
        (lambda: h_consistency_bound(0.1, "hinge"), ValueError, "loss must be one of logistic"),
        (lambda: conditional_minimum(X, 1.0), ValueError, "prob must hold probabilities"),
        (lambda: conditional_minimum(P, 1.0, -1), ValueError, "score_bound must be finite and > 0"),
        (lambda: conditional_risk(X[:, :2], P, 1.0), ValueError, "as many classes"),
        (lambda: analyze(X[0], Y), ValueError, r"logits must be \(N, n\)"),
        (lambda: analyze(X, Y[:3]), ValueError, r"target must have the shape \[4\], got \[3\]"),
        (lambda: analyze(X, Y + 3), IndexError, "Target 3 is out of bounds"),
        (lambda: analyze(X, P[:3]), ValueError, "the shape of logits"),
        (lambda: analyze(X, Y, best_risk=[1.0]), ValueError, "best_risk must hold 5 risks, got 1"),
        (lambda: analyze(X, Y, []), ValueError, "tau must be a number or several, got none"),
        (lambda: analyze(X, Y, "1"), TypeError, "tau must be a number, got str"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
