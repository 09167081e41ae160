"""Neural collapse in theory: closed forms against direct optimisation, the perturbed model."""

from __future__ import annotations

import math

import pytest
import torch

from pyloss.analysis import (
    central_path,
    gof,
    linear_ufm_optimum,
    perturbed_ufm,
    simplex_etf,
    ufm_minimizer,
)
from pyloss.functional import ufm_loss
from pyloss.metrics import nc1

F64 = torch.float64
exhaustive = pytest.mark.exhaustive


def minimised(sizes, lam_w, lam_h, depth=1, loss="mse", bias=False):
    """(value, product of the weights, features, logits) of L-BFGS, from near the identity."""
    classes, g = len(sizes), torch.Generator().manual_seed(0)
    y = torch.arange(classes).repeat_interleave(torch.tensor(sizes))
    eye = torch.eye(classes, dtype=F64)
    weights, features = [0.8 * eye for _ in range(depth)], 0.8 * eye[y]
    b = torch.zeros(classes, dtype=F64)
    free = [*weights, features, *([b] if bias else [])]
    for p in free:
        p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=F64)).requires_grad_()
    stop = dict(max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-13)
    optimizer = torch.optim.LBFGS(free, **stop, history_size=30, line_search_fn="strong_wolfe")

    def value():
        return ufm_loss(weights, features, y, lam_w, lam_h, loss, b if bias else None)

    def closure():
        optimizer.zero_grad()
        found = value()
        found.backward()
        return found

    optimizer.step(closure)
    with torch.no_grad():
        product = weights[0]
        for w in weights[1:]:
            product = w @ product
        # Cross entropy does not see what all logits share.
        shift = b - b.mean() if loss == "ce" else b
        return value(), product, features, features @ product.T + shift


CASES = {
    "one collapses": dict(sizes=[12, 8, 1], lam_w=0.06, lam_h=0.06),
    "two layers": dict(sizes=[6, 4, 2], lam_w=[5e-3, 2e-2], lam_h=5e-3, depth=2),
    "bias": dict(sizes=[6, 4, 2], lam_w=2e-2, lam_h=5e-3, bias=True),
    "cross entropy, bias": dict(sizes=[4] * 3, lam_w=5e-3, lam_h=5e-3, loss="ce", bias=True),
    "spec": dict(sizes=[30, 20, 10, 4], lam_w=5e-3, lam_h=5e-4),
    "three layers": dict(sizes=[9, 6, 4], lam_w=2e-3, lam_h=1e-3, depth=3),
    "bias, two layers": dict(sizes=[9, 6, 4], lam_w=5e-3, lam_h=5e-4, depth=2, bias=True),
    "cross entropy": dict(sizes=[10] * 4, lam_w=5e-3, lam_h=5e-4, loss="ce"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=exhaustive if i > 3 else ()) for i, n in enumerate(CASES)]
)
def test_closed_form_is_what_lbfgs_finds(name) -> None:
    case = dict(CASES[name])
    value, product, features, logits = minimised(**case)
    sizes = case.pop("sizes")
    found = ufm_minimizer(sizes, **case)
    close = dict(rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(value, found.value, rtol=1e-8, atol=0)
    torch.testing.assert_close((product @ product.T).diag(), found.w_norm2, **close)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    torch.testing.assert_close(features.square().sum(1), found.h_norm2[y], **close)
    torch.testing.assert_close(logits.gather(1, y[:, None])[:, 0], found.logits_diag[y], **close)
    assert nc1(features, y, kind="trace") < 1e-6
    values = torch.linalg.svdvals(features @ product.T)
    torch.testing.assert_close(values, found.sigma.sort(descending=True).values, **close)
    assert found.collapsed.sum() == (name == "one collapses")


def test_numbers_of_the_specification() -> None:
    def near(found, expected, off):
        assert (found - torch.tensor(expected, dtype=F64)).abs().max() < off

    one, two = (ufm_minimizer((30, 20, 10, 4), 5e-3, 5e-4, depth) for depth in (1, 2))
    near(one.value, 0.0235736, 5e-8)
    near(one.sigma, [5.376, 4.3709, 3.0611, 1.8988], 6e-5)
    near(one.w_norm2, [1.700, 1.3822, 0.968, 0.6005], 6e-5)
    near(two.value, 0.03298095, 5e-9)
    near(two.sigma, [5.3925, 4.3814, 3.060, 1.8796], 6e-5)
    near(ufm_minimizer((40, 20, 5, 1), 2e-3, 1e-3).value, 0.01958132, 5e-9)
    near(ufm_minimizer((40, 20, 5, 1), 2e-3, 1e-3, 2).value, 0.02086856, 5e-9)
    cross = ufm_minimizer([10] * 4, 5e-3, 5e-4, loss="ce")
    near(cross.value, 0.0943617, 5e-8)
    near(cross.logits_diag * 4 / 3, [5.2832] * 4, 5e-5)


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_singular_values_are_the_best_of_a_grid(depth) -> None:
    """Also on both sides of the collapse, where the best jumps from 0 to (M - 1) / M or beyond."""
    n, lam = torch.tensor([50.0, 20, 7, 3, 1, 0.2, 0.02], dtype=F64), 3e-3
    found = ufm_minimizer(n, lam, 2 * lam, depth)
    t = torch.linspace(0, 1, 20_001, dtype=F64).unsqueeze(1)
    level = (n * 2 * lam ** (depth + 1)) ** (1 / (depth + 1)) * (depth + 1) / 2
    each = n * (t - 1) ** 2 / (2 * n.sum()) + level * t ** (2 / (depth + 1))
    assert ((found.logits_diag - t[each.argmin(0), 0]).abs() < 1e-4).all()
    assert torch.equal(found.collapsed, found.sigma == 0) and 0 < found.collapsed.sum() < 7
    alive = found.logits_diag[~found.collapsed]
    assert (alive > (depth - 1) / depth).all()
    torch.testing.assert_close(found.value, each.amin(0).sum(), rtol=1e-7, atol=0)


def test_threshold_of_minority_collapse() -> None:
    """n_k = N^2 lam_W lam_H of one layer, and with more what makes both values equal."""
    sizes, lam_w = torch.tensor([90.0, 9.0, 1.0], dtype=F64), 0.01
    at = 1 / (sizes.sum() ** 2 * lam_w)
    for factor, expected in ((1 - 1e-12, False), (1 + 1e-12, True)):
        found = ufm_minimizer(sizes, lam_w, float(at * factor))
        assert found.collapsed.tolist() == [False, False, expected]
    for m in (2, 4):
        bound = (1 / m) * ((m - 1) / m) ** ((m - 1) / (m + 1))
        product = (bound / sizes.sum()) ** (m + 1)  # lam_H lam_W^M, of n_k = 1
        for factor, expected in ((1 - 1e-9, False), (1 + 1e-9, True)):
            found = ufm_minimizer(sizes, lam_w, float(product * factor / lam_w**m), m)
            assert found.collapsed.tolist() == [False, False, expected]


def test_frame_of_unequal_classes() -> None:
    """Grams by the singular values s of equal layers, as the paper writes them."""
    n, lam, lam_h, depth = torch.tensor([9.0, 5.0, 2.0], dtype=F64), 4e-3, 1e-3, 3
    found = ufm_minimizer(n, lam, lam_h, depth)
    s2 = found.w_norm2  # s^(2 M)
    torch.testing.assert_close(found.h_norm2, s2 / (s2 + n.sum() * lam_h) ** 2)
    torch.testing.assert_close(found.logits_diag, s2 / (s2 + n.sum() * lam_h))
    lengths = linear_ufm_optimum(n, lam, lam_h, depth)
    weight, means = gof(lengths.w_norm, 5), gof(lengths.h_norm, 5)
    torch.testing.assert_close(weight @ weight.T, torch.diag(found.w_norm2))
    torch.testing.assert_close(means @ weight.T, torch.diag(lengths.t))


def test_one_layer_as_the_other_section_writes_it() -> None:
    n, lam_w, lam_h = torch.tensor([40.0, 20, 10, 3], dtype=F64), 2e-3, 7e-4
    t, w, h = linear_ufm_optimum(n, lam_w, lam_h)
    torch.testing.assert_close(t, 1 - n.sum() * (lam_w * lam_h / n).sqrt())
    torch.testing.assert_close(w**2, t * (n * lam_h / lam_w).sqrt())
    torch.testing.assert_close(h**2, t * (lam_w / (n * lam_h)).sqrt())


def test_many_layers_of_little_decay() -> None:
    found = ufm_minimizer([9, 4], 1e-9, 1e-9, depth=60)  # lam_W^60 is below all numbers
    assert ((found.w_norm2 > 1) & found.w_norm2.isfinite()).all()
    one = ufm_minimizer([9, 4], 1e-9, 1e-9)
    torch.testing.assert_close(one.logits_diag, found.logits_diag, rtol=1e-5, atol=0)


def test_cross_entropy_collapses_where_the_decay_is_strong() -> None:
    for lam, expected in ((0.0624, False), (0.0626, True)):  # kappa K = 4 lam sqrt(n) = 1
        found = ufm_minimizer([16] * 4, lam, lam, loss="ce")
        assert found.collapsed.all() == expected and (found.sigma[:-1] == 0).all() == expected
    assert math.isclose(float(found.value), math.log(4))


@pytest.mark.parametrize("classes", [2, 5])
def test_simplex(classes) -> None:
    gram = torch.full((classes, classes), -1 / (classes - 1), dtype=F64).fill_diagonal_(1)
    for dim in (None, classes - 1, classes + 3):
        m = simplex_etf(classes, dim)
        assert m.shape == (classes, classes - 1 if dim is None else dim)
        torch.testing.assert_close(m @ m.T, gram)
    balanced = ufm_minimizer([7] * classes, 1e-3, 1e-3, depth=2, bias=True)
    torch.testing.assert_close(balanced.sigma[:-1], balanced.sigma[:1].expand(classes - 1))
    assert balanced.sigma[-1] == 0


# --------------------------------------------------------------------------------------------------
# The perturbed model


def problem(seed: int):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(60, 10, generator=g, dtype=F64), torch.arange(60) % 4


@pytest.mark.parametrize("steps", [60, pytest.param(400, marks=exhaustive)])
def test_variability_falls_along_the_central_path(steps) -> None:
    for seed in range(5):
        path = central_path(*problem(seed), lam_w=0.05, steps=steps)
        for line in (path.nc1, path.nc1_trace, path.value):
            assert line.shape == (steps + 1,) and (line.diff() < 0).all()
    torch.testing.assert_close(path.nc1[0], nc1(*problem(seed)))
    torch.testing.assert_close(path.nc1[-1], nc1(path.features, problem(seed)[1]))


def objective(w, h, h0, y, lam_w, beta, lam_h):
    onehot = torch.nn.functional.one_hot(y).double()
    fit = (h @ w.T - onehot).square().sum() + beta * (h - h0).square().sum()
    fit = fit + lam_h * h.square().sum()
    return fit / (2 * len(h)) + lam_w / (2 * onehot.shape[1]) * w.square().sum()


def test_central_path_follows_the_gradient() -> None:
    """Of the value with the best classifier as a function of the features."""
    (h0, y), options = problem(0), dict(lam_w=0.05, beta=0.3, lam_h=0.2)
    one, two = (central_path(h0, y, steps=s, step_size=0.5, **options) for s in (1, 2))
    h = one.features.clone().requires_grad_()
    onehot = torch.nn.functional.one_hot(y).double()
    best = onehot.T @ h @ torch.linalg.inv(h.T @ h + 15 * 0.05 * torch.eye(10, dtype=F64))
    value = objective(best, h, h0, y, **options)
    (slope,) = torch.autograd.grad(value, h)
    torch.testing.assert_close(two.features, (h - 0.5 * slope).detach())
    torch.testing.assert_close(one.value[1], value.detach())
    torch.testing.assert_close(one.weight, best.detach())


@pytest.mark.parametrize(("beta", "lam_h"), [(1.0, 0.2), (1e-3, 0.0)])
def test_perturbed_minimum_is_stationary(beta, lam_h) -> None:
    (h0, y), options = problem(0), dict(lam_w=0.05, beta=beta, lam_h=lam_h)
    found = perturbed_ufm(h0, y, **options)
    assert found.converged and found.iterations < 500
    free = [t.clone().requires_grad_() for t in found[:2]]
    value = objective(*free, h0, y, **options)
    torch.testing.assert_close(found.value, value.detach())
    slopes = torch.autograd.grad(value, free)
    assert max(float(g.norm() / t.detach().norm()) for g, t in zip(slopes, free)) < 1e-8
    plain = h0
    for _ in range(5):  # by turns, as the formulas say
        onehot, eye = torch.nn.functional.one_hot(y).double(), torch.eye(10, dtype=F64)
        w = torch.linalg.solve(plain.T @ plain + 15 * 0.05 * eye, plain.T @ onehot).T
        plain = (onehot @ w + beta * h0) @ torch.linalg.inv(w.T @ w + (beta + lam_h) * eye)
    short = perturbed_ufm(h0, y, **options, max_iter=1)
    assert not short.converged and short.iterations == 1
    assert found.value <= objective(w, plain, h0, y, **options)


def test_features_collapse_as_they_are_set_free() -> None:
    h0, y = problem(1)
    order = [perturbed_ufm(h0, y, 0.05, beta) for beta in (1e3, 1.0, 1e-2, 1e-4)]
    spread = torch.stack([nc1(found.features, y) for found in order])
    assert (spread.diff() < 0).all() and spread[-1] < 1e-3
    torch.testing.assert_close(order[0].features, h0, rtol=0, atol=0.01)


def test_perturbed_model_of_nan() -> None:
    h0, y = problem(0)
    h0[0, 0] = math.nan
    found = perturbed_ufm(h0, y, 0.05, 1.0)
    assert found.features.isnan().all() and not found.converged
    assert central_path(h0, y, 0.05, steps=1).nc1.isnan().all()
