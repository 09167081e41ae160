"""LanczosSGD: rates that nobody chose, and how it behaves as an optimizer."""

from __future__ import annotations

import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.analysis import batch_extremal_eigenvalue, max_learning_rate
from pyloss.optim import LanczosSGD
from pyloss.optim.lr_scheduler import LinearDecay

F64 = torch.float64


def quadratic(*curvature: float):
    """(weight, closure) of half the sum of c w^2."""
    c = torch.tensor(curvature, dtype=F64)
    weight = torch.ones(len(c), dtype=F64, requires_grad=True)
    return weight, lambda: (c * weight.square()).sum() / 2


@pytest.mark.parametrize(("lr", "stable"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_is_the_edge_of_stability(lr: float, stable: bool, momentum: float) -> None:
    """At noise 0, where the exact law is used: 2 (1 + mu) / lam."""
    weight, closure = quadratic(7.0, 1.0)
    sizes = dict(noise=0.0, batch_size=1, curvature_batch_size=1)
    optimizer = LanczosSGD([weight], lr, momentum=momentum, every=1000, **sizes)
    for _ in range(400):
        optimizer.step(closure)
    assert (weight[0].abs() < 1) == stable
    assert optimizer.rate() == pytest.approx(lr * 2 * (1 + momentum) / 7)
    without = LanczosSGD([weight], lr, momentum=momentum)
    without.step(closure)
    assert without.rate() == pytest.approx(lr * 2 * (1 - momentum) / 7)


def test_damping_is_the_negative_curvature() -> None:
    weight, closure = quadratic(3.0, -2.0)
    optimizer = LanczosSGD([weight], 1.0)
    optimizer.step(closure)
    torch.testing.assert_close(optimizer.curvature, torch.tensor([3.0, -2.0], dtype=F64))
    assert optimizer.rate() == pytest.approx(2 / 5)
    plain = LanczosSGD([weight], 1.0, damping=0.5, weight_decay=0.1)
    plain.step(closure)
    assert plain.rate() == pytest.approx(2 / 3.6)


def test_the_rate_of_another_batch_size_is_that_of_the_law() -> None:
    noise, measured, own, momentum = 36.0, 16, 4, 0.5
    seen = batch_extremal_eigenvalue(5.0, noise, measured, 1.0)
    weight, closure = quadratic(float(seen), 1.0)
    optimizer = LanczosSGD(
        [weight], 1.0, momentum=momentum, noise=noise, batch_size=own,
        curvature_batch_size=measured, population=64,
    )  # fmt: skip
    optimizer.population = None
    optimizer.step(closure)
    for size in (own, 64):  # a batch that grows in the run
        optimizer.batch_size = size
        law = max_learning_rate(5.0, size, noise, optimizer="momentum", momentum=momentum)
        assert optimizer.rate() == pytest.approx(float(law))
    optimizer.population = 64
    optimizer.curvature_batch_size = 64  # all there is: no noise in what was measured, nor in steps
    assert optimizer.rate() == pytest.approx(3 / float(seen))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_trains_without_a_rate(momentum: float, scale: float) -> None:
    """Whatever the units of the loss."""
    torch.manual_seed(0)
    x = torch.randn(128, 6)
    y = (x[:, :3].square().sum(1) > x[:, 3:].square().sum(1)).long()
    net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))
    optimizer = LanczosSGD(net.parameters(), every=20, momentum=momentum)
    generator = torch.Generator().manual_seed(0)
    for _ in range(160):
        batch = torch.randint(128, (64,), generator=generator)
        optimizer.step(lambda b=batch: scale * F.cross_entropy(net(x[b]), y[b]))
    assert F.cross_entropy(net(x), y) < 0.4


def test_measures_every_so_often_and_calls_the_closure_once() -> None:
    weight, closure = quadratic(2.0, 1.0)
    found, calls = [], 0

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return closure() * (1.0 if calls <= 3 else 10.0)

    optimizer = LanczosSGD([weight], 1.0, every=5)
    assert optimizer.curvature is None
    for _ in range(7):
        loss = optimizer.step(counted)
        assert not loss.requires_grad
        found.append(round(optimizer.rate(), 6))
    assert calls == 7 and found == [1.0] * 5 + [0.1] * 2


def test_groups_frozen_parameters_and_schedules() -> None:
    weight, closure = quadratic(2.0, 1.0)
    bias = torch.zeros(1, dtype=F64, requires_grad=True)
    frozen = torch.ones(1, dtype=F64)
    groups = [{"params": [frozen, weight]}, {"params": [bias], "lr": torch.tensor(0.25)}]
    optimizer = LanczosSGD(groups, 0.5)
    schedule = LinearDecay(optimizer, 4)
    for factor in (1.0, 0.75):
        before = weight.detach().clone(), bias.detach().clone()
        optimizer.step(lambda: closure() + (bias - 1).square().sum())
        schedule.step()
        for p, old, share in zip((weight, bias), before, (0.5, 0.25)):
            torch.testing.assert_close(p.detach(), old - factor * share * p.grad)  # 2 / lam = 1
    assert frozen == 1 and frozen.grad is None


def test_resumed_and_copied() -> None:
    def run(weight: Tensor, optimizer: LanczosSGD, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.step(lambda: (weight**4).sum())
        return weight.detach().clone()

    options = dict(momentum=0.5, every=3, lr=0.3)
    start = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    weight = start.clone().requires_grad_()
    optimizer = LanczosSGD([weight], **options)
    at = run(weight, optimizer, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    expected, curvature = run(weight, optimizer, 1), optimizer.curvature
    file.seek(0)
    again = at.clone().requires_grad_()
    resumed = LanczosSGD([again], **options)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(again, resumed, 1), expected)
    assert resumed.curvature.dtype == F64 and torch.equal(resumed.curvature, curvature)
    assert pickle.loads(pickle.dumps(resumed)).every == 3
    # What a hook of the user has put in its place counts.
    saved = optimizer.state_dict()
    other = LanczosSGD([start.clone().requires_grad_()], **options)
    other.register_load_state_dict_pre_hook(lambda _, given: saved)
    other.load_state_dict(other.state_dict())
    assert torch.equal(other.curvature, curvature)


def test_what_is_not_finite() -> None:
    weight, closure = quadratic(2.0, 1.0)
    optimizer = LanczosSGD([weight], 1.0, every=1)
    optimizer.step(closure)
    before = optimizer.rate()
    # The gradient of |w|^1.5 at 0 is finite, its slope is not: the rate stays.
    with torch.no_grad():
        weight[1] = 0.0
    optimizer.step(lambda: closure() + weight.abs().pow(1.5)[1])
    assert optimizer.rate() == before == pytest.approx(1.0) and weight.isfinite().all()
    optimizer.step(lambda: closure() * math.nan)
    assert weight.isnan().all()


def test_no_curvature() -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = LanczosSGD([weight], 0.25)
    optimizer.step(lambda: weight.sum())
    assert weight.tolist() == [0.75, 0.75] and optimizer.curvature is None
    frozen = torch.ones(2)
    LanczosSGD([frozen]).step(lambda: weight.sum())  # as torch's SGD without gradients
    assert frozen.tolist() == [1, 1]


def test_draws_nothing_from_torch() -> None:
    weight, closure = quadratic(2.0, 1.0)
    before = torch.get_rng_state()
    LanczosSGD([weight]).step(closure)
    assert torch.equal(before, torch.get_rng_state())


def test_a_closure_that_went_backward() -> None:
    weight, closure = quadratic(2.0, 1.0)

    def gone() -> Tensor:
        loss = (weight**3).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="a second time"):
        LanczosSGD([weight]).step(gone)
