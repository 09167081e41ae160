"""EnsLoss: calibration, the distribution of the derivatives, the module. What every loss promises:
tests/specs/ensemble.py."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from pyloss.functional import ens_loss, ens_loss_derivatives
from pyloss.nn import EnsLoss

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("bc_lambda", [-0.9, -0.5, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_convex_and_calibrated(bc_lambda: float, dtype: torch.dtype) -> None:
    """Every draw is negative and does not decrease with the margin, ties and far ones too."""
    for seed in range(20):
        z = (4 * torch.randn(200, generator=seeded(seed), dtype=F64)).to(dtype)
        z[:20] = z[20:40]
        z[40], z[41] = 1e4, -1e4
        g = ens_loss_derivatives(z, bc_lambda=bc_lambda, generator=seeded(seed + 100))
        assert (g < 0).all() and (g >= -1 - 1e-6).all()
        ordered = g[z.argsort(stable=True)]
        assert (ordered.diff() >= 0).all()
        assert g[40] > -2e-4  # the tail decays


def test_the_gradient_is_the_derivative() -> None:
    f = torch.randn(50, generator=seeded(0), dtype=F64).requires_grad_()
    y = torch.arange(50) % 2
    loss = ens_loss(f, y, generator=seeded(1))
    (grad,) = torch.autograd.grad(loss, f, create_graph=True)
    sign = 2 * y - 1
    g = ens_loss_derivatives(sign * f, generator=seeded(1))
    torch.testing.assert_close(grad, g * sign / 50)
    torch.testing.assert_close(loss, (g * sign * f).mean())
    assert not grad.requires_grad  # the derivatives are constants: there is no second one


def test_distribution_of_the_derivatives() -> None:
    """-min(1, e^N): half of them -1, and P(-r <= x) = Phi(log x) below."""
    n = 20000
    z = torch.linspace(-1, 0.9, n, dtype=F64)
    g = ens_loss_derivatives(z, generator=seeded(0)) + 1e-6
    # 4 standard deviations
    assert abs((g < -1 + 1e-9).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    for x in (0.2, 0.5, 0.9):
        expected = 0.5 * (1 + math.erf(math.log(x) / math.sqrt(2)))
        assert abs((-g <= x).double().mean() - expected) < 4 * 0.5 / math.sqrt(n)
    # lambda -> 0 is the exponential; the transform is exact at lambda = 1.
    e = torch.randn(n, generator=seeded(1), dtype=F64)
    near, exact = (ens_loss_derivatives(z, bc_lambda=v, noise=e) for v in (1e-9, 0.0))
    torch.testing.assert_close(near, exact, rtol=1e-6, atol=1e-9)
    at_one = ens_loss_derivatives(z, bc_lambda=1.0, noise=e, tail=False)
    expected = -(1 + e).clamp(0, 1).sort(descending=True).values - 1e-6
    torch.testing.assert_close(at_one, expected)


def test_beyond_the_singularity() -> None:
    """1 + lambda e <= 0: infinity for lambda < 0, which is -1; 0 for lambda > 0."""
    e = torch.tensor([5.0, -5.0])
    for lam, expected in ((-0.9, [-1.0, -(5.5 ** (1 / -0.9))]), (0.9, [-1.0, 0.0])):
        for value in (lam, torch.tensor(lam)):
            g = ens_loss_derivatives(torch.tensor([-1.0, 0.0]), bc_lambda=value, noise=e)
            torch.testing.assert_close(g + 1e-6, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_small_batches_and_infinite_scores() -> None:
    assert ens_loss(torch.tensor([0.3]), torch.tensor([1])).shape == ()
    assert ens_loss(torch.empty(0), torch.empty(0)).isnan()
    assert ens_loss(torch.empty(0, 1), torch.empty(0), reduction="sum") == 0
    f = torch.tensor([1.0, math.nan, -math.inf], requires_grad=True)
    each = ens_loss(f, torch.tensor([1, 1, 0]), reduction="none")
    assert each[0].isfinite() and each[1].isnan()
    (grad,) = torch.autograd.grad(each.sum(), f)
    assert grad[0].isfinite() and grad[1].isnan()


def test_module() -> None:
    f, y = torch.randn(40, generator=seeded(0)), torch.arange(40) % 2
    module = EnsLoss(0.5, tail=False, reduction="sum")
    found = module(f, y, generator=seeded(3))
    expected = ens_loss(f, y, bc_lambda=torch.tensor(0.5), tail=False, reduction="sum",
                        generator=seeded(3))  # fmt: skip
    assert torch.equal(found, expected) and found != module(f, y)
    torch.manual_seed(5)
    first = module(f, y)
    torch.manual_seed(5)
    assert torch.equal(module(f, y), first)
    for reduction in ("sum", "mean", "none"):
        module.eval().reduction = reduction
        expected = F.binary_cross_entropy_with_logits(f, y.float(), reduction=reduction)
        torch.testing.assert_close(module(f, y), expected)


def test_lambda_is_drawn_anew_after_a_period() -> None:
    module, g = EnsLoss(period=2), seeded(0)
    seen = []
    for _ in range(41):
        seen.append(module.current_lambda.item())
        module.step_epoch(g)
    assert seen[0] == seen[1] == 0 and seen[2::2] == seen[3::2] + seen[40:]
    drawn = seen[2::2]
    assert len(set(drawn)) == 20 and min(drawn) < -0.5 and max(drawn) > 0.5
    assert all(-1 <= v <= 1 for v in drawn)
    fixed = EnsLoss(0.3)
    fixed.step_epoch()
    assert fixed.current_lambda == torch.tensor(0.3)

    f, y = torch.randn(10), torch.arange(10) % 2
    fresh = EnsLoss(period=2)
    fresh.load_state_dict(module.state_dict())
    for twin in (fresh, pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(f, y, seeded(1)), module(f, y, seeded(1)))
        assert twin.epoch == module.epoch and repr(twin) == repr(module)
    assert module.half().current_lambda.dtype == torch.float32
    assert "bc_lambda=0.0, period=2" in repr(module)


def test_compiled_with_the_global_generator() -> None:
    module = EnsLoss(period=1).train()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    f, y = torch.randn(16, requires_grad=True), torch.arange(16) % 2
    loss = compiled(f, y)
    (grad,) = torch.autograd.grad(loss, f)
    sign = 2 * y - 1
    g = 16 * grad * sign  # some derivatives: negative, in the order of the margins
    assert (g < 0).all() and (g[(sign * f.detach()).argsort()].diff() >= 0).all()
    assert not torch.equal(loss, compiled(f, y))
    for rows in (7, 5):  # the last batch of an epoch: a graph of any size
        assert compiled(f[:rows], y[:rows]).isfinite()


def test_learns() -> None:
    """Two Gaussians, by gradient descent: the direction of the means."""
    g = seeded(0)
    y = torch.arange(400) % 2
    x = torch.randn(400, 5, generator=g) + (2 * y - 1)[:, None] * torch.tensor([1.0, 0, 0, 0, 0])
    w = torch.zeros(5, requires_grad=True)
    for _ in range(100):
        (grad,) = torch.autograd.grad(ens_loss(x @ w, y, generator=g), w)
        w = (w - 0.5 * grad).detach().requires_grad_()
    assert w[0] > 3 * w[1:].abs().max()
    assert ((x @ w > 0) == (y == 1)).float().mean() > 0.8


@pytest.mark.exhaustive
def test_digits_against_cross_entropy() -> None:
    """Even and odd ones, 60 epochs: no gain is expected on easy data, and no more than 3 % lost."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    x = torch.from_numpy(found.data).float() / 16
    y = torch.from_numpy(found.target) % 2
    order = torch.randperm(len(y), generator=seeded(0))
    test, train = order[:500], order[500:]

    def accuracy(loss_of) -> float:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1), torch.nn.Flatten(0)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(60):
            for batch in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                loss_of(model(x[batch]), y[batch]).backward()
                optimizer.step()
        return ((model(x[test]) > 0) == (y[test] == 1)).float().mean().item()

    plain = accuracy(lambda f, y: F.binary_cross_entropy_with_logits(f, y.float()))
    assert accuracy(EnsLoss()) > plain - 0.03
