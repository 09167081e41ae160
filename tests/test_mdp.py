"""Adversarial MDPs: policies by FTRL, estimates of Q, the simulator, and how regret grows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyloss.research import mdp as module
from pyloss.research.mdp import (
    AdversarialLinearMDP,
    LinearQMDP,
    log_barrier_ftrl,
    magnitude_reduced_estimator,
)

F64 = torch.float64
S, A, H, D = 4, 3, 3, 6


def small(seed: int = 0) -> LinearQMDP:
    return LinearQMDP(S, A, H, D, torch.Generator().manual_seed(seed))


def drawn_policy(*batch: int) -> Tensor:
    return torch.randn(*batch, H, S, A, dtype=F64).softmax(-1)


# --- log-barrier FTRL ---------------------------------------------------------------------------


@pytest.mark.parametrize("actions", [1, 2, 7, 1000])
def test_log_barrier_is_on_the_simplex_and_optimal(actions: int) -> None:
    for size in (1e-6, 1.0, 1e3, 1e6):
        cost = size * (2 * torch.rand(20, actions, dtype=F64) - 1)
        cost[0] = size * torch.rand(actions, dtype=F64) ** 20  # many near the least, few far
        cost[1] = size
        p = log_barrier_ftrl(cost, 0.7)
        assert (p > 0).all() and (p.sum(-1) - 1).abs().max() < 1e-12
        # 1 / p_a - eta c_a is the multiplier of each action, counted from the least cost; compared
        # where its digits are not those of the cost.
        level = 1 / p - 0.7 * (cost - cost.amin(-1, keepdim=True))
        largest = level.gather(-1, p.argmax(-1, keepdim=True))
        assert ((level - largest).abs() * p).max() < 1e-12
        assert torch.equal(log_barrier_ftrl(cost.float().view(4, 5, actions), 0.7)[0, 0],
                           log_barrier_ftrl(cost[0].float(), 0.7))  # fmt: skip


def test_log_barrier_derivatives_and_nan() -> None:
    cost = torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: log_barrier_ftrl(c, 0.7), cost)
    assert torch.autograd.gradgradcheck(lambda c: log_barrier_ftrl(c, 0.7), cost)
    with torch.no_grad():
        cost[0, 0], cost[1, 0] = math.nan, math.inf
    p = log_barrier_ftrl(cost, 0.7)
    assert p[0].isnan().all() and p[1, 0] == 0 and not p[1:].isnan().any()


# --- estimates of Q -----------------------------------------------------------------------------


def exact(policy: Tensor, mdp: LinearQMDP, h: int) -> tuple[Tensor, Tensor]:
    """Occupancy (S A) of step h, and the products phi^T Sigma^-1 phi of all pairs."""
    weight = mdp.occupancy(policy)[h].flatten()
    phi = mdp.features.flatten(0, 1)
    return weight, phi @ torch.linalg.inv(phi.T @ (weight[:, None] * phi)) @ phi.T


def test_estimates_are_unbiased_by_full_enumeration() -> None:
    """Over the pair visited, the rest of the episode by its mean, and one fresh pair."""
    mdp, policy, theta = small(), drawn_policy(), torch.rand(H, D, dtype=F64)
    for h in range(H):
        weight, w = exact(policy, mdp, h)
        q = mdp.q_values(policy, theta)[h].flatten()
        usual, reduced = torch.zeros(2, S * A, dtype=F64)
        for visited, fresh in itertools.product(range(S * A), repeat=2):
            chance = weight[visited] * weight[fresh]
            usual = usual + chance * w[:, visited] * q[visited]
            reduced = reduced + chance * magnitude_reduced_estimator(
                w[:, visited], q[visited], w[:, fresh, None], H
            )
        assert (usual - q).abs().max() < 1e-8
        assert (reduced - q).abs().max() < 1e-8


def test_estimate_is_bounded_below_where_the_usual_one_is_not() -> None:
    mdp, policy = small(), drawn_policy()
    policy[..., 0] /= 50  # seldom: large w
    policy /= policy.sum(-1, keepdim=True)
    weight, w = exact(policy, mdp, 1)
    bound = -H * w.diagonal().sqrt()  # of each pair: the norm of phi
    mean = (w.clamp(max=0) @ weight)[:, None]  # of endlessly many rollouts
    lowest = torch.full_like(w, math.inf)
    for L in (0.0, 1.3, float(H)):
        lowest = lowest.minimum(
            torch.stack([magnitude_reduced_estimator(w[:, v], L, mean, H) for v in range(S * A)], 1)
        )
    assert (lowest >= mean * H - 1e-12).all() and (lowest >= bound[:, None] - 1e-12).all()
    assert ((H * w).amin(1) < bound).any()


# --- the simulator ------------------------------------------------------------------------------


def test_process_is_one_and_q_is_linear() -> None:
    mdp, policy, theta = small(), drawn_policy(2), torch.rand(2, H, D, dtype=F64)
    ones = torch.ones(S, A, dtype=F64)
    torch.testing.assert_close(mdp.transitions.sum(-1), ones)
    torch.testing.assert_close(mdp.features.sum(-1), ones)
    phi = mdp.features.flatten(0, 1)
    assert torch.linalg.matrix_rank(phi) == D
    q = mdp.q_values(policy, theta).flatten(-2)
    fit = torch.linalg.lstsq(phi, q.flatten(0, 1).T).solution
    torch.testing.assert_close((phi @ fit).T, q.flatten(0, 1))
    # The value is the sum of the losses, each as often as its pair is visited.
    visits = mdp.occupancy(policy)
    torch.testing.assert_close(
        mdp.value(policy, theta), (visits * mdp.losses(theta)).sum((-3, -2, -1))
    )


def test_best_value_is_that_of_the_best_of_all_policies() -> None:
    mdp = LinearQMDP(2, 2, 2, 3, torch.Generator().manual_seed(1))
    theta = torch.rand(2, 3, dtype=F64)
    choices = torch.tensor(list(itertools.product(range(2), repeat=4))).view(-1, 2, 2)
    policies = torch.nn.functional.one_hot(choices, 2).double()
    torch.testing.assert_close(mdp.optimal_value(theta), mdp.value(policies, theta).min())


def test_rollouts_visit_pairs_as_often_as_they_should() -> None:
    mdp, policy = small(), drawn_policy(2)
    pairs = mdp.rollouts(policy, 20_000, torch.Generator().manual_seed(0))
    assert pairs.shape == (2, 20_000, H)
    counts = torch.stack(
        [pairs[run, :, h].bincount(minlength=S * A) for run in range(2) for h in range(H)]
    )
    expected = mdp.occupancy(policy).view(2 * H, S * A)
    assert (counts / 20_000 - expected).abs().max() < 5 * (0.25 / 20_000) ** 0.5
    again = mdp.rollouts(policy, 20_000, torch.Generator().manual_seed(0))
    assert torch.equal(pairs, again)


# --- the learner --------------------------------------------------------------------------------


def regret(algorithm: str, K: int, seed: int, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mdp = LinearQMDP(S, A, H, D, generator)
    return AdversarialLinearMDP(mdp, algorithm, generator=generator, **options).run(K).regret[0]


@pytest.mark.parametrize("algorithm", module.ALGORITHMS)
def test_learner(algorithm: str) -> None:
    """Losses that stay are learned; regret is the loss less that of the best policy."""
    mdp, K = small(), 60
    theta = torch.randint(2, (2, 1, H, D)).double().expand(-1, K, -1, -1)
    generator = torch.Generator().manual_seed(0)
    learner = AdversarialLinearMDP(mdp, algorithm, rollouts=16, generator=generator)
    found = learner.run(K, 2, theta)
    best = mdp.optimal_value(theta[:, 0])
    later = found.loss[:, K // 2 :].mean(1)
    assert (later - best < 0.6 * (found.loss[:, 0] - best)).all()
    counted = torch.arange(1, K + 1, dtype=F64) * best[:, None]
    torch.testing.assert_close(found.regret, found.loss.cumsum(1) - counted)
    assert found.policy.shape == (2, H, S, A)
    assert learner.losses(16)[0, :, 0, 0].diff().count_nonzero() in (0, 7)


@pytest.mark.exhaustive
@pytest.mark.parametrize("algorithm", module.ALGORITHMS)
def test_regret_grows_slower_than_the_episodes(algorithm: str) -> None:
    few, many = (
        sum(float(regret(algorithm, K, seed)[-1]) for seed in range(3)) for K in (200, 800)
    )
    assert 0 < many < 3 * few
