"""Aggregate responses: identities, closed forms, risks and privacy, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pyloss.aggregate import (
    aggregate_risk,
    dp_aggregate,
    interpolated_least_squares,
    optimal_bag_size,
)
from pyloss.functional import aggregate_loss

F64 = torch.float64
INDEX = torch.tensor([2, 0, 1, 2, 0, 2, 2, 0])  # bags of 3, 1 and 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def test_instance_loss_is_bag_loss_and_variance() -> None:
    pred, y = random(8), random(3, seed=1)
    bag, ins, both = (aggregate_loss(pred, y, INDEX, rho=r, reduction="none") for r in (0, 1, 0.3))
    variance = torch.stack([pred[INDEX == a].var(correction=0) for a in range(3)])
    torch.testing.assert_close(ins, bag + variance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both, bag + 0.3 * variance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", ["mse", "ce", "bce"])
def test_a_convex_loss_is_larger_at_the_instances(loss: str) -> None:
    shape = (8, 4) if loss == "ce" else (8,)
    y = random(3, *shape[1:], seed=1)
    y = {"mse": y, "ce": y.softmax(-1), "bce": y.sigmoid()}[loss]
    bag, ins = (
        aggregate_loss(random(*shape), y, INDEX, rho=r, loss=loss, reduction="none") for r in (0, 1)
    )
    assert (ins >= bag).all() and (ins - bag)[[0, 2]].min() > 1e-3


def test_gradient_of_the_squared_loss() -> None:
    pred, y, rho = random(12).requires_grad_(), random(4, seed=1), 0.3
    (found,) = torch.autograd.grad(aggregate_loss(pred, y, bag_size=3, rho=rho), pred)
    mean, own = pred.view(4, 3).mean(1).repeat_interleave(3), y.repeat_interleave(3)
    expected = 2 / 12 * ((1 - rho) * (mean - own) + rho * (pred - own))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_bags_of_one() -> None:
    pred, y = random(6, 3), random(6, 3, seed=1).softmax(1)
    values = [aggregate_loss(pred, y, bag_size=1, rho=r, loss="ce") for r in (0.0, 0.4, 1.0)]
    exact = torch.nn.functional.cross_entropy(pred, y)
    for value in values:
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
    risks = [aggregate_risk(60, 5, 1, r, 0.25) for r in (0.0, 0.4, 1.0)]
    assert risks[0] == risks[1] == risks[2] == 5 * 0.25 / (60 - 5 - 1)


def test_large_logits_do_not_overflow() -> None:
    """The mean probability is taken in logarithms."""
    pred = torch.tensor([-800.0, -900.0, 800.0, 900.0], dtype=F64)
    found = aggregate_loss(pred, pred.new_tensor([0.5, 0.5]), bag_size=2, rho=0.0, loss="bce",
                           reduction="none")  # fmt: skip
    exact = (800 + math.log(2)) / 2
    torch.testing.assert_close(found, found.new_tensor([exact, exact]), rtol=1e-12, atol=0)


def test_closed_form_is_stationary() -> None:
    x, y = random(8, 2).requires_grad_(), random(3, seed=1)
    for rho in (0.2, 1.0):
        theta = interpolated_least_squares(x.detach(), y, INDEX, rho=rho).requires_grad_()
        (g,) = torch.autograd.grad(aggregate_loss(x.detach() @ theta, y, INDEX, rho=rho), theta)
        assert g.abs().max() < 1e-12
    # Fewer bags than features: the smallest of many.
    x, y = random(8, 5), random(2, seed=1)
    theta = interpolated_least_squares(x, y, bag_size=4, rho=0.0)
    torch.testing.assert_close(theta, torch.linalg.pinv(x.view(2, 4, 5).mean(1)) @ y)


def simulated(n: int, d: int, k: int, rho: float, s2: float, reps: int, **private) -> float:
    total = 0.0
    for seed in range(reps):
        x, theta = random(n, d, seed=seed), random(d, seed=10**6 + seed)
        theta = theta / theta.norm()
        y = x @ theta + s2**0.5 * random(n, seed=2 * 10**6 + seed)
        mean = y.view(-1, k).mean(1)
        if private:
            # Of clipped responses: the risk leaves that out, so here the noise alone is added.
            mean = mean + dp_aggregate(
                0 * y, None, generator=generator(seed), bag_size=k, **private
            )
        found = interpolated_least_squares(x, mean, bag_size=k, rho=rho)
        total += float((found - theta).square().sum())
    return total / reps


def test_risk_is_that_of_the_estimate() -> None:
    """With privacy too, where interpolation is better than both ends."""
    private = dict(epsilon=1.0, bound=1.0)
    found = [
        aggregate_risk(240, 12, 4, rho, 0.25, **private, reps=200, generator=generator())
        for rho in (0.0, 0.2, 1.0)
    ]
    assert found[1] < 0.75 * found[0] and found[1] < 0.75 * found[2]
    for rho, risk in zip((0.0, 0.2), found):
        assert abs(simulated(240, 12, 4, rho, 0.25, 80, **private) / risk - 1) < 0.15


def test_risk_of_bags_alone() -> None:
    assert aggregate_risk(600, 20, 4, 0.0, 0.25) == 20 * 0.25 / (150 - 20 - 1)
    # Its simulation, as for any rho, at a rho next to 0
    close = aggregate_risk(600, 20, 4, 1e-9, 0.25, reps=400, generator=generator())
    assert abs(close / (20 * 0.25 / 129) - 1) < 0.05
    # Fewer bags than features: the smallest norm leaves the rest of the signal
    few = aggregate_risk(40, 30, 4, 0.0, 0.0, signal=2.0)
    assert few == 2.0 * 20 / 30
    assert aggregate_risk(80, 20, 4, 0.0, 0.25) == math.inf


def test_best_size_of_a_bag() -> None:
    """Bags alone: none is best. With the instances' loss the best size lies between."""
    private = dict(epsilon=1.0, bound=3.0, generator=generator())
    alone = optimal_bag_size(600, 20, 0.0, 0.25, **private)
    assert alone.size == 1 and abs(alone.risk - 2.4957) < 1e-4
    sizes = (1, 2, 4, 15, 20)
    for rho, size, risk in ((0.2, 15, 0.750), (1.0, 4, 0.727)):
        found = optimal_bag_size(600, 20, rho, 0.25, **private, sizes=sizes)
        assert found.size == size and abs(found.risk - risk) < 0.02
        assert found.sizes.tolist() == list(sizes) and found.risks.shape == (5,)


def test_noise_of_a_release() -> None:
    """Unbiased, of the Laplace distribution's variance, smaller in larger bags; clipped before."""
    y = torch.full((60_000,), 5.0, dtype=F64)
    index = torch.arange(60_000) % 20_000  # bags of three
    found = dp_aggregate(y, index, 0.5, 1.5, generator()) - 1.5
    scale = 2 * 1.5 / (3 * 0.5)
    assert abs(found.mean()) < 4 * scale * (2 / 20_000) ** 0.5
    assert abs(found.var() / (2 * scale**2) - 1) < 0.06
    assert abs(found.abs().mean() / scale - 1) < 0.03  # that of a Gaussian: 1.13
    assert torch.equal(found + 1.5, dp_aggregate(y, index, 0.5, 1.5, generator()))
    exact = dp_aggregate(random(6), None, math.inf, 9.0, offsets=torch.tensor([0, 1, 6]))
    torch.testing.assert_close(exact[1], random(6)[1:].mean())
