"""Curricula: the table of the pacing functions, the sampler, scores, the federated simulator."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyloss.research.curriculum import CurriculumSampler, Pacing, difficulty_scores
from pyloss.research.federated import dirichlet_split, simulate

KINDS = ("linear", "quad", "root", "step", "exp", "log")


@pytest.mark.parametrize("kind", KINDS)
def test_pacing_from_bn_to_n(kind: str) -> None:
    for a, b, total, n in ((0.8, 0.2, 50, 100), (0.3, 0.29, 10, 100), (1.0, 1.0, 3, 7),
                           (0.5, 1e-6, 8, 5)):  # fmt: skip
        pacing = Pacing(kind, a, b, total)
        sizes = [pacing(step, n) for step in range(2 * total)]
        assert sizes[0] == max(1, round(b * n))
        full = round(a * total)
        assert sizes[full:] == [n] * len(sizes[full:])
        assert sizes == sorted(sizes) and set(map(type, sizes)) == {int}
        assert b == 1 or kind == "log" or sizes[full - 1] < n


def test_pacing_on_the_way() -> None:
    """At a half and at a quarter of aT, N = 1000, b = 0.2."""
    expected = {
        "linear": (600, 400), "quad": (400, 250), "root": (765, 600), "step": (200, 200),
        "exp": (200 + math.floor(800 * math.expm1(5) / math.expm1(10)),
                200 + math.floor(800 * math.expm1(2.5) / math.expm1(10))),
        "log": (200 + math.floor(800 * (1 + math.log(0.5 + math.exp(-10)) / 10)),
                200 + math.floor(800 * (1 + math.log(0.25 + math.exp(-10)) / 10))),
    }  # fmt: skip
    for kind, sizes in expected.items():
        pacing = Pacing(kind, 0.8, 0.2, 100)
        assert (pacing(40, 1000), pacing(20, 1000)) == sizes, kind
    assert Pacing("linear", 2.0, 0.5, 10)(10, 100) == 75  # never all


def test_sampler_in_a_loader() -> None:
    scores = torch.randn(100)
    data = TensorDataset(torch.arange(100))
    easy = scores.argsort()
    for order, rank in (("curriculum", easy), ("anti", easy.flip(0))):
        generator = torch.Generator().manual_seed(1)
        sampler = CurriculumSampler(scores, Pacing("linear", 1.0, 0.2, 4), order, 32, generator)
        loader = DataLoader(data, batch_size=16, sampler=sampler)
        for step, size in enumerate((32, 40, 60, 80, 100)):  # 32 at least
            sampler.set_step(step)
            seen = torch.cat([batch for (batch,) in loader])
            assert len(sampler) == len(seen) == size and len(loader) == math.ceil(size / 16)
            assert set(seen.tolist()) == set(rank[:size].tolist())
            assert not torch.equal(seen, rank[:size])  # shuffled
            assert not torch.equal(seen, torch.tensor(list(sampler)))  # anew in each epoch
    control = CurriculumSampler(scores, Pacing("step", 1.0, 0.5, 4), "random", generator=generator)
    assert sorted(control) == sorted(control) and len(control) == 50  # one order, drawn once
    assert set(control) != set(easy[:50].tolist())
    few = CurriculumSampler(torch.zeros(3), lambda step, n: 1)
    assert sorted(few) == [0, 1, 2]


def test_ties_keep_the_order_of_the_samples() -> None:
    for order in ("curriculum", "anti"):
        sampler = CurriculumSampler(torch.ones(6), lambda step, n: 2, order, min_size=1)
        assert sorted(sampler) == [0, 1]


def test_scores_are_losses_and_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(50, 3), torch.randint(4, (50,))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    found = difficulty_scores(model, loader)
    assert [m.training for m in model] == [True, False, True, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    each = nn.CrossEntropyLoss(reduction="none")
    torch.testing.assert_close(found, each(model(x), y).detach())
    assert torch.equal(
        difficulty_scores(model, loader, each), difficulty_scores(model, loader, each)
    )
    with pytest.raises(ValueError, match="one number for each of 16 samples, got"):
        difficulty_scores(model.train(), loader, nn.CrossEntropyLoss())
    assert model.training


def mixture(n: int, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = 1.5 * torch.randn(classes, 6, generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    return centers[y] + torch.randn(n, 6, generator=generator), y


def test_dirichlet_split() -> None:
    labels = torch.arange(600) % 5
    skew = []
    for alpha in (1e-3, 0.2, 100.0):
        generator = torch.Generator().manual_seed(0)
        parts = dirichlet_split(labels, 6, alpha, min_size=0, generator=generator)
        assert sorted(torch.cat(parts).tolist()) == list(range(600)) and len(parts) == 6
        counts = torch.stack([torch.bincount(labels[p], minlength=5) for p in parts]).double()
        skew.append((counts / counts.sum(0)).amax(0).mean().item())  # the largest share of a class
    assert skew[0] > 0.95 > skew[1] > 0.4 > 0.25 > skew[2]
    assert min(map(len, dirichlet_split(labels, 6, 0.2, min_size=40))) >= 40
    with pytest.raises(ValueError, match="no draw gave each of 3 clients 2 samples"):
        dirichlet_split(torch.zeros(6, dtype=torch.int64), 3, 1e-3, min_size=2)


def federation(clients: int = 5, n: int = 240) -> tuple[nn.Module, list, tuple[Tensor, Tensor]]:
    x, y = mixture(n + 200)
    parts = dirichlet_split(y[:n], clients, generator=torch.Generator().manual_seed(0))
    return nn.Linear(6, 4), [(x[p], y[p]) for p in parts], (x[n:], y[n:])


def run(model, clients, test, **options):
    defaults = dict(rounds=3, clients_per_round=2, generator=torch.Generator().manual_seed(1))
    return simulate(model, clients, test, **{**defaults, **options})


def test_one_client_with_all_its_data_is_sgd() -> None:
    model, clients, test = federation(1, 60)
    x, y = clients[0]
    before = copy.deepcopy(model.state_dict())
    found = run(model, clients, test, clients_per_round=1, rounds=1, batch_size=60, lr=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(found.model.weight, model.weight)
    logits = model(test[0])
    assert found.accuracy.tolist() == [(logits.argmax(1) == test[1]).double().mean().item()]
    torch.testing.assert_close(found.loss[0].float(), nn.functional.cross_entropy(logits, test[1]))


def test_the_server_averages_by_samples() -> None:
    """Against each client alone: one full batch each, and so no random number counts."""
    model, clients, test = federation(3, 90)
    model = nn.Sequential(model, nn.BatchNorm1d(4))
    options = dict(rounds=1, batch_size=90)
    alone = [run(model, [c], test, clients_per_round=1, **options).model for c in clients]
    sizes = [len(y) for _, y in clients]
    for momentum in (0.0, 0.25):
        found = run(model, clients, test, clients_per_round=3, server_momentum=momentum, **options)
        for name in ("0.weight", "1.running_mean"):
            mean = sum(m.state_dict()[name] * s for m, s in zip(alone, sizes)) / sum(sizes)
            expected = momentum * model.state_dict()[name] + (1 - momentum) * mean
            torch.testing.assert_close(found.model.state_dict()[name], expected)
        assert found.model[1].num_batches_tracked == 1


def test_curriculum_takes_the_easy_samples_and_clients() -> None:
    """A model that knows its samples by their index shows in its gradients which it has seen."""

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(80))  # one for each sample
            self.difficulty = torch.linspace(0.0, 3.0, 80)

        def forward(self, index: Tensor) -> Tensor:
            first = self.scale[index] - self.difficulty[index]
            return torch.stack([first, torch.zeros_like(first)], 1)

    label = torch.zeros(40, dtype=torch.int64)
    clients = [(torch.arange(0, 80, 2), label), (torch.arange(1, 80, 2), label)]
    quarter = Pacing("step", 1.0, 0.25, 100)
    options = dict(rounds=1, pacing=quarter, min_size=1, weight_decay=0.0)
    for order, seen in (("curriculum", range(20)), ("anti", range(60, 80))):
        found = run(Seen(), clients, clients[0], order=order, **options)
        assert found.model.scale.nonzero()[:, 0].tolist() == list(seen)
    # One client has the easy samples, the other the hard ones: one in each round is in use.
    clients = [(torch.arange(40), label), (torch.arange(40, 80), label)]
    one = Pacing("step", 1.0, 0.5, 100)
    for order, client in (("curriculum", 0), ("anti", 1)):
        found = run(Seen(), clients, clients[0], order=order, client_pacing=one,
                    clients_per_round=1, rounds=4, lr=1e-6)  # fmt: skip
        assert found.selected.tolist() == [[client]] * 4


def test_scores_of_all_kinds() -> None:
    """They agree where only the global model is known, and differ later."""
    model, clients, test = federation()
    options = dict(pacing=Pacing("step", 1.0, 0.3, 100), min_size=1, clients_per_round=5, lr=0.1)
    first = {s: run(model, clients, test, score=s, rounds=1, **options) for s in ("G", "L", "LG")}
    third = {s: run(model, clients, test, score=s, rounds=3, **options) for s in ("G", "L", "LG")}
    third["E"] = run(model, clients, test, score="E", expert=nn.Linear(6, 4), **options)
    assert torch.equal(first["G"].model.weight, first["L"].model.weight)
    assert torch.equal(first["G"].model.weight, first["LG"].model.weight)
    weights = [found.model.weight for found in third.values()]
    assert not any(torch.equal(a, b) for k, a in enumerate(weights) for b in weights[:k])


def test_random_numbers_are_those_of_the_generator() -> None:
    model, clients, test = federation()
    options = dict(pacing=Pacing(), client_pacing=Pacing(), order="random", score="LG")
    before = torch.get_rng_state()
    a, b = run(model, clients, test, **options), run(model, clients, test, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.model.weight, b.model.weight) and torch.equal(a.selected, b.selected)
    assert all(len(set(row)) == 2 for row in a.selected.tolist())
    seen = []
    run(model, clients, test, rounds=2, progress=lambda at, accuracy: seen.append(at))
    assert seen == [1, 2]


@pytest.mark.exhaustive
def test_curriculum_is_at_most_two_points_behind_random() -> None:
    """20 clients, Dirichlet(0.2), 30 rounds, the last five of them, eight draws: it is 1.6 behind,
    and nothing stronger is claimed of such a toy."""
    final: dict[str, list[float]] = {"curriculum": [], "random": []}
    for seed in range(8):
        x, y = mixture(6000, 8, seed)
        for order, values in final.items():
            generator = torch.Generator().manual_seed(seed)
            parts = dirichlet_split(y[:4000], 20, 0.2, min_size=10, generator=generator)
            torch.manual_seed(seed)
            found = simulate(
                nn.Linear(6, 8), [(x[p], y[p]) for p in parts], (x[4000:], y[4000:]),
                clients_per_round=4, pacing=Pacing("linear", 0.8, 0.2, 30), order=order,
                generator=generator,
            )  # fmt: skip
            values.append(found.accuracy[-5:].mean().item())
            assert values[-1] > found.accuracy[0]
    mean = {order: sum(values) / 8 for order, values in final.items()}
    assert mean["curriculum"] >= mean["random"] - 0.02, mean
