"""Sorting networks as users call them: targets, options, metrics, the peers' modules.

`specs/sorting.py` has the errors of the functions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pyloss
from pyloss.metrics import ranking_accuracy

F = pyloss.functional
X = torch.randn(3, 4)
RANKS = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [1, 0, 3, 2]])
Q = torch.nn.functional.one_hot(RANKS, 4).float()


def ce(x=X, target=None, **options):
    return pyloss.sorting_cross_entropy(x, x.detach() if target is None else target, **options)


# name -> (call, error, words of the message)
BAD = {
    "net_selector": (lambda: pyloss.DiffSortNet("splitter_selection", 4), ValueError, "network"),
    "net_size": (lambda: pyloss.DiffSortNet("bitonic", 0), ValueError, "size must be at least 1"),
    "net_size_type": (lambda: pyloss.DiffSortNet("bitonic", 4.0), TypeError, "size must be an int"),
    "net_names": (
        lambda: pyloss.DiffSortNet("bitonic", 4, "cpu", 10.0, 0.25, "optimal", "gaussian"),
        ValueError,
        "interpolation_type='optimal'.*'gaussian'",
    ),
    "net_shape": (
        lambda: pyloss.DiffSortNet("bitonic", 5)(X), ValueError, r"\(batch, 5\), got \[3, 4\]"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


def test_unknown_names_raise_what_diffsort_raises_too():
    for error in (ValueError, NotImplementedError):
        with pytest.raises(error):
            pyloss.DiffSortNet("bubble", 4)


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bce", "row_ce", "col_ce"])
@pytest.mark.parametrize("descending", [False, True])
def test_targets_say_the_same(kind, descending):
    x = torch.randn(3, 4, dtype=torch.float64)
    order = torch.argsort(RANKS, 1)
    values = (RANKS * 2.5 - 1) * (-1 if descending else 1)
    options = dict(kind=kind, descending=descending, reduction="none", validate=True)
    p = pyloss.soft_permutation(x, descending=descending)
    q = Q.double()
    if kind == "bce":
        terms = torch.nn.functional.binary_cross_entropy(p, q, reduction="none")
        want = terms.mean((1, 2))
    else:
        want = -p.gather(1, order.unsqueeze(1)).squeeze(1).log().mean(1)
    for target, target_is in (
        (values, "values"),
        (values.float(), "values"),
        (values.half(), "values"),
        (RANKS, "ranks"),
        (RANKS.to(torch.uint8), "ranks"),
        (RANKS.double(), "ranks"),
        (Q, "permutation"),
        (Q.bool(), "permutation"),
        (Q.long(), "permutation"),
    ):
        for ties in ("stable", "share") if target_is != "permutation" else ("stable",):
            found = ce(x, target, target_is=target_is, ties=ties, **options)
            torch.testing.assert_close(found, want)
    for reduction, value in (("mean", want.mean()), ("sum", want.sum())):
        found = ce(x, RANKS, target_is="ranks", **(options | {"reduction": reduction}))
        torch.testing.assert_close(found, value)


def test_ranks_that_do_not_exist_are_no_target():
    """Without validation nothing is read out of bounds, on either side."""
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    p = pyloss.soft_permutation(x)
    ranks = torch.tensor([[0, 7, -3, 2], [2**31 - 1, -(2**31), 1, 3]])
    q = (ranks.unsqueeze(-1) == torch.arange(4)).double()
    found = ce(x, ranks, target_is="ranks", reduction="none", validate=False)
    terms = torch.nn.functional.binary_cross_entropy(p, q, reduction="none")
    torch.testing.assert_close(found, terms.mean((1, 2)))
    row = ce(x, ranks, target_is="ranks", kind="row_ce", reduction="none", validate=False)
    torch.testing.assert_close(row, -(q * p.log()).sum((1, 2)) / 4)
    (g,) = torch.autograd.grad(found.sum() + row.sum(), x)
    assert bool(g.isfinite().all())


def test_matrices_as_targets():
    """A rounded 1 is one, a row without is no target, a NaN is the loss."""
    x = torch.randn(3, 4)
    exact = torch.eye(4)[torch.rand(3, 4).argsort(1)]

    def loss(target):
        return ce(x, target, kind="row_ce", target_is="permutation", reduction="none")

    want = loss(exact)
    for same in (exact * 0.999, exact + 1e-3, exact.bool(), exact.long(), exact.half()):
        assert torch.equal(loss(same), want)
    part = exact.clone()
    part[1] = 0
    part[2, 3, 0] = math.nan
    found = loss(part)
    assert found[0] == want[0] and found[1] == 0 and bool(found[2].isnan())
    ranks = exact.argmax(-1).double()
    ranks[0, 1] = math.nan
    found = ce(x, ranks, kind="row_ce", target_is="ranks", reduction="none")
    assert bool(found[0].isnan()) and torch.equal(found[1:], want[1:])


def test_nan_in_the_target():
    x = torch.randn(3, 4, requires_grad=True)
    target = torch.randn(3, 4)
    clean = target.clone()
    target[1, 2] = math.nan
    for loss in (ce, pyloss.spearman_loss):
        found, want = loss(x, target, reduction="none"), loss(x, clean, reduction="none")
        assert bool(found[1].isnan()) and torch.equal(found[[0, 2]], want[[0, 2]])
        (g,) = torch.autograd.grad(found.sum(), x)
        assert bool(g[1].isnan().all()) and bool(g[[0, 2]].isfinite().all())


def test_masked_entries_get_no_gradient():
    """+inf marks padding: the others have nearly the gradient that they have without it."""
    x = torch.randn(2, 5, dtype=torch.float64)
    target = torch.randn(2, 5)
    short = x.clone().requires_grad_()
    padded = torch.cat([x, torch.full((2, 3), math.inf, dtype=x.dtype)], 1).requires_grad_()
    truth = torch.cat([target, torch.full((2, 3), math.inf)], 1)
    options = dict(network="odd_even", reduction="sum")
    a = 5 * ce(short, target, kind="row_ce", **options)
    b = 8 * ce(padded, truth, kind="row_ce", ties="share", **options)
    ga, gb = torch.autograd.grad(a, short)[0], torch.autograd.grad(b, padded)[0]
    # odd_even meets its wires in another order when there are more of them: near, not equal.
    assert torch.equal(gb[:, 5:], torch.zeros(2, 3, dtype=x.dtype))
    assert bool(gb.isfinite().all()) and torch.cosine_similarity(ga, gb[:, :5]).min() > 0.5


# --- spearman, metrics ---------------------------------------------------------------------------


@pytest.mark.parametrize("ties", ["share", "stable"])
@pytest.mark.parametrize("row", [[math.nan], [1.0, *[math.nan] * 4], [0.5, math.nan, 2.0]])
def test_spearman_of_a_target_with_nan(row, ties):
    target = torch.tensor([row, [0.0] * len(row)])  # and a flat one: 1
    loss = pyloss.spearman_loss(torch.randn(target.shape), target, "none", ties=ties)
    assert loss[0].isnan() and loss[1] == 1


def test_spearman_of_exact_orders():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert pyloss.spearman_loss(x, x, steepness=1e4).item() == pytest.approx(0, abs=1e-3)
    assert pyloss.spearman_loss(x, -x, steepness=1e4).item() == pytest.approx(2, abs=1e-3)
    for a, b in (
        (torch.ones(1, 4), torch.arange(4.0)[None]),  # four equal scores: equal ranks
        (x, torch.ones(1, 3)),
        (torch.ones(2, 1), torch.ones(2, 1)),
    ):
        leaf = a.clone().requires_grad_()
        loss = pyloss.spearman_loss(leaf, b)
        assert loss.item() == 1
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.zeros_like(a))


def test_ranking_accuracy_of_nan():
    """A model that gives NaN has nothing right, whatever order a sort makes of it."""
    truth = torch.arange(12.0).view(2, 6)
    scores = truth.clone()
    scores[0] = math.nan
    found = ranking_accuracy(scores, truth)
    assert found.exact_match == found.element_wise == found.exact_match_5 == 0.5


def test_sizes_may_be_numpy_integers():
    n, k = np.int64(5), np.int32(2)
    assert pyloss.DiffSortNet("odd_even", n)(X[:, :1].expand(3, 5))[1].shape == (3, 5, 5)
    assert pyloss.DiffTopkNet("odd_even", n, k)(X[:, :1].expand(3, 5))[1].shape == (3, 5, 2)


def test_a_rank_beyond_32_bits_is_none():
    x, ranks = torch.randn(1, 3), torch.tensor([[2**32, 1, 2]])
    none = torch.tensor([[-1, 1, 2]])
    found = [ce(x, r, kind="row_ce", target_is="ranks", validate=False) for r in (ranks, none)]
    assert found[0] == found[1]


def test_ranking_accuracy():
    truth = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    scores = truth.clone()
    scores[1] = torch.tensor([6.0, 5, 4, 3, 1, 2])  # the last two swapped
    scores[2] = torch.tensor([2.0, 1, 3, 4, 5, 6])
    found = ranking_accuracy(scores, truth)
    assert [t.item() for t in found] == pytest.approx([1 / 3, 14 / 18, 2 / 3])
    assert found == ranking_accuracy(scores.t(), truth.t(), dim=0)
    assert ranking_accuracy(scores[:, :4], truth[:, :4]).exact_match_5.isnan()


# --- options -------------------------------------------------------------------------------------


def test_permutahedron_is_a_method():
    x = torch.randn(3, 4, 5)
    for dim in (-1, 1):
        for descending in (False, True):
            options = dict(regularization="kl", regularization_strength=0.5)
            found = pyloss.soft_sort(x, dim, descending, method="permutahedron", **options)
            want = F.permutahedron_sort(x, "kl", 0.5, dim=dim, descending=descending)
            assert torch.equal(found, want)
            ranks = pyloss.soft_rank(x, dim, descending, base=0, method="permutahedron", **options)
            want = F.permutahedron_rank(x, "kl", 0.5, dim=dim, descending=descending)
            assert torch.equal(ranks, want - 1)


def test_topk_columns():
    x = torch.randn(3, 7, dtype=torch.float64)
    p = pyloss.soft_permutation(x)
    torch.testing.assert_close(pyloss.soft_topk(x, 3), p[:, :, [6, 5, 4]])
    low = pyloss.soft_topk(x, 3, largest=False)
    torch.testing.assert_close(low, pyloss.soft_permutation(x, descending=True)[:, :, [6, 5, 4]])
    for network in ("bitonic", "odd_even", "batcher", "splitter_selection"):
        for largest in (True, False):
            for k in (1, 3, 7):
                hot = pyloss.soft_topk(x, k, largest=largest, network=network, steepness=1e7)
                index = x.topk(k, 1, largest).indices
                assert torch.equal(hot.argmax(1), index), (network, largest, k)
                torch.testing.assert_close(hot.sum(1), torch.ones(3, k, dtype=x.dtype))
    assert pyloss.soft_topk(x.t(), 2, 0).shape == (3, 7, 2)


def test_feats_broadcast():
    x, feats = torch.randn(2, 1, 5), torch.randn(3, 5, 2, requires_grad=True)
    found = pyloss.soft_permute(x, feats)
    want = pyloss.soft_permutation(x).mT @ feats
    torch.testing.assert_close(found, want)
    one = torch.randn(5, 2, requires_grad=True)
    found, want = pyloss.soft_permute(x, one), pyloss.soft_permutation(x).mT @ one
    torch.testing.assert_close(found, want)
    g = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, one, g), torch.autograd.grad(want, one, g)
    )
    each = torch.tensor([1.0, 8.0]).view(2, 1)
    found = pyloss.soft_permute(x, feats, steepness=each)
    want = pyloss.soft_permutation(x, steepness=each).mT @ feats
    torch.testing.assert_close(found, want)
    assert pyloss.soft_permute(x.half(), feats).dtype == torch.float32
    assert pyloss.soft_permute(x, feats.double()).dtype == torch.float64


def test_old_name_of_distribution():
    net = pyloss.DiffSortNet("odd_even", 4, interpolation_type="gaussian")
    assert net.distribution == "gaussian"
    assert torch.equal(net(X)[0], pyloss.soft_sort(X, network="odd_even", distribution="gaussian"))
    assert pyloss.DiffSortNet("bitonic", 4, "cuda").size == 4  # the device is ignored


def test_training_sorts():
    """Scores learn an order from ordering supervision alone."""
    torch.manual_seed(3)
    weight = torch.randn(6)
    model = torch.nn.Linear(6, 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(120):
        inputs = torch.randn(32, 7, 6)
        loss = pyloss.sorting_cross_entropy(model(inputs).squeeze(-1), inputs @ weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    inputs = torch.randn(200, 7, 6)
    found = ranking_accuracy(model(inputs).squeeze(-1), inputs @ weight)
    assert found.exact_match > 0.8 and found.element_wise > 0.95


@pytest.mark.parametrize("network", ["auto", "bitonic", "odd_even", "batcher"])
def test_ranks_of_ties_do_not_depend_on_their_places(network):
    for n in (3, 8, 13):
        target = torch.randn(20, n)
        x = torch.full((20, n), 0.7, requires_grad=True)
        loss = pyloss.spearman_loss(x, target, "none", network=network)
        assert torch.equal(loss, torch.ones(20))
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert torch.equal(dx, torch.zeros_like(x))
        # Steep networks: the exact correlation of mean ranks.
        x = torch.randint(0, 3, (20, n)).float()
        hard = pyloss.soft_rank(x, hard=True, ties="share", network=network)
        below, same = (
            (x.unsqueeze(2) > x.unsqueeze(1)).sum(2),
            (x.unsqueeze(2) == x.unsqueeze(1)).sum(2),
        )
        torch.testing.assert_close(hard, below + (same + 1) / 2)
    infinite = torch.tensor([[math.inf, 0.0, math.inf, 1.0]])
    ranks = pyloss.soft_rank(infinite, steepness=1e6, ties="share", network=network)
    torch.testing.assert_close(ranks, torch.tensor([[3.5, 1.0, 3.5, 2.0]]), rtol=0, atol=1e-4)


def test_nothing_to_sort_is_sorted():
    x = torch.zeros(2, 0, requires_grad=True)
    for found, shape in (
        (pyloss.soft_sort(x), (2, 0)),
        (pyloss.soft_sort(x, method="permutahedron"), (2, 0)),
        (pyloss.soft_rank(x, hard=True), (2, 0)),
        (pyloss.soft_argsort(x), (2, 0)),
        (pyloss.soft_permutation(x), (2, 0, 0)),
        (pyloss.soft_permute(x, torch.ones(0, 3)), (2, 0, 3)),
        (pyloss.soft_sort(x, return_permutation=True)[1], (2, 0, 0)),
    ):
        assert found.shape == shape and found.requires_grad
        (dx,) = torch.autograd.grad(found.sum(), x)
        assert dx.shape == x.shape
    one = torch.randn(3, 1)
    p = pyloss.soft_permutation(one)
    assert torch.equal(p, torch.ones(3, 1, 1)) and torch.equal(p.sum(1), torch.ones(3, 1))


# name -> a call with an integer 1, a flag and a number 2 of any type
NUMBERS = {
    **{
        name: lambda one, flag, two, name=name, **rows: getattr(F, name)(
            LONG, dim=one, descending=flag, hard=flag, steepness=two, **rows
        )
        for name in ("soft_sort", "soft_rank", "soft_argsort", "soft_permutation")
    },
    "soft_sort and P": lambda one, flag, two, **rows: F.soft_sort(
        LONG, dim=one, return_permutation=flag, steepness=two, **rows
    ),
    "soft_rank, base": lambda one, flag, two, **rows: F.soft_rank(LONG, base=one, **rows),
    "soft_rank, permutahedron": lambda one, flag, two, **rows: F.soft_rank(
        LONG, dim=one, method="permutahedron", regularization_strength=two, **rows
    ),
    "soft_permute": lambda one, flag, two, **rows: F.soft_permute(
        LONG, LONG.unsqueeze(-1), one, flag, hard=flag, steepness=two, **rows
    ),
    "soft_topk": lambda one, flag, two, **rows: F.soft_topk(
        LONG, one, one, flag, network="splitter_selection", steepness=two, hard=flag, **rows
    ),
    "sorting_cross_entropy": lambda one, flag, two, **rows: pyloss.sorting_cross_entropy(
        LONG, LONG.argsort(1).argsort(1) + 1, "row_ce", "ranks", dim=one, descending=flag,
        validate=not rows and flag, base=one, steepness=two, **rows
    ),
    "spearman_loss": lambda one, flag, two, **rows: pyloss.spearman_loss(
        LONG, LONG.sin(), dim=one, distribution="logistic_phi", art_lambda=two / 4, **rows
    ),
    **{
        name: lambda one, flag, two, name=name, **rows: getattr(F, name)(
            LONG, "kl", two, dim=one, descending=flag, **rows
        )
        for name in ("permutahedron_rank", "permutahedron_sort")
    },
    "neural_sort": lambda one, flag, two, **rows: F.neural_sort(
        LONG, two, dim=one, descending=flag, hard=flag, **rows
    ),
    "soft_sort_matrix": lambda one, flag, two, **rows: F.soft_sort_matrix(
        LONG, two, two, dim=one, descending=flag, hard=flag, **rows
    ),
    "ranking_accuracy": lambda one, flag, two, **rows: ranking_accuracy(LONG, LONG, dim=one),
    "DiffTopkNet": lambda one, flag, two, **rows: pyloss.DiffTopkNet(
        "bitonic", 4 + one, one, steepness=two, art_lambda=two / 4
    )(LONG),
    "modules": lambda one, flag, two, **rows: (
        pyloss.nn.SpearmanLoss(steepness=two, dim=one)(LONG, LONG.sin())
        + pyloss.nn.SoftSort(two, flag, pow=two, dim=one, descending=flag)(LONG)[:, 0, 0]
        + pyloss.nn.SortingCrossEntropyLoss(dim=one, descending=flag)(LONG, LONG)
    ),
}  # fmt: skip
LONG = torch.randn(3, 5)


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_numpy_numbers_are_numbers(name, lengths):
    rows = dict(lengths=torch.tensor([5, 3, 4])) if lengths else {}
    for flag in (False, True):
        expected = NUMBERS[name](1, flag, 2.0, **rows)
        for integer, number in ((np.int64, np.float64), (np.uint8, np.float32), (np.int16, int)):
            found = NUMBERS[name](integer(1), np.bool_(flag), number(2), **rows)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_ranks_in_narrow_types():
    x = torch.randn(1, 300)
    ranks = torch.arange(300).clamp_max(255)[None]
    found = [
        pyloss.sorting_cross_entropy(x, r, target_is="ranks", ties="share")
        for r in (ranks, ranks.to(torch.uint8))
    ]
    assert torch.equal(*found)


def test_typos_are_found_when_a_module_is_made():
    for make, text in (
        (lambda: pyloss.nn.SpearmanLoss(reduction="avg"), "reduction"),
        (lambda: pyloss.nn.SpearmanLoss(network="bubble"), "network"),
        (lambda: pyloss.nn.SpearmanLoss(method="permutahedron", steepness=3), "steepness"),
        (lambda: pyloss.nn.SortingCrossEntropyLoss(kind="mse"), "kind"),
        (lambda: pyloss.nn.SortingCrossEntropyLoss(target_is="order"), "target_is"),
        (lambda: pyloss.nn.NeuralSort(tau=0), "tau"),
        (lambda: pyloss.nn.SoftSort(pow=-1), "pow"),
        (
            lambda: pyloss.DiffSortNet("bitonic", 4, art_lambda=None, distribution="logistic_phi"),
            "art_lambda",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            make()
    with pytest.raises(pyloss.functional.sorting.UnknownNetworkError, match="distribution"):
        pyloss.nn.SpearmanLoss(distribution="normal")
    x = torch.randn(2, 4)
    same = pyloss.DiffSortNet("bitonic", 4, art_lambda=None)(x)[0]
    assert torch.equal(same, pyloss.DiffSortNet("bitonic", 4)(x)[0])
    _, top = pyloss.DiffTopkNet("bitonic", 4, 2, art_lambda=None)(x)
    assert top.shape == (2, 4, 2)
