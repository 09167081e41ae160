"""Masks and lengths of the sorting functions: each row is what the call on its elements gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyloss
import pyloss.functional as F

LENGTHS = torch.tensor([[5, 3, 8], [1, 5, 0]])
N = 8

# function, its axes behind the rows, options
FUNCTIONS = {
    "soft_sort": (F.soft_sort, "r", {}),
    "soft_sort, hard": (F.soft_sort, "r", dict(hard=True, descending=True)),
    "soft_sort, kl": (F.soft_sort, "r", dict(method="permutahedron", regularization="kl")),
    "soft_rank": (F.soft_rank, "e", dict(network="odd_even", ties="share")),
    "soft_rank, base": (F.soft_rank, "e", dict(base=0, descending=True)),
    "soft_permutation": (F.soft_permutation, "er", dict(network="bitonic")),
    "soft_topk": (lambda x, **o: F.soft_topk(x, 1, **o), "e1", {}),
    "permutahedron_rank": (F.permutahedron_rank, "e", dict(regularization="kl")),
    "permutahedron_sort": (F.permutahedron_sort, "r", dict(regularization_strength=0.5)),
    "neural_sort": (F.neural_sort, "re", dict(tau=0.5)),
    "soft_sort_matrix": (F.soft_sort_matrix, "re", dict(hard=True)),
}


def padded(masked: bool, dtype=torch.float64):
    """(x, what counts, mask=... or lengths=...): NaN and infinity in the padding."""
    x = torch.randn(2, 3, N, dtype=dtype)
    present = torch.arange(N) < LENGTHS.unsqueeze(-1)
    if masked:
        present = present.gather(-1, torch.rand(2, 3, N).argsort(-1))
    x[~present] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[
        torch.arange(int((~present).sum())) % 3
    ]
    given = dict(mask=present) if masked else dict(lengths=LENGTHS)
    return x, present, given


def alone(function, axes: str, x: Tensor, present: Tensor, **options) -> Tensor:
    """Row by row, the elements that count alone."""
    size = {"e": N, "r": N, "1": 1}
    out = x.new_zeros(*x.shape[:-1], *(size[a] for a in axes))
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            (at,) = present[i, j].nonzero(as_tuple=True)
            if len(at) == 0:
                continue
            found = function(x[i, j, at], **options)
            index = [{"e": at, "r": torch.arange(len(at)), "1": torch.arange(1)}[a] for a in axes]
            out = out.index_put((torch.tensor(i), torch.tensor(j), *torch.meshgrid(
                *index, indexing="ij")), found)  # fmt: skip
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "mask"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_is_what_its_elements_give_alone(name, masked):
    function, axes, options = FUNCTIONS[name]
    x, present, given = padded(masked)
    if "1" in axes:  # one element at least
        x, present = x[:1], present[:1]
        given = {k: v[:1] for k, v in given.items()}
    x.requires_grad_()
    found, exact = function(x, **given, **options), alone(function, axes, x, present, **options)
    torch.testing.assert_close(found, exact, rtol=0, atol=0)
    g = torch.randn_like(found)
    (dx,), (exact_dx,) = (torch.autograd.grad(y, x, g) for y in (found, exact))
    torch.testing.assert_close(dx, exact_dx, rtol=1e-14, atol=1e-14)
    assert bool((dx[~present] == 0).all())
    if "1" not in axes:
        moved = {k: v.movedim(-1, 1) if k == "mask" else v for k, v in given.items()}
        along = function(x.movedim(-1, 1), dim=1, **moved, **options)
        torch.testing.assert_close(along, found.movedim(-1, 1) if len(axes) == 1 else found)
    half = function(x.detach().bfloat16(), **given, **options)
    assert half.dtype == torch.bfloat16 and half.shape == found.shape
    every = {k: torch.ones_like(v) if k == "mask" else v * 0 + N for k, v in given.items()}
    full = torch.randn_like(x)
    torch.testing.assert_close(
        function(full, **every, **options), function(full, **options), rtol=0, atol=0
    )


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "mask"])
def test_features_and_indices_go_with_their_keys(masked, hard):
    x, present, given = padded(masked)
    feats = torch.randn(3, N, 2, dtype=torch.float64)  # shared by the items
    permuted = F.soft_permute(x, feats, hard=hard, **given)
    index = F.soft_argsort(x, hard=hard, **given)
    y, p = F.soft_sort(x, return_permutation=True, hard=hard, **given)
    for i in range(2):
        for j in range(3):
            (at,) = present[i, j].nonzero(as_tuple=True)
            m = len(at)
            assert not permuted[i, j, m:].any() and not index[i, j, m:].any()
            if m:
                row = x[i, j, at]
                exact = F.soft_permute(row, feats[j, at], hard=hard)
                torch.testing.assert_close(permuted[i, j, :m], exact, rtol=0, atol=0)
                places = F.soft_permute(row, at.double().unsqueeze(1), hard=hard).squeeze(1)
                torch.testing.assert_close(index[i, j, :m], places, rtol=0, atol=0)
                sorted_row, of_row = F.soft_sort(row, return_permutation=True, hard=hard)
                torch.testing.assert_close(y[i, j, :m], sorted_row, rtol=0, atol=0)
                torch.testing.assert_close(p[i, j, at, :m], of_row, rtol=0, atol=0)


LOSSES = {
    "bce": (F.sorting_cross_entropy, {}),
    "row_ce": (F.sorting_cross_entropy, dict(kind="row_ce", ties="share", descending=True)),
    "ranks": (F.sorting_cross_entropy, dict(target_is="ranks", validate=True)),
    "permutation": (F.sorting_cross_entropy, dict(target_is="permutation", validate=True)),
    "spearman": (F.spearman_loss, {}),
    "spearman, permutahedron": (F.spearman_loss, dict(method="permutahedron")),
}


@pytest.mark.parametrize("masked", [False, True], ids=["lengths", "mask"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, masked):
    function, options = LOSSES[name]
    x, present, given = padded(masked)
    x.requires_grad_()
    target = torch.randn(2, 3, N)
    matrix = torch.zeros(2, 3, N, N)
    total, items = 0.0, []
    for i in range(2):
        for j in range(3):
            (at,) = present[i, j].nonzero(as_tuple=True)
            if len(at) == 0:
                items.append(x.new_zeros(()))
                continue
            own = target[i, j, at]
            if options.get("target_is"):
                own = own.argsort().argsort()
                target[i, j, at] = own.float()
                matrix[i, j, at, own] = 1
                own = matrix[i, j, at, : len(at)] if name == "permutation" else own
            items.append(function(x[i, j, at], own, **options))
            total = total + items[-1]
    if name == "permutation":
        target = matrix
    elif name == "spearman":
        target[~present] = math.nan
    each = function(x, target, reduction="none", **given, **options)
    torch.testing.assert_close(each, torch.stack(items).view(2, 3), rtol=1e-14, atol=1e-14)
    mean = function(x, target, reduction="mean", **given, **options)
    torch.testing.assert_close(mean, total / 5)
    torch.testing.assert_close(function(x, target, reduction="sum", **given, **options), total)
    (dx,), (exact,) = (torch.autograd.grad(loss, x) for loss in (mean, total / 5))
    torch.testing.assert_close(dx, exact)
    module = (
        pyloss.nn.SpearmanLoss(**options)
        if "spearman" in name
        else pyloss.nn.SortingCrossEntropyLoss(**options)
    )
    torch.testing.assert_close(module(x, target, **given), mean)


def test_padding_with_infinity_is_not_the_same():
    x, t = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.3, 0.2, 0.1])
    more = torch.full((4,), math.inf)
    long_x, long_t = torch.cat([x, more]), torch.cat([t, more])
    wanted = pyloss.spearman_loss(x, t)
    assert wanted > 1.9 and pyloss.spearman_loss(long_x, long_t) < 0.5
    found = pyloss.spearman_loss(long_x, long_t, lengths=torch.tensor(3))
    assert torch.equal(found, wanted)


def test_steepness_of_rows_and_nothing_at_all():
    x, present, given = padded(True)
    steep = torch.tensor([[2.0], [5.0]], dtype=torch.float64, requires_grad=True)
    found = F.soft_rank(x, steepness=steep, **given)
    exact = torch.stack(
        [alone(F.soft_rank, "e", x[i : i + 1], present[i : i + 1], steepness=steep[i, 0])[0]
         for i in range(2)]
    )  # fmt: skip
    torch.testing.assert_close(found, exact)
    (a,), (b,) = (torch.autograd.grad(y.sum(), steep, allow_unused=True) for y in (
        found.square(), exact.square()))  # fmt: skip
    torch.testing.assert_close(a, b)
    x = torch.randn(2, 4, requires_grad=True)
    none = torch.zeros(2, dtype=torch.int32)
    for reduction, value in (("sum", 0.0), ("mean", math.nan)):
        loss = pyloss.spearman_loss(x, x.detach(), reduction, lengths=none)
        assert loss.isnan() if math.isnan(value) else loss == value
        assert torch.equal(torch.autograd.grad(loss, x)[0].nan_to_num(), torch.zeros(2, 4))
    y = F.soft_sort(x[:0], lengths=none[:0])
    assert y.shape == (0, 4)


@pytest.mark.parametrize(
    "given, text",
    [
        (dict(mask=torch.ones(2, 5)), r"mask must be bool.*\[2, 5\].*float32"),
        (dict(mask=torch.ones(2, 4, dtype=torch.bool)), r"\[2, 4\]"),
        (dict(lengths=torch.tensor([1.0, 2.0])), "lengths must hold integers.*float32"),
        (dict(lengths=torch.tensor([1, 2, 3])), r"the shape \[2\].*got torch.int64 of shape \[3\]"),
        (dict(lengths=torch.tensor([1, 6])), r"lengths must be in \[0, 5\]"),
        (dict(lengths=torch.tensor([-1, 5])), r"lengths must be in \[0, 5\]"),
        (dict(mask=torch.ones(2, 5).bool(), lengths=torch.tensor([1, 5])), "not both"),
    ],
)
def test_errors(given, text):
    x = torch.randn(2, 5)
    for function in (F.soft_sort, F.soft_rank, F.permutahedron_rank, F.neural_sort):
        with pytest.raises(ValueError, match=text):
            function(x, **given)
    with pytest.raises(ValueError, match=text):
        pyloss.spearman_loss(x, x, **given)
    with pytest.raises(ValueError, match=r"k must be in \[1, 1\]"):
        F.soft_topk(x, 2, lengths=torch.tensor([1, 5]))


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("masked", [False, True])
def test_ranking_accuracy(masked, dim):
    """The shares over the elements of each set alone; sets that are too small do not count."""
    x, present, _ = padded(masked)
    truth = torch.where(torch.rand(x.shape) < 0.7, x, torch.randn(x.shape).double())
    x = torch.where(present, x.nan_to_num(3.0).round(decimals=1), x)  # ties
    exact, elements, first = [], [], []
    for a, b, here in zip(x.view(-1, N), truth.view(-1, N), present.view(-1, N)):
        if not here.any():
            continue
        a, b = a[here], b[here]
        found = pyloss.metrics.ranking_accuracy(a, b)
        exact.append(found.exact_match)
        elements.append(found.element_wise * len(a))
        first += [found.exact_match_5] if len(a) >= 5 else []
    expected = (
        torch.stack(exact).mean(), torch.stack(elements).sum() / present.sum(),
        torch.stack(first).mean(),
    )  # fmt: skip
    moved = (t.movedim(-1, dim) for t in (x, truth, present))
    scores, values, mask = moved
    found = pyloss.metrics.ranking_accuracy(scores, values, dim, mask=mask)
    torch.testing.assert_close(tuple(found), expected)
    assert 0 < found.element_wise < 1
    whole = pyloss.metrics.ranking_accuracy(truth, truth.flip(-1), mask=torch.ones_like(present))
    torch.testing.assert_close(
        tuple(whole), tuple(pyloss.metrics.ranking_accuracy(truth, truth.flip(-1)))
    )


def test_ranking_accuracy_of_what_has_no_element():
    x = torch.randn(2, 6)
    none = torch.zeros(2, 6, dtype=torch.bool)
    assert all(t.isnan() for t in pyloss.metrics.ranking_accuracy(x, x, mask=none))
    none[0, :4] = True
    found = pyloss.metrics.ranking_accuracy(x, x, mask=none)
    assert found.exact_match == found.element_wise == 1 and found.exact_match_5.isnan()
    x[0, 1] = math.nan
    assert pyloss.metrics.ranking_accuracy(x, x, mask=none).element_wise == 0
    x[0, 1], x[0, 5] = 0.0, math.nan  # outside the mask
    assert pyloss.metrics.ranking_accuracy(x, x, mask=none).element_wise == 1
