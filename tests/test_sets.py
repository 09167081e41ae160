"""Sets: invariance, draws of an order, edges. What every loss promises: tests/specs/sets.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import pyloss
from pyloss.functional import (
    hungarian_set_loss,
    order_search_loss,
    order_search_loss_from_table,
    sinkhorn_set_loss,
)

# --------------------------------------------------------------------------------------------------
# Reading


def test_the_order_of_a_set_does_not_matter() -> None:
    model = pyloss.nn.ReadProcessWrite(3, 16, steps=4).double()
    x = torch.randn(5, 7, 3, dtype=torch.float64)
    shuffled = torch.randperm(7)
    _, state = model.encoder(x)
    _, other = model.encoder(x[:, shuffled])
    torch.testing.assert_close(other, state, rtol=0, atol=1e-12)
    # The pointers move with the elements.
    target = torch.stack([torch.randperm(7) for _ in range(5)])
    logits, _ = model(x, target=target)
    moved, _ = model(x[:, shuffled], target=shuffled.argsort()[target])
    torch.testing.assert_close(moved, logits[:, :, shuffled], rtol=0, atol=1e-12)


def test_what_is_hidden_reaches_nothing() -> None:
    model = pyloss.nn.ReadProcessWrite(2, 8).double()
    x = torch.randn(2, 5, 2, dtype=torch.float64)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    results = []
    for fill in (0.0, 1e3, math.nan, math.inf):
        y = torch.where(mask.unsqueeze(2), x, fill).requires_grad_()
        _, state = model.encoder(y, mask)
        (gradient,) = torch.autograd.grad(state.sum(), y)
        assert (gradient[~mask] == 0).all()
        results.append(state)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)
    alone = model.encoder(x[:1, :3])[1]
    torch.testing.assert_close(results[0][:1], alone, rtol=0, atol=1e-14)


def test_an_empty_set_is_read() -> None:
    model = pyloss.nn.ReadProcessWrite(2, 4)
    logits, order = model(torch.randn(3, 0, 2))
    assert logits.shape == (3, 0, 0) and order.shape == (3, 0)
    logits, _ = model(torch.randn(1, 2, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert torch.equal(logits, torch.zeros(1, 2, 2))


def test_a_writer_learns_to_sort() -> None:
    torch.manual_seed(0)
    model = pyloss.nn.ReadProcessWrite(1, 32, steps=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        x = torch.rand(64, 3, 1)
        truth = x.squeeze(2).argsort(1)
        loss = torch.nn.functional.cross_entropy(model(x, target=truth).logits.mT, truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = torch.rand(500, 3, 1)
    right = (model(x).order == x.squeeze(2).argsort(1)).all(1).float().mean()
    assert right > 0.6  # 1/6 by chance


# --------------------------------------------------------------------------------------------------
# Orders


def by_place(table):
    return lambda prefix: table[prefix.shape[1]].expand(len(prefix), -1)


def test_a_wide_beam_and_a_table_agree_with_all_orders() -> None:
    table = torch.randn(5, 9, dtype=torch.float64).log_softmax(-1)
    sets = torch.tensor([[0, 3, 8, 8, 2], [1, 2, 3, 4, 5]])
    options = dict(reduction="none")
    best, order = order_search_loss(by_place(table), sets, mode="exhaustive", **options)
    other, _ = order_search_loss_from_table(table.expand(2, 5, 9), sets, **options)
    torch.testing.assert_close(best, other)
    wide, _ = order_search_loss(by_place(table), sets, mode="beam", beam=120, **options)
    torch.testing.assert_close(best, wide)
    greedy, _ = order_search_loss(by_place(table), sets, mode="greedy", **options)
    narrow, _ = order_search_loss(by_place(table), sets, mode="beam", beam=1, **options)
    torch.testing.assert_close(greedy, narrow)
    assert (greedy >= best - 1e-12).all()
    assert order.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_a_large_table_goes_to_the_assignment() -> None:
    pytest.importorskip("scipy")
    table = torch.randn(2, 8, 8, dtype=torch.float64).log_softmax(-1).requires_grad_()
    loss, order = order_search_loss_from_table(table, reduction="none")
    best = max(
        sum(table[0, t, i].item() for t, i in enumerate(o))
        for o in itertools.permutations(range(8))
    )
    assert loss[0].item() == pytest.approx(-best)
    (gradient,) = torch.autograd.grad(loss.sum(), table)
    assert torch.equal(-gradient, torch.nn.functional.one_hot(order, 8).double())


def test_orders_are_drawn_by_their_probability() -> None:
    """Chi-square over the 6 orders of three elements, of a model that looks at its prefix."""
    torch.manual_seed(0)
    weights = torch.randn(4, 3)

    def step(prefix):
        last = prefix[:, -1] if prefix.shape[1] else torch.full((len(prefix),), 3)
        return weights[last].log_softmax(-1)

    draws = 20000
    sets = torch.arange(3).expand(draws, 3)
    generator = torch.Generator().manual_seed(0)
    _, order = order_search_loss(step, sets, mode="sample", generator=generator)
    chi = 0.0
    for one in itertools.permutations(range(3)):
        p, last, left = 1.0, 3, {0, 1, 2}
        for i in one:
            share = weights[last].softmax(0)
            p *= float(share[i] / sum(share[j] for j in left))
            last, left = i, left - {i}
        seen = int((order == torch.tensor(one)).all(1).sum())
        chi += (seen - draws * p) ** 2 / (draws * p)
    assert chi < 20.5  # 0.1 % of 5 degrees of freedom


def test_uniform_orders_do_not_look_at_the_model() -> None:
    table = torch.tensor([[0.0, -50.0], [0.0, -50.0]]).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    sets = torch.tensor([[0, 1]]).expand(4000, 2)
    _, order = order_search_loss(by_place(table), sets, mode="uniform", generator=generator)
    assert 0.45 < order[:, 0].float().mean() < 0.55
    _, order = order_search_loss_from_table(
        table.expand(4000, 2, 2), mode="uniform", generator=generator
    )
    assert 0.45 < order[:, 0].float().mean() < 0.55


def test_equal_elements_are_one_choice() -> None:
    """Two of three elements are equal: each of the two kinds is drawn by its own probability."""
    table = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]).log()
    sets = torch.tensor([[1, 1, 0]]).expand(6000, 3)
    generator = torch.Generator().manual_seed(0)
    _, order = order_search_loss(by_place(table), sets, mode="sample", generator=generator)
    assert 0.47 < (order[:, 0] == 2).float().mean() < 0.53


def test_impossible_elements_are_still_written() -> None:
    table = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    for mode in ("sample", "greedy", "beam", "exhaustive"):
        loss, order = order_search_loss(by_place(table), torch.tensor([[0, 1]]), mode=mode)
        assert loss == math.inf
        assert order.sort(1).values.tolist() == [[0, 1]]


def test_schedule() -> None:
    schedule = pyloss.nn.OrderSearchSchedule(3, "beam")
    assert [schedule.step() for _ in range(2)] == ["uniform"] * 2
    other = pyloss.nn.OrderSearchSchedule(3, "beam")
    other.load_state_dict(schedule.state_dict())
    assert [other.step() for _ in range(3)] == ["uniform", "beam", "beam"]
    assert repr(other) == "OrderSearchSchedule(warmup_steps=3, mode='beam')"
    with pytest.raises(ValueError, match="mode must be one of"):
        pyloss.nn.OrderSearchSchedule(3, "best")


# --------------------------------------------------------------------------------------------------
# Matchings


def test_a_shuffled_set_costs_nothing() -> None:
    pytest.importorskip("scipy")
    x = torch.randn(4, 30, 3)
    shuffled = torch.stack([torch.randperm(30) for _ in range(4)])
    y = x.gather(1, shuffled.unsqueeze(2).expand(-1, -1, 3))
    loss, matching = hungarian_set_loss(x, y, return_matching=True)
    assert loss == 0
    assert torch.equal(matching, shuffled)


def test_transport_at_little_entropy_is_the_matching() -> None:
    pytest.importorskip("scipy")
    x, y = torch.randn(3, 6, 2).double(), torch.randn(3, 6, 2).double()
    exact = hungarian_set_loss(x, y, cost="l2")
    found = sinkhorn_set_loss(x, y, epsilon=0.01, iterations=3000)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)


def test_far_sets_do_not_overflow() -> None:
    x = torch.tensor([[[0.0], [1e4]]], requires_grad=True)
    loss = sinkhorn_set_loss(x, torch.tensor([[[3.0], [1e4]]]), epsilon=1e-3)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def test_a_missing_scipy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pyloss\[sets\]"):
        hungarian_set_loss(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
