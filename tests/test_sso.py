"""SSO and its surrogate: the identities of the paper, and how it behaves as an optimizer."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.functional import target_surrogate_loss
from pyloss.optim import SSO
from pyloss.optim.lr_scheduler import LinearDecay

F64 = torch.float64
EXACT = functools.partial(
    torch.optim.LBFGS, max_iter=500, max_eval=2000, tolerance_grad=1e-14, tolerance_change=1e-18,
    line_search_fn="strong_wolfe",
)  # fmt: skip


class Problem:
    """A linear model with fixed data; counts the calls of the loss and of the model."""

    def __init__(self, rows: int = 20, width: int = 4, loss=None) -> None:
        self.x = torch.randn(rows, width, dtype=F64)
        self.y = torch.randn(rows, dtype=F64)
        self.weight = torch.randn(width, dtype=F64, requires_grad=True)
        self.loss = loss or (lambda z: (z - self.y).square().sum() / 2)
        self.calls = {"model": 0, "loss": 0}

    def closure(self):
        def loss_fn(z: Tensor) -> Tensor:
            self.calls["loss"] += 1
            return self.loss(z)

        self.calls["model"] += 1
        return self.x @ self.weight, loss_fn

    def value(self) -> float:
        return self.loss(self.x @ self.weight).item()


# --------------------------------------------------------------------------------------------------
# The identities


def test_exact_inner_minimisation_is_projected_gradient_descent_on_the_outputs() -> None:
    y = torch.randn(20, dtype=F64)
    problem = Problem(loss=lambda z: F.softplus(-y * z).sum())
    optimizer = SSO([problem.weight], EXACT, inner_steps=1, eta=1.7)
    for _ in range(3):
        z = (problem.x @ problem.weight).detach().requires_grad_()
        (g,) = torch.autograd.grad(problem.loss(z), z)
        projector = problem.x @ torch.linalg.pinv(problem.x)
        optimizer.step(problem.closure)
        expected = projector @ (z - 1.7 * g)
        torch.testing.assert_close(problem.x @ problem.weight, expected, rtol=0, atol=1e-9)


def test_least_squares_in_one_step() -> None:
    problem = Problem()
    SSO([problem.weight], EXACT, inner_steps=1, eta=1.0).step(problem.closure)
    solution = torch.linalg.lstsq(problem.x, problem.y[:, None]).solution[:, 0]
    torch.testing.assert_close(problem.weight.detach(), solution, rtol=0, atol=1e-9)


def test_one_inner_step_is_sgd() -> None:
    problem = Problem()
    weight = problem.weight.detach().clone().requires_grad_()
    ours = SSO([problem.weight], inner_steps=1, eta=0.3, lr=0.01)
    theirs = torch.optim.SGD([weight], lr=0.01)
    for _ in range(3):
        loss = ours.step(problem.closure)
        theirs.zero_grad()
        expected = problem.loss(problem.x @ weight)
        expected.backward()
        theirs.step()
        assert torch.equal(loss, expected) and torch.equal(problem.weight, weight)
    assert problem.calls == {"model": 3, "loss": 3}


def test_kl_with_eta_1_is_the_cross_entropy() -> None:
    z, ref = torch.randn(2, 6, 4, dtype=F64)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    at = ref.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(at, y, reduction="sum"), at)

    def f(z: Tensor) -> Tensor:
        return target_surrogate_loss(z, ref, g, 1.0, divergence="kl")

    difference = F.cross_entropy(z, y, reduction="sum") - F.cross_entropy(ref, y, reduction="sum")
    torch.testing.assert_close(f(z) - f(ref), difference)


@pytest.mark.parametrize("divergence", ["l2", "kl"])
def test_its_gradient_is_that_of_the_loss_where_it_was_made(divergence: str) -> None:
    ref, g = torch.randn(2, 5, 3)
    z = ref.clone().requires_grad_()
    target_surrogate_loss(z, ref, g, 0.1, divergence=divergence).backward()
    torch.testing.assert_close(z.grad, g)


def test_more_inner_steps_need_fewer_calls_of_the_loss() -> None:
    """Logistic regression whose features have scales from 1 to 0.01, at equal oracle calls."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 30, generator=generator, dtype=F64) * torch.logspace(0, -2, 30, dtype=F64)
    y = (x @ (torch.randn(30, generator=generator, dtype=F64) * 30)).sign()

    def loss(z: Tensor) -> Tensor:
        return F.softplus(-y * z).mean()

    def last(make) -> float:
        weight = torch.zeros(30, dtype=F64, requires_grad=True)
        optimizer = make([weight])
        for _ in range(15):
            optimizer.step(lambda: (x @ weight, loss))
        return loss(x @ weight).item()

    smooth = 0.25 * torch.linalg.matrix_norm(x, 2).item() ** 2 / 400  # of the loss in the weight
    eta = 4 * 400  # 1 / smoothness of the loss in the outputs
    inner_rate = eta / torch.linalg.matrix_norm(x, 2).item() ** 2
    plain = last(lambda p: SSO(p, inner_steps=1, lr=1 / smooth))
    few = last(lambda p: SSO(p, inner_steps=10, eta=eta, lr=inner_rate))
    many = last(lambda p: SSO(p, inner_steps=60, eta=eta, lr=inner_rate))
    search = last(lambda p: SSO(p, "armijo", inner_steps=5, eta=eta))
    assert plain > 1.3 * few and few > 1.1 * many and plain > 1.3 * search


# --------------------------------------------------------------------------------------------------
# An optimizer


@pytest.mark.parametrize("inner", ["sgd", "armijo", torch.optim.Adam, EXACT])
def test_the_loss_is_called_once_a_step(inner) -> None:
    problem = Problem(5, 2)
    optimizer = SSO([problem.weight], inner, inner_steps=3, eta=1.0, lr=0.05)
    before = problem.value()
    problem.calls = {"model": 0, "loss": 0}
    returned = optimizer.step(problem.closure)
    assert problem.calls["loss"] == 1 and problem.calls["model"] >= 3
    assert inner != "sgd" or problem.calls["model"] == 3  # the first call's graph is used
    assert returned.item() == before > problem.value()
    assert not returned.requires_grad


def test_armijo_takes_steps_that_are_long_enough_and_stops_at_the_minimum() -> None:
    problem = Problem(5, 2)
    optimizer = SSO([problem.weight], "armijo", inner_steps=200, eta=1.0)
    optimizer.step(problem.closure)
    solution = torch.linalg.lstsq(problem.x, problem.y[:, None]).solution[:, 0]
    torch.testing.assert_close(problem.weight.detach(), solution, rtol=0, atol=1e-5)
    at = problem.weight.detach().clone()
    optimizer.step(problem.closure)
    torch.testing.assert_close(problem.weight.detach(), at, rtol=0, atol=1e-5)


def test_armijo_leaves_the_weights_where_no_step_helps() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    flip = iter(range(10**6))

    def closure():  # outputs that only grow, whatever the step
        return weight + next(flip), lambda z: z.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSO([weight], "armijo", inner_steps=2).step(closure)
    assert weight.item() == 1.0


def test_groups_and_a_schedule_of_their_rates() -> None:
    problem = Problem(6, 3)
    bias = torch.zeros(1, dtype=F64, requires_grad=True)
    rate = torch.tensor(0.02, dtype=F64)
    groups = [{"params": [problem.weight]}, {"params": [bias], "lr": rate}]
    optimizer = SSO(groups, inner_steps=1, lr=0.04)
    schedule = LinearDecay(optimizer, 4)

    def closure():
        return problem.x @ problem.weight + bias, problem.loss

    for factor in (1.0, 0.75):
        before = problem.weight.detach().clone(), bias.detach().clone()
        optimizer.step(closure)
        for p, old, lr in zip((problem.weight, bias), before, (0.04, 0.02)):
            torch.testing.assert_close(p.detach(), old - factor * lr * p.grad)
        schedule.step()


def test_resumed_and_copied() -> None:
    def run(optimizer, problem, steps: int) -> list[float]:
        return [optimizer.step(problem.closure).item() for _ in range(steps)]

    options = dict(eta_schedule="adagrad", eta=3.0, lr=1e-3)
    problem = Problem()
    optimizer = SSO([problem.weight], **options)
    run(optimizer, problem, 2)
    file, at = io.BytesIO(), problem.weight.detach().clone()
    torch.save(optimizer.state_dict(), file)
    expected = run(optimizer, problem, 3)

    file.seek(0)
    problem.weight = at.clone().requires_grad_()
    optimizer = SSO([problem.weight], **options)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert run(optimizer, problem, 3) == expected

    problem.weight = at.clone().requires_grad_()
    clone = pickle.loads(pickle.dumps(SSO([problem.weight], inner_steps=3, **options)))
    assert clone.inner_steps == 3 and clone.eta_schedule == "adagrad"


def test_the_sum_of_adagrad_stays_wide_beside_half_weights() -> None:
    weight = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = SSO([weight], eta_schedule="adagrad")
    optimizer.step(lambda: (weight * 1.0, lambda z: (z * 1.234).sum()))
    twin = SSO([weight], eta_schedule="adagrad")
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sums = [o.state[weight]["grad_square"] for o in (optimizer, twin)]
    assert sums[0].dtype == torch.float32 and torch.equal(*sums)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        (dict(eta_schedule="stochastic"), lambda t: (t + 1) ** -0.5),
        (dict(eta_schedule="exponential", total_steps=4), lambda t: 4 ** (-t / 4)),
        (dict(eta_schedule="adagrad"), lambda t: (6 * (t + 1)) ** -0.5),  # gradients of six ones
    ],
)
def test_schedules_are_their_formulas(options: dict, factor) -> None:
    found = []
    for given in (options, dict(eta_schedule=factor)):
        weight = torch.ones(2, requires_grad=True)
        x = torch.arange(12.0).reshape(6, 2) / 12
        optimizer = SSO([weight], eta=0.7, lr=0.1, **given)
        for _ in range(3):
            optimizer.step(lambda weight=weight, x=x: (x @ weight, torch.sum))
        found.append(weight.detach())
    torch.testing.assert_close(*found)
    assert not found[0].allclose(torch.ones(2))


def test_dropout_is_warned_of() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.randn(5, 3)

    def closure():
        return model(x), lambda z: z.square().sum()

    with pytest.warns(UserWarning, match="draws random numbers.*model.eval"):
        SSO(model.parameters(), inner_steps=2).step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SSO(model.parameters(), inner_steps=1).step(closure)  # one step sees one function
        model.eval()
        SSO(model.parameters(), inner_steps=2).step(closure)


WEIGHT = torch.ones(2, requires_grad=True)
SIZES = iter((2, 1))
TABLE = nn.Embedding(4, 2, sparse=True)


@pytest.mark.parametrize(
    ("error", "words", "closure"),
    [
        (TypeError, "step needs a closure, got NoneType", None),
        (TypeError, r"closure must return \(outputs, loss_fn\), got Tensor", lambda: WEIGHT),
        (TypeError, r"got \(Tensor, Tensor\)", lambda: (WEIGHT, WEIGHT)),
        (TypeError, "outputs must be a Tensor, got list", lambda: ([WEIGHT], torch.sum)),
        (RuntimeError, "outputs must require a gradient", lambda: (WEIGHT.detach(), torch.sum)),
        (RuntimeError, r"loss_fn must return a scalar Tensor, got \[2\]",
         lambda: (WEIGHT * 2, torch.abs)),
        (RuntimeError, "loss_fn must return a scalar Tensor, got float",
         lambda: (WEIGHT * 2, lambda z: 1.0)),
        (ValueError, r"outputs had the shape \[2\] when the step began, and now have \[1\]",
         lambda: (WEIGHT[: next(SIZES)] * 1, torch.sum)),
        (RuntimeError, "gradients must be dense, got one of layout torch.sparse_coo",
         lambda: (TABLE(torch.tensor([1, 2])), torch.sum)),
    ],
)  # fmt: skip
def test_closures_that_are_refused(error, words: str, closure) -> None:
    with pytest.raises(error, match=words):
        SSO([WEIGHT, TABLE.weight], inner_steps=2).step(closure)
