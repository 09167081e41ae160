"""Invariance in linear structural equation models: samples against exact covariances, the test's
levels, and environments that were not seen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyloss
from pyloss.analysis import (
    Intervention,
    invariance_environments_needed,
    invariance_test,
    linear_sem,
)
from pyloss.analysis.invariance import exact_gap, sem_covariance
from pyloss.regularizers import invariance_penalty

F64 = torch.float64
# 0 -> 1, both -> 2, the response, -> 3; 0 -> 3
Y = 2
B = torch.tensor(
    [[0, 0, 0, 0], [0.5, 0, 0, 0], [1.0, -0.7, 0, 0], [0.3, 0, 0.8, 0]], dtype=F64
)  # fmt: skip
OMEGA = torch.tensor([1.0, 0.5, 0.3, 0.4], dtype=F64)
PARENTS = torch.eye(3, dtype=F64)[:2]


def drawn_environments(count: int, seed: int) -> list[list[Intervention]]:
    """At each site but the response, by chance, new coefficients and a new variance."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape, low, high) -> Tensor:
        return torch.empty(shape, dtype=F64).uniform_(low, high, generator=generator)

    return [
        [
            Intervention(
                site,
                row=torch.where(B[site] != 0, uniform(4, -1, 1), 0.0),
                variance=float(uniform((), 0.2, 2.0)),
            )
            for site in (0, 1, 3)
            if float(uniform((), 0, 1)) < 0.5
        ]
        for _ in range(count)
    ]


def covariances(count: int, seed: int) -> Tensor:
    return sem_covariance(B, OMEGA, y=Y, interventions=drawn_environments(count, seed))


def mixed(t: float) -> Tensor:
    """A representation with a share t of the child."""
    return PARENTS + t * (torch.eye(3, dtype=F64)[2:] - PARENTS) * torch.eye(2, 1, dtype=F64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------
# Exact covariances


def test_parents_are_invariant_and_a_child_is_not() -> None:
    seen, unseen = covariances(50, 0), covariances(1000, 1)
    w, gap = exact_gap(covariances(200, 2), PARENTS, y=Y)
    torch.testing.assert_close(w, B[Y, :2])
    assert gap.max() < 5e-15
    assert exact_gap(unseen, PARENTS, w, y=Y)[1].max() < 5e-15
    before = 0.0
    for t in (0.05, 0.2, 0.5):
        w, gap = exact_gap(seen, mixed(t), y=Y)
        eps = float(gap.max())
        violated = float((exact_gap(unseen, mixed(t), w, y=Y)[1] > eps).double().mean())
        assert eps > before + 0.05
        # eps was the largest of 50: by chance 1 / 51, and rarely more than ln(1 / zeta) / 50.
        assert 0 < violated < math.log(1e3) / 50
        before = eps


def test_violations_fall_with_the_number_of_environments() -> None:
    """A head that was fixed before: on average one in E + 1 goes beyond the E seen."""
    unseen = covariances(1000, 3)
    gap = exact_gap(unseen, mixed(0.2), B[Y, :2], y=Y)[1]
    for E in (10, 50, 250):
        pick = torch.randint(1000, (400, E), generator=generator())
        violated = (gap > gap[pick].amax(1, keepdim=True)).double().mean(1)
        assert float(violated.mean()) == pytest.approx(1 / (E + 1), rel=0.25)
        assert float((violated > math.log(20) / E).double().mean()) <= 0.07


@pytest.mark.parametrize("p", [1, 12])
def test_environments_needed(p: int) -> None:
    delta, zeta = 0.1, 0.05
    v = 2 * p * math.log2(48 * math.e)
    expected = max(40 * math.log2(40), 8 * v / delta * math.log2(130))
    assert invariance_environments_needed(delta, zeta, p) == math.ceil(expected)
    assert invariance_environments_needed(0.5, 1e-300, 1) == math.ceil(8 * math.log2(2e300))
    fixed = invariance_environments_needed(delta, zeta)
    assert fixed == 30 and (1 - delta) ** fixed <= zeta


# --------------------------------------------------------------------------------------------------
# Samples


def test_samples_have_the_covariance() -> None:
    environments = drawn_environments(2, 4) + [Intervention(3, variance=0.0), ()]
    x, y, offsets = linear_sem(
        B, OMEGA, y=Y, interventions=environments, n=[40_000, 30_000, 100, 0], generator=generator()
    )
    assert offsets.tolist() == [0, 40_000, 70_000, 70_100, 70_100] and x.shape == (70_100, 3)
    exact = sem_covariance(B, OMEGA, y=Y, interventions=environments)
    for e in (0, 1):
        rows = slice(offsets[e], offsets[e + 1])
        X = torch.cat([x[rows, :2], y[rows, None], x[rows, 2:]], 1)
        torch.testing.assert_close(X.mT @ X / len(X), exact[e], rtol=0.05, atol=0.05)
    # A site without noise is what its row says.
    x, y = x[70_000:], y[70_000:]
    torch.testing.assert_close(x[:, 2], 0.3 * x[:, 0] + 0.8 * y)
    # Noise that is correlated, from the last coordinate on
    noise = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    found = linear_sem(torch.zeros(2, 2), noise, y=-1, interventions=[()], n=20_000,
                       generator=generator())  # fmt: skip
    assert float((found.x[:, 0] * found.y).mean()) == pytest.approx(0.8, abs=0.03)
    # ... to which an intervention puts an end.
    cut = sem_covariance(torch.zeros(2, 2), noise, y=1, interventions=[Intervention(0, None, 2.0)])
    assert cut[0].tolist() == [[2.0, 0.0], [0.0, 1.0]]


def test_gap_falls_like_one_over_the_root_of_n() -> None:
    environments = drawn_environments(20, 5)
    size = []
    for n in (100, 6400):
        data = linear_sem(B, OMEGA, y=Y, interventions=environments, n=n, generator=generator())
        size.append(float(invariance_test(data.x[:, :2], data.y, data.offsets).gap.mean()))
    assert math.log(size[1] / size[0]) / math.log(64) == pytest.approx(-0.5, abs=0.06)


def repeated(columns, environments, runs: int, n: int, **options):
    found = []
    for seed in range(runs):
        data = linear_sem(B, OMEGA, y=Y, interventions=environments, n=n, generator=generator(seed))
        found.append(invariance_test(data.x[:, columns], data.y, data.offsets, **options))
    return found


@pytest.mark.parametrize("runs", [50, pytest.param(500, marks=pytest.mark.exhaustive)])
def test_level_of_the_test_and_its_standard_errors(runs: int) -> None:
    environments = drawn_environments(4, 6)
    held = [bool(t.holds) for t in repeated([0, 1], environments, runs, 300)]
    off = 3 * math.sqrt(0.05 * 0.95 / runs)  # level 0.05, and some more with 300 samples
    assert 0.94 - off < sum(held) / runs < 0.95 + off + 1 / runs
    found = repeated([1, 2], environments, runs, 300)
    assert not any(bool(t.holds) for t in found)
    spread = torch.stack([t.gap for t in found]).std(0)
    expected = torch.stack([t.stderr for t in found]).mean(0)
    torch.testing.assert_close(spread, expected, rtol=0.05 + 3 / math.sqrt(2 * runs), atol=0)


def test_approximate_invariance() -> None:
    environments = drawn_environments(4, 6)
    exact = float(
        exact_gap(
            sem_covariance(B, OMEGA, y=Y, interventions=environments),
            torch.eye(3, dtype=F64)[1:],
            y=Y,
        )[1].max()
    )
    (wide,) = repeated([1, 2], environments, 1, 20_000, eps=1.1 * exact)
    (tight,) = repeated([1, 2], environments, 1, 20_000, eps=0.7 * exact)
    assert bool(wide.holds) and not bool(tight.holds)
    assert float(wide.eps_hat) == pytest.approx(exact, rel=0.1)
    assert torch.equal(wide.eps_hat, wide.gap.max())
    # By chance alone it is never refused at an eps that is its own.
    (own,) = repeated([1, 2], environments, 1, 500, eps=exact)
    assert bool(own.holds)


def test_dependent_features_and_exact_data() -> None:
    data = linear_sem(B, OMEGA, y=Y, interventions=drawn_environments(5, 7), n=500,
                      generator=generator())  # fmt: skip
    x, offsets = data.x[:, :2], data.offsets
    plain = invariance_test(x, data.y, offsets)
    twice = invariance_test(torch.cat([x, x[:, :1]], 1), data.y, offsets)
    assert twice.w.isfinite().all() and bool(twice.holds) and bool(plain.holds)
    torch.testing.assert_close(twice.w[0], twice.w[2])
    w = torch.tensor([1.0, -2.0], dtype=F64)
    noiseless = invariance_test(x, x @ w, offsets)
    torch.testing.assert_close(noiseless.w, w)
    assert noiseless.eps_hat < 1e-12 and bool(noiseless.holds)
    # The same without any noise, but another head in the last environment
    y = x @ w
    y[400 * 5 :] += x[400 * 5 :, 0]
    assert not bool(invariance_test(x, y, offsets).holds)
    zero = invariance_test(0 * x, data.y, offsets)
    assert not zero.w.any() and bool(zero.holds) and not zero.stderr.any()
    half = invariance_test(x.bfloat16(), data.y.bfloat16(), offsets.int())
    assert half.w.dtype == F64
    torch.testing.assert_close(half.w, plain.w, rtol=0.05, atol=0.02)
    one = invariance_test(x[:500], data.y[:500], offsets[:2])
    assert one.gap < 1e-12 and bool(one.holds)
    x[3, 0] = math.nan
    nan = invariance_test(x, data.y, offsets)
    assert nan.w.isnan().all() and nan.eps_hat.isnan() and not bool(nan.holds)


# --------------------------------------------------------------------------------------------------
# The penalty


def test_penalty_is_the_squared_gap() -> None:
    data = linear_sem(B, OMEGA, y=Y, interventions=drawn_environments(4, 8), n=[9, 50, 7, 30],
                      generator=generator())  # fmt: skip
    found = invariance_test(data.x, data.y, data.offsets)
    arguments = data.x, data.y, found.w, data.offsets
    torch.testing.assert_close(invariance_penalty(*arguments, reduction="none"), found.gap.square())
    # The head of the test is where the sum of the penalties is least.
    w = found.w.clone().requires_grad_()
    invariance_penalty(data.x, data.y, w, data.offsets, reduction="sum").backward()
    assert w.grad.abs().max() < 1e-10


def test_training_with_the_penalty_drops_the_child() -> None:
    """Least squares uses the child, at which no head is invariant; scales of features can."""
    turned = Intervention(3, row=[0.3, 0.0, -0.8, 0.0])
    x, y, offsets = linear_sem(B, OMEGA, y=Y, interventions=[(), (), (), turned], n=2000,
                               generator=generator())  # fmt: skip
    cause, head = torch.tensor([1.0, -0.7, 0.0], dtype=F64), torch.ones(3, dtype=F64)
    squares = torch.linalg.lstsq(x, y.unsqueeze(1)).solution[:, 0]
    scales = squares.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([scales], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        features = x * scales
        value = (features @ head - y).square().mean()
        value = value + 1e3 * invariance_penalty(features, y, head, offsets)
        value.backward()
        return value

    optimizer.step(loss)
    assert float((squares - cause).norm()) > 0.15
    assert float((scales.detach() - cause).norm()) < 0.05


# --------------------------------------------------------------------------------------------------


def test_drawing() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    x, y = torch.randn(60, 1), torch.randn(60)
    found = invariance_test(x, y, torch.tensor([0, 20, 40, 60]))
    ax = pyloss.visualize.draw_invariance(found, eps=0.2)
    torch.testing.assert_close(torch.as_tensor(ax.lines[0].get_ydata()), found.gap)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["largest", "eps", "gap"]
    assert pyloss.visualize.draw_invariance(found, ax=ax) is ax
    with pytest.raises(TypeError, match="test must be an InvarianceTest, got int"):
        pyloss.visualize.draw_invariance(3)
    matplotlib.pyplot.close("all")
