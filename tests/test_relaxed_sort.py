"""NeuralSort and SoftSort: invariants, limits, infinities.

`specs/relaxed_sort.py` has the formulas, derivatives, dtypes, modules and errors.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from pyloss.functional import neural_sort, soft_sort_matrix

FUNCTIONS = {
    "neural_sort": neural_sort,
    "soft_sort": soft_sort_matrix,
    "soft_sort, pow 2": functools.partial(soft_sort_matrix, pow=2.0),
    "soft_sort, pow 0.5": functools.partial(soft_sort_matrix, pow=0.5),
}
every_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
def test_properties(f):
    s = torch.randn(3, 9, dtype=torch.float64)
    p = f(s, tau=0.3)
    assert p.shape == (3, 9, 9)
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 9, dtype=torch.float64))
    order = torch.randperm(9)
    torch.testing.assert_close(f(s[:, order], tau=0.3), p[:, :, order])
    torch.testing.assert_close(f(s + 2, tau=0.3), p)
    up = f(s, tau=0.3, descending=False)
    torch.testing.assert_close(up, f(-s, tau=0.3))
    hard = f(s, tau=1e-9)
    truth = torch.nn.functional.one_hot(s.argsort(1, descending=True), 9).double()
    torch.testing.assert_close(hard, truth, atol=0.05, rtol=0)


@every_function
def test_hard(f):
    s = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    p = f(s, hard=True)
    assert torch.equal(p.sum(-1), torch.ones(3, 9)) and ((p == 0) | (p == 1)).all()
    soft = f(s)
    assert torch.equal(p.argmax(-1), soft.argmax(-1))
    g = torch.randn_like(p)
    torch.testing.assert_close(torch.autograd.grad(p, s, g), torch.autograd.grad(soft, s, g))


@pytest.mark.parametrize("pow", [1.0, 2.0, 0.5])
def test_infinities_and_nan(pow):
    inf, nan = math.inf, math.nan
    s = torch.tensor([[1.0, inf, 0.5, -inf, inf], [2.0, nan, 1.0, 0.0, 3.0], [1.0, 2, 3, 4, 5]])
    s = s.double().requires_grad_()
    p = soft_sort_matrix(s, 0.7, pow)
    assert p[0, :2].tolist() == [[0, 0.5, 0, 0, 0.5]] * 2
    assert p[0, 4].tolist() == [0, 0, 0, 1, 0]
    finite = torch.tensor([0, 2])
    torch.testing.assert_close(p[0, 2:4][:, finite], soft_sort_matrix(s[0, finite], 0.7, pow))
    (ds,) = torch.autograd.grad(p, s, torch.randn_like(p))
    assert ds[0].isfinite().all() and (ds[0, [1, 3, 4]] == 0).all()
    assert ds[1].isnan().all() and ds[2].isfinite().all()
    for hard in (False, True):
        p, q = soft_sort_matrix(s, 0.7, pow, hard=hard), neural_sort(s, 0.7, hard=hard)
        assert p[1].isnan().all() and not p[[0, 2]].isnan().any()
        assert q[:2].isnan().all() and not q[2].isnan().any()


def test_huge_scores_stay_below_infinite_ones():
    inf = math.inf
    order = soft_sort_matrix(torch.tensor([2e38, inf, 0.0, -inf, -2e38])).argmax(-1)
    assert order.tolist() == [1, 0, 2, 4, 3]


def test_neural_sort_of_huge_scores_and_of_a_tiny_tau():
    order = torch.eye(3)[[0, 2, 1]]
    assert torch.equal(neural_sort(torch.tensor([3e38, -3e38, 1.0])), order)
    for tau in (1e-38, 1e-40):
        scores = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
        p = neural_sort(scores, tau=tau)
        assert torch.equal(p, torch.eye(3)[[1, 2, 0]])
        (ds,) = torch.autograd.grad(p, scores, torch.randn_like(p))
        assert torch.equal(ds, torch.zeros(3))


@pytest.mark.parametrize("offset", [1e3, 1e5, 1e6])
def test_neural_sort_does_not_lose_accuracy_with_the_offset(offset):
    scores = (torch.randn(16) + offset).requires_grad_()  # as rounded, the same in both
    exact = scores.detach().double().requires_grad_()
    p, q = neural_sort(scores), neural_sort(exact)
    torch.testing.assert_close(p.double(), q, rtol=0, atol=1e-5)
    g = torch.randn(16, 16)
    (ds,), (dq,) = torch.autograd.grad(p, scores, g), torch.autograd.grad(q, exact, g.double())
    torch.testing.assert_close(ds.double(), dq, rtol=1e-4, atol=1e-5)
