"""Optimistic mirror descent: its recurrences, the projections, and how regret grows."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from pyloss.research.online import (
    OptimisticOMD,
    dynamic_regret,
    metric_projection,
    path_length,
    project_ball,
    project_box,
    project_simplex,
    regret_exponent,
    static_regret,
)

F64 = torch.float64


def spd(d: int, condition: float = 100.0) -> Tensor:
    q = torch.linalg.qr(torch.randn(d, d, dtype=F64)).Q
    return q @ torch.diag(torch.logspace(0, math.log10(condition), d, dtype=F64)) @ q.T


# --- projections --------------------------------------------------------------------------------


def test_projections_are_the_nearest_points() -> None:
    x = 2 * torch.randn(20, 6, dtype=F64)
    inside = torch.rand(200, 6, dtype=F64)
    simplex = inside / inside.sum(1, keepdim=True)
    ball = project_ball(2 * inside - 1)
    for projected, candidates in (
        (project_simplex(x), simplex),
        (project_ball(x), ball),
        (project_box(x, 0.0, 1.0), inside),
    ):
        # (x - p) points away from the whole set
        outwards = torch.einsum("nd,nmd->nm", x - projected, candidates - projected[:, None])
        assert outwards.max() <= 1e-12
    torch.testing.assert_close(project_simplex(x).sum(1), torch.ones(20, dtype=F64))
    torch.testing.assert_close(
        project_simplex(1e9 + x, 3.0).sum(1), torch.full((20,), 3.0).double()
    )
    assert torch.equal(project_ball(torch.zeros(3)), torch.zeros(3))
    center = torch.full((6,), 5.0, dtype=F64)
    moved = project_ball(x, 0.5, center) - center
    torch.testing.assert_close(moved, 0.5 * (x - center) / (x - center).norm(dim=1, keepdim=True))
    low = torch.arange(6, dtype=F64)
    assert torch.equal(project_box(x, low, low), low.expand(20, 6))
    for project in (project_simplex, project_ball):
        assert project(torch.tensor([math.nan, 1.0])).isnan().all()
        assert project(torch.randn(3, 4).bfloat16()).dtype == torch.bfloat16


def in_ball(point: Tensor, metric: Tensor) -> Tensor:
    """By the multiplier of the constraint norm(x) <= 1, found by bisection."""
    values, vectors = torch.linalg.eigh(metric)
    along = vectors.T @ (metric @ point)
    low, high = 0.0, float(along.norm())
    for _ in range(200):
        middle = (low + high) / 2
        outside = bool((along / (values + middle)).norm() > 1)
        low, high = (middle, high) if outside else (low, middle)
    return vectors @ (along / (values + high))


def test_metric_projection() -> None:
    metric, point = spd(5), torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=F64)
    found = metric_projection(point, metric, project_ball)
    torch.testing.assert_close(found, in_ball(point, metric), rtol=0, atol=1e-10)
    inside = point / 10
    torch.testing.assert_close(metric_projection(inside, metric, project_ball), inside)
    for project, corners in (
        (project_simplex, torch.eye(5, dtype=F64)),
        (lambda x: project_box(x, -1.0, 1.0),
         torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=F64)),
    ):  # fmt: skip
        found = metric_projection(point, metric, project, smallest=1.0)
        assert ((metric @ (point - found)) @ (corners - found).T).max() < 1e-9
    assert metric_projection(point * math.nan, metric, project_ball).isnan().all()


# --- the optimizer ------------------------------------------------------------------------------


def by_the_formulas(geometry: str, start: Tensor, grads: Tensor, D: float, G: float) -> Tensor:
    """The points to play, each argmin as the text has it, in the unit ball."""

    def argmin(direction: Tensor, hat: Tensor, metric: Tensor) -> Tensor:
        point = hat - torch.linalg.solve(metric, direction)
        return point if point.norm() <= 1 else in_ball(point, metric)

    d, played, hat = len(start), [], start
    eye, last, variation = torch.eye(d, dtype=F64), torch.zeros(d, dtype=F64), 0.0
    b = 0.5 * min(1 / (4 * G * D), 0.3)
    outer = torch.zeros(d, d, dtype=F64)

    def metric(t: int) -> Tensor:
        if geometry == "strongly_convex":
            return eye * (0.7 * t / 2)
        if geometry == "exp_concave":
            return eye * (1 + b * G**2 / 2) + b / 2 * outer
        return eye * math.sqrt(10 * D**2 * 1.5**2 + 4 * G**2 + variation) / D

    for t, g in enumerate(grads, 1):
        hat = argmin(g, hat, metric(t))
        variation += float((g - last).square().sum())
        outer = outer + torch.outer(g, g)
        last = g
        played.append(argmin(g, hat, metric(t + 1)))
    return torch.stack(played)


OPTIONS = {
    "euclidean": dict(L=1.5),
    "strongly_convex": dict(mu=0.7),
    "exp_concave": dict(alpha=0.3),
}


@pytest.mark.parametrize("geometry", OPTIONS)
def test_steps_are_those_of_the_formulas(geometry: str) -> None:
    """Of one point that is kept in two parameters, beside a group of another geometry."""
    start, grads = torch.full((5,), 0.3, dtype=F64), 3 * torch.randn(8, 5, dtype=F64)
    expected = by_the_formulas(geometry, start, grads, D=2.0, G=4.0)
    a, b = (part.clone().requires_grad_() for part in (start[:4].view(2, 2), start[4]))
    other = torch.ones(3, requires_grad=True)
    options = dict(D=2.0, G=4.0, geometry=geometry, **OPTIONS[geometry])
    optimizer = OptimisticOMD([a, b], **options)
    optimizer.add_param_group(
        dict(params=[other], geometry="euclidean", L=None, mu=None, alpha=None)
    )
    inside = 0
    for g, x in zip(grads, expected):
        a.grad, b.grad = g[:4].view(2, 2), g[4]
        optimizer.step()
        torch.testing.assert_close(torch.cat([a.flatten(), b.view(1)]), x, rtol=0, atol=1e-9)
        inside += float(x.norm()) < 0.999
    assert inside < len(grads) and torch.equal(other, torch.ones(3))  # which had no gradient


@pytest.mark.parametrize("geometry", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_on_alike(geometry: str, dtype: torch.dtype) -> None:
    def made() -> tuple[Tensor, OptimisticOMD]:
        x = torch.full((4,), 0.1, dtype=dtype, requires_grad=True)
        return x, OptimisticOMD([x], D=2.0, G=4.0, geometry=geometry, **OPTIONS[geometry])

    def run(x: Tensor, optimizer: OptimisticOMD, grads: Tensor) -> None:
        for g in grads:
            x.grad = g.to(dtype)
            assert optimizer.step(lambda: 3.0) == 3.0

    grads = torch.randn(8, 4)
    x, optimizer = made()
    run(x, optimizer, grads[:4])
    y, resumed = made()
    y.data.copy_(x.data)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    run(x, optimizer, grads[4:])
    run(y, resumed, grads[4:])
    assert torch.equal(x, y)
    for old, new in zip(saved["state"][0].values(), resumed.state_dict()["state"][0].values()):
        assert not isinstance(old, Tensor) or (old.dtype == new.dtype != torch.bfloat16)


def test_domains_and_nan() -> None:
    def after(projection, D: float = 2.0, grad: float = 50.0) -> Tensor:
        x = torch.full((4,), 0.5, requires_grad=True)
        optimizer = OptimisticOMD([x], D=D, G=1.0, projection=projection)
        x.grad = grad * torch.tensor([1.0, -1.0, -1.0, 1.0])
        optimizer.step()
        return x.detach()

    torch.testing.assert_close(after("ball").norm(), torch.tensor(1.0))
    assert torch.equal(after(None), after("ball"))
    torch.testing.assert_close(after("box"), torch.tensor([-0.5, 0.5, 0.5, -0.5]))
    torch.testing.assert_close(
        after("simplex", math.sqrt(2)), torch.tensor([0.0, 0.5, 0.5, 0.0]), rtol=0, atol=1e-6
    )
    assert torch.equal(after(lambda x: x.clamp(-2, 2)), torch.tensor([-2.0, 2.0, 2.0, -2.0]))
    for projection in ("ball", "box", "simplex"):
        assert after(projection, grad=math.nan).isnan().all()


# --- regret -------------------------------------------------------------------------------------


def test_regret_of_small_cases() -> None:
    losses, fixed = (
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 0.0]]),
    )
    assert static_regret(losses, fixed).tolist() == [1.0, 0.0, 2.0]
    assert static_regret(losses, fixed[:, 0]).tolist() == [1.0, -2.0, 0.0]
    assert dynamic_regret(losses, fixed.amin(1)).tolist() == [1.0, 1.0, 3.0]
    assert path_length(torch.tensor([[0.0], [2.0], [1.0]])).tolist() == [0.0, 2.0, 3.0]
    assert regret_exponent(torch.tensor([1, 10]), torch.tensor([[1.0, 10.0], [0.0, 1.0]])).isnan()[
        1
    ]


def played(rounds: int, sigma: float, seed: int, optimistic: bool = True, **options) -> float:
    """Static regret on f_t(x) = |x - c_t|^2 / 2 in the unit ball of five dimensions."""
    generator = torch.Generator().manual_seed(seed)
    c = sigma * torch.randn(rounds, 5, generator=generator, dtype=F64)
    c[:, 0] += 0.5
    x = torch.zeros(5, dtype=F64, requires_grad=True)
    if not options:
        options = dict(L=1.0)
    optimizer = OptimisticOMD([x], D=2.0, G=4.0, **options)
    losses, squares = [], 40 + 64.0
    for center in c:
        x.grad = x.detach() - center
        losses.append(x.grad.square().sum() / 2)
        if optimistic:
            optimizer.step()
        else:  # online gradient descent: the same rule without a guess
            squares += float(x.grad.square().sum())
            x.data = project_ball(x.data - 2 / math.sqrt(squares) * x.grad)
    best = (project_ball(c.mean(0)) - c).square().sum(1) / 2
    return float(static_regret(torch.stack(losses), best)[-1])


def test_regret_is_flat_without_noise_and_below_gradient_descent_with_it() -> None:
    assert played(100, 0.0, 0) == pytest.approx(0.30, abs=0.01)
    assert played(400, 0.0, 0) == pytest.approx(played(100, 0.0, 0), abs=1e-6)
    assert played(400, 1.0, 0) < played(400, 1.0, 0, optimistic=False)


@pytest.mark.exhaustive
def test_regret_grows_with_the_root_of_the_rounds() -> None:
    rounds = torch.tensor([500, 2000, 8000])
    runs = {
        optimistic: torch.tensor(
            [[played(int(t), 1.0, seed, optimistic) for t in rounds] for seed in range(2)]
        ).mean(0)
        for optimistic in (True, False)
    }
    assert 0.4 <= regret_exponent(rounds, runs[True]) <= 0.65
    assert (runs[True] < runs[False]).all()
    still = [played(int(t), 0.0, 0) for t in rounds]
    assert max(still) - min(still) < 1e-6


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        (dict(geometry="strongly_convex", mu=1.0), 1.35),
        (dict(geometry="exp_concave", alpha=1 / 16), 1.9),
    ],
)
def test_curvature_makes_regret_grow_slower(options: dict, factor: float) -> None:
    """Four times the rounds: 2 by the root, 1.2 to 1.35 by the logarithm."""
    few, many = (sum(played(t, 1.0, seed, **options) for seed in range(2)) for t in (1000, 4000))
    assert many < factor * few
