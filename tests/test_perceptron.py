"""Normalized logistic loss and the perceptrons: the published counts of steps to a separator."""

from __future__ import annotations

import math

import pytest
import torch

from pyloss.functional import normalized_logistic_loss
from pyloss.nn import NormalizedLogisticLoss
from pyloss.research.perceptron import batch_perceptron, normalized_batch_perceptron

F64 = torch.float64


def worst_case(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and labels 0, 1: one against n - 1 that lie almost opposite."""
    a = torch.tensor([[-0.5, -1.0]], dtype=F64).repeat(n, 1)
    a[0, 0] = 0.5
    y = torch.zeros(n, dtype=torch.int64)
    y[0] = 1
    return a, y


def steps(n: int, gamma: float, normalize: bool, classes: bool = False) -> int:
    """Of gradient descent from 0 until all samples are on their side."""
    a, y = worst_case(n)
    theta = torch.zeros(2, dtype=F64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=gamma)
    sign = 2 * y - 1
    for count in range(1000):
        scores = a @ theta
        if (sign * scores > 0).all():
            return count
        optimizer.zero_grad()
        if normalize and classes:
            loss = normalized_logistic_loss(torch.stack([-scores / 2, scores / 2], 1), y)
        elif normalize:
            loss = normalized_logistic_loss(scores, y)
        else:
            loss = torch.nn.functional.softplus(-sign * scores).mean()
        loss.backward()
        optimizer.step()
    raise AssertionError("not separated")


@pytest.mark.parametrize(
    ("n", "normalized", "plain"),
    [(1000, (2, 2, 16, 157), 308), (100, (2, 2, 11, 110), 31), (10, (2, 2, 7, 60), 4)],
)
def test_the_published_table(n: int, normalized: tuple[int, ...], plain: int) -> None:
    assert tuple(steps(n, gamma, True) for gamma in (100, 10, 1, 0.1)) == normalized
    assert steps(n, 100, False) == plain


def test_two_classes_are_the_binary_case() -> None:
    assert steps(1000, 1, True, classes=True) == 16


@pytest.mark.parametrize("n", [10, 100, 1000])
def test_large_steps_are_the_perceptron(n: int) -> None:
    a, y = worst_case(n)
    z = a * (2 * y - 1)[:, None]
    fast, slow = normalized_batch_perceptron(z), batch_perceptron(z)
    assert fast.separates and slow.separates
    assert (z @ fast.theta > 0).all() and (z @ slow.theta > 0).all()
    assert fast.iterations == steps(n, 1e6, True) == 2  # and nothing is infinite on the way
    assert slow.iterations == steps(n, 1e5, False)
    radius, margin = 1.25, 0.5**2  # of the separator (1, 0)
    assert fast.iterations <= radius / margin and slow.iterations <= n * radius / margin


def test_perceptron_of_what_is_not_separable() -> None:
    z = torch.tensor([[1.0], [-1.0]])
    found = batch_perceptron(z, max_iter=5)
    assert not found.separates and found.iterations == 5
    with pytest.raises(ValueError, match=r"z must be \(N, D\) with at least one sample"):
        batch_perceptron(z[:0])
    with pytest.raises(TypeError, match="z must be a floating Tensor"):
        normalized_batch_perceptron(z.long())


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_margins_of_any_size(dtype: torch.dtype) -> None:
    """Probabilities of being wrong that are 0 in the dtype still have a largest one."""
    f = torch.tensor([3e4, 2e4, 4e4], dtype=dtype, requires_grad=True)
    normalized_logistic_loss(f, torch.ones(3)).backward()
    torch.testing.assert_close(f.grad, torch.tensor([0.0, -1.0, 0.0], dtype=dtype))
    x = torch.zeros(3, 4, dtype=dtype)
    x[:, 1] = f.detach()
    x.requires_grad_()
    normalized_logistic_loss(x, torch.ones(3, dtype=torch.int64)).backward()
    expected = torch.zeros(3, 4, dtype=dtype)
    expected[1] = torch.tensor([1 / 3, -1, 1 / 3, 1 / 3])
    torch.testing.assert_close(x.grad, expected)


def test_perceptron_of_nan_does_not_separate_and_of_a_bad_limit_is_refused() -> None:
    for run in (batch_perceptron, normalized_batch_perceptron):
        assert not run(torch.tensor([[math.nan, 1.0]]), max_iter=3).separates
        with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
            run(torch.ones(2, 2), max_iter=0)
        with pytest.raises(TypeError, match="max_iter must be an integer, got float"):
            run(torch.ones(2, 2), max_iter=1.5)


def test_module() -> None:
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 7, 1])
    module = NormalizedLogisticLoss(ignore_index=7)
    assert torch.equal(module(x, y), normalized_logistic_loss(x, y, ignore_index=7))
    keep = y != 7
    torch.testing.assert_close(module(x, y), torch.nn.functional.cross_entropy(x[keep], y[keep]))
    assert repr(module) == "NormalizedLogisticLoss(ignore_index=7)"


def test_infinite_scores_and_no_rows() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = torch.tensor([0, 1, 2])
    for value, expected in ((math.inf, True), (-math.inf, False)):
        scores = x.detach().clone()
        scores[0, 0] = -value
        scores.requires_grad_()
        loss = normalized_logistic_loss(scores, y)
        loss.backward()
        assert loss.isinf() == expected
        assert not scores.grad[1:].isnan().any() and scores.grad[1:].any()
    ignored = normalized_logistic_loss(x, torch.full((3,), -100))
    assert ignored.isnan()
    (grad,) = torch.autograd.grad(ignored, x)
    assert not grad.any()
    assert normalized_logistic_loss(x[:0], y[:0]).isnan()
    assert normalized_logistic_loss(x[:0, 0], y[:0]).isnan()
