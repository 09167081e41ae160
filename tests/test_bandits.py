"""Neural bandits: probabilities of the arms, gradients of the perturbed losses, and regret."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from pyloss.research.bandits import NeuralBandit, inverse_gap_weighting

F64 = torch.float64
KINDS = ("square", "fast")


def net(width: int = 6, features: int = 3, dtype: torch.dtype = F64) -> nn.Module:
    return nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, 1, bias=False)).to(
        dtype
    )


# --- inverse gap weighting ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_the_formulas(kind: str) -> None:
    pred = torch.rand(50, 4, dtype=F64)
    gamma = 100 * torch.rand(50, dtype=F64)
    p = inverse_gap_weighting(pred, gamma, kind)
    assert (p >= 0).all() and (p.sum(-1) - 1).abs().max() < 1e-12
    single = inverse_gap_weighting(pred.float(), 1e3, kind)
    assert (single.sum(-1) - 1).abs().max() < 1e-6
    assert inverse_gap_weighting(pred.bfloat16(), 1.0, kind).dtype == torch.bfloat16
    for y, g, row in zip(pred.tolist(), gamma.tolist(), p.tolist()):
        b = y.index(min(y))
        for a in set(range(4)) - {b}:
            gap = g * (y[a] - y[b])
            expected = 1 / (4 + gap) if kind == "square" else y[b] / (4 * y[b] + gap)
            assert row[a] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_limits_of_gamma_and_ties(kind: str) -> None:
    pred = torch.tensor([[0.4, 0.2, 0.3], [0.2, 0.2, 0.9]], dtype=F64)
    torch.testing.assert_close(
        inverse_gap_weighting(pred, 0.0, kind), torch.full((2, 3), 1 / 3, dtype=F64)
    )
    for gamma in (1e15, math.inf):  # the rest is where the least loss is; equals keep 1 / K
        p = inverse_gap_weighting(pred, gamma, kind)
        expected = torch.tensor([[0, 1, 0], [2 / 3, 1 / 3, 0]], dtype=F64)
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)
    pred = torch.tensor([[math.nan, 0.1, 0.2], [0.1, 0.2, 0.3]], dtype=F64)
    p = inverse_gap_weighting(pred, 3.0, kind)
    assert p[0].isnan().all() and not p[1].isnan().any()


def test_a_least_loss_of_zero_is_pulled_always_by_fast() -> None:
    pred = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for gamma in (0.0, 5.0, math.inf):
        p = inverse_gap_weighting(pred, gamma, "fast")
        assert p.tolist() == [[0, 1, 0], [1, 0, 0]]


# --- the bandit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_update_is_a_gradient_step_on_the_perturbed_loss(kind: str, S: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bandit = NeuralBandit(net(), kind, 1.0, S, 0.7, lr=0.3, radius=0.4, generator=generator)
    start = bandit.start.clone()
    assert bandit.width == 6 and bandit.signs.unique().tolist() == ([-1, 1] if S else [])
    contexts = torch.randn(2, 4, 3, dtype=F64)
    arms, losses = torch.tensor([1, 3]), torch.tensor([0.25, 1.0], dtype=F64)
    clipped = 0
    for _ in range(4):
        theta = nn.utils.parameters_to_vector(bandit.net.parameters()).detach()
        twin = copy.deepcopy(bandit.net)
        parameters = list(twin.parameters())
        along = nn.utils.parameters_to_vector(parameters) - start
        signs = bandit.signs if S else torch.zeros(1, len(start), dtype=F64)
        scores = twin(contexts[torch.arange(2), arms])[:, 0]
        f = scores[:, None] + 0.7 / 6**0.25 * (signs @ along)
        y = losses[:, None]
        if kind == "square":
            loss = ((y - f) ** 2 / 2).mean()
        else:
            p = f.sigmoid()
            entropy = torch.special.entr(y) + torch.special.entr(1 - y)
            loss = (-entropy - torch.xlogy(y, p) - torch.xlogy(1 - y, 1 - p)).mean()
        grad = nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters))
        moved = theta - 0.3 * grad - start
        clipped += float(moved.norm()) > 0.4
        expected = start + moved * min(1, 0.4 / float(moved.norm()))
        f = twin(contexts)[..., 0][..., None] + 0.7 / 6**0.25 * (signs @ along)
        predicted = (f.sigmoid() if kind == "fast" else f).mean(-1)
        torch.testing.assert_close(bandit.predict(contexts), predicted.detach())
        torch.testing.assert_close(bandit.update(contexts, arms, losses), loss.detach())
        found = nn.utils.parameters_to_vector(bandit.net.parameters()).detach()
        torch.testing.assert_close(found, expected)
    assert 0 < clipped and bandit.rounds == 4


def test_state_dict_and_generator_go_on_alike() -> None:
    def made(seed: int) -> NeuralBandit:
        generator = torch.Generator().manual_seed(seed)
        return NeuralBandit(
            net(), "fast", lambda t: float(t), lr=lambda t: 1 / t, generator=generator
        )

    def play(bandit: NeuralBandit, contexts: Tensor) -> list[int]:
        arms = []
        for x in contexts:
            arms.append(int(bandit.act(x)))
            bandit.update(x, arms[-1], 0.5)
        return arms

    contexts = torch.randn(12, 4, 3, dtype=F64)
    first, second = made(0), made(1)
    play(first, contexts[:4])
    second.load_state_dict(first.state_dict())
    second.generator.set_state(first.generator.get_state())
    assert second.rounds == 4
    assert play(first, contexts[4:]) == play(second, contexts[4:])
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    before = torch.get_rng_state()
    first.act(contexts)
    assert torch.equal(before, torch.get_rng_state())


def test_arms_are_drawn_as_often_as_they_should() -> None:
    bandit = NeuralBandit(net(), "square", 20.0, generator=torch.Generator().manual_seed(0))
    contexts = torch.randn(1, 4, 3, dtype=F64).expand(20_000, 4, 3)
    counts = bandit.act(contexts).bincount(minlength=4) / 20_000
    assert (counts - bandit.probabilities(contexts[0])).abs().max() < 0.02


# --- regret -------------------------------------------------------------------------------------


def regret(kind: str, gamma, rounds: int, seed: int) -> Tensor:
    """Losses of 0 and 1 whose mean is not linear in the features, small at the best arms."""
    generator = torch.Generator().manual_seed(seed)
    w, v = torch.randn(2, 8, generator=generator)
    x = torch.randn(rounds, 5, 8, generator=generator)
    mean = torch.sigmoid(4 * (x @ w / w.norm() + (x @ v / 8**0.5).abs()))
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        layers = nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)
    bandit = NeuralBandit(nn.Sequential(*layers), kind, gamma, lr=0.05, generator=generator)
    lost = []
    for contexts, means in zip(x, mean):
        arm = bandit.act(contexts)
        bandit.update(contexts, arm, torch.bernoulli(means[arm], generator=generator))
        lost.append(means[arm] - means.min())
    return torch.stack(lost).cumsum(0)


def growing(t: int) -> float:
    return 10 * t**0.5


def test_a_bandit_learns() -> None:
    assert regret("fast", growing, 120, 0)[-1] < 0.6 * regret("square", 0.0, 120, 0)[-1]


@pytest.mark.exhaustive
def test_fast_is_better_than_square_and_square_than_chance() -> None:
    def mean(kind: str, gamma) -> Tensor:
        return sum(regret(kind, gamma, 1000, seed) for seed in range(2)) / 2

    uniform, square, fast = mean("square", 0.0), mean("square", growing), mean("fast", growing)
    assert fast[-1] < square[-1] < 0.5 * uniform[-1]
    for found in (square, fast):
        assert found[-1] < 3 * found[249]
