"""Ranked lists: peers, limits, what padding may hold. Their promises: tests/specs/ranking.py."""

from __future__ import annotations

import math

import pytest
import torch

from pyloss import functional as F
from pyloss import metrics

LOSSES = (F.list_net, F.list_mle, F.approx_ndcg_loss, F.neural_ndcg_loss, F.lambda_loss)


@pytest.fixture
def lists():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 12, generator=g, dtype=torch.float64)
    return scores, torch.randint(5, (40, 12), generator=g)


@pytest.mark.parametrize("k", [None, 1, 5, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_sklearn_gives_the_same_ndcg(lists, k, tied) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, relevance = lists
    scores = scores.round() if tied else scores
    expected = sklearn.ndcg_score(relevance.numpy(), scores.numpy(), k=k)
    assert metrics.ndcg(scores, relevance, k).item() == pytest.approx(expected, rel=1e-12)


def test_sklearn_gives_the_same_reciprocal_rank(lists) -> None:
    """Of one relevant item a list, where its label ranking average precision is the same."""
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, _ = lists
    relevance = torch.nn.functional.one_hot(torch.arange(40) % 12, 12)
    expected = sklearn.label_ranking_average_precision_score(relevance.numpy(), scores.numpy())
    assert metrics.mrr(scores, relevance).item() == pytest.approx(expected, rel=1e-12)


def test_metrics_by_hand() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    relevance = torch.tensor([[0, 1, 0, 1], [0, 0, 3, 0], [0, 0, 0, 0]])
    each = dict(reduction="none")
    assert metrics.mrr(scores, relevance, **each).tolist() == [0.5, 0.25, 0.0]
    assert metrics.precision_at_k(scores, relevance, 2, **each).tolist() == [0.5, 0.25, 0.0]
    assert metrics.precision_at_k(scores, relevance, 8, **each).tolist() == [0.25, 0.125, 0.0]
    found = metrics.ndcg(scores[:1], relevance[:1])
    best = 1 + 1 / math.log2(3)
    assert found.item() == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / best)


def test_ranks_of_an_infinite_score_beside_hidden_ones() -> None:
    scores, y = torch.tensor([[1.0, -math.inf, 0.0, 2.0, -1.0]]), torch.tensor([[0, 3, 0, 1, 2]])
    mask = torch.tensor([[True, True, True, False, False]])
    options = {metrics.ndcg: {}, metrics.mrr: {}, metrics.precision_at_k: dict(k=3)}
    for metric, given in options.items():
        found = metric(scores, y, mask=mask, **given)
        torch.testing.assert_close(found, metric(scores[:, :3], y[:, :3], **given))


def test_steep_relaxations_are_one_minus_ndcg(lists) -> None:
    scores, relevance = lists
    expected = 1 - metrics.ndcg(scores, relevance, gain="exponential")
    for found in (
        F.approx_ndcg_loss(scores, relevance, temperature=1e-7),
        F.neural_ndcg_loss(scores, relevance, steepness=1e9),
        F.neural_ndcg_loss(scores, relevance, steepness=1e7, relaxation="neuralsort"),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_list_mle_is_the_likelihood_of_an_order() -> None:
    """Plackett and Luce: the probabilities of all orders sum to 1."""
    from itertools import permutations

    scores = torch.randn(4, dtype=torch.float64)
    total = 0.0
    for order in permutations(range(4)):
        relevance = torch.zeros(4)
        relevance[list(order)] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        total += math.exp(-F.list_mle(scores, relevance))
    assert total == pytest.approx(1)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_what_is_hidden_reaches_nothing(loss) -> None:
    """Not its value and, of a NaN or an infinity there, not the gradient."""
    scores, relevance = torch.randn(2, 6), torch.randint(4, (2, 6)).float()
    mask = torch.tensor([[True] * 4 + [False] * 2, [True, False] * 3])
    results = []
    for fill in (0.0, math.nan, math.inf, -math.inf):
        s = torch.where(mask, scores, fill).requires_grad_()
        found = loss(s, torch.where(mask, relevance, fill), mask=mask)
        (gradient,) = torch.autograd.grad(found, s)
        results.append((found, gradient))
        assert (gradient[~mask] == 0).all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_the_order_of_a_list_does_not_matter(loss, lists) -> None:
    scores, relevance = lists
    relevance = torch.arange(12).expand(40, 12) + 0 * relevance  # without ties, which have an order
    shuffled = torch.randperm(12)
    options = dict(steepness=1e6) if loss is F.neural_ndcg_loss else {}
    torch.testing.assert_close(
        loss(scores[:, shuffled], relevance[:, shuffled], **options),
        loss(scores, relevance, **options),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_descent_orders_a_list(loss) -> None:
    scores = torch.zeros(1, 6).requires_grad_()
    with torch.no_grad():
        scores += 0.01 * torch.randn(1, 6)
    relevance = torch.tensor([[0, 3, 1, 0, 2, 4]])
    optimiser = torch.optim.Adam([scores], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        loss(scores, relevance).backward()
        optimiser.step()
    assert metrics.ndcg(scores, relevance) > 0.99


def test_large_scores_do_not_overflow() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    relevance = torch.tensor([[0, 2, 1]])
    for loss in LOSSES:
        (gradient,) = torch.autograd.grad(loss(scores, relevance), scores)
        assert gradient.isfinite().all(), loss.__name__
