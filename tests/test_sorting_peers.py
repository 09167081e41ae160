"""Equality with the packages that pyloss stands in for: diffsort, difftopk, torchsort.

Each is optional: `pip install diffsort difftopk` (they need torch and numpy alone), and torchsort,
which is built against the installed torch.
"""

from __future__ import annotations

import warnings

import pytest
import torch

import pyloss

DISTRIBUTIONS = ("logistic", "logistic_phi", "gaussian", "cauchy", "reciprocal", "optimal")
NETWORKS = ("bitonic", "odd_even")
SIZES = (*range(2, 34), 64, 100)


@pytest.fixture(autouse=True)
def one_thread(keep_num_threads):
    """Hundreds of tiny matrix products are no work for two threads."""
    torch.set_num_threads(1)


def _peer(name: str):
    with warnings.catch_warnings():
        # Their autograd.Functions are of an old style.
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def _close(ours, theirs, rtol: float) -> None:
    """Entries to rtol of themselves, above what the peer's own rounding leaves of small ones."""
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=rtol)


# --------------------------------------------------------------------------------------------------
# diffsort


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_diffsort(network, distribution):
    """Sorted values and permutation, n = 2..33, 64, 100.

    diffsort runs in float64: what is judged is pyloss's rounding.
    """
    diffsort = _peer("diffsort")
    options = dict(steepness=7.0, art_lambda=0.3, distribution=distribution)
    for n in SIZES:
        x = torch.randn(2, n)
        with torch.no_grad():
            ours = pyloss.DiffSortNet(network, n, **options)(x)
            theirs = diffsort.DiffSortNet(network, n, **options)(x.double())
        for a, b in zip(ours, theirs):
            _close(a, b, 1e-5)


# What is left in diffsort: 1 / steepness rounded to float32, and an added 1e-10.
OWN_ERROR = {"gaussian": 1e-6, "optimal": 1e-7}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_diffsort_gradient(network, distribution):
    """Of both outputs; in float64 to its own accuracy, in float32 as far as it is conditioned."""
    diffsort = _peer("diffsort")
    options = dict(steepness=7.0, art_lambda=0.3, distribution=distribution)
    theirs_error = OWN_ERROR.get(distribution, 1e-10)
    for n in (2, 3, 5, 8, 13, 16, 33):
        x = torch.randn(2, n, dtype=torch.float64)
        g = torch.randn(2, n, dtype=torch.float64), torch.randn(2, n, n, dtype=torch.float64)

        def run(module, dtype, x=x, g=g, n=n):
            leaf = x.to(dtype).requires_grad_()
            y, p = module.DiffSortNet(network, n, **options)(leaf)
            (dx,) = torch.autograd.grad((y, p), leaf, [t.to(dtype) for t in g])
            return y.detach(), p.detach(), dx

        theirs = run(diffsort, torch.float64)
        size = theirs[2].abs().max().item()
        for a, b in zip(run(pyloss, torch.float64), theirs):
            torch.testing.assert_close(a, b, rtol=theirs_error, atol=theirs_error * max(1.0, size))
        found = run(pyloss, torch.float32)[2]
        torch.testing.assert_close(found.double(), theirs[2], rtol=0, atol=1e-3 * size)


def test_code_written_for_diffsort_runs_unchanged():
    """Positional arguments, names, attributes, and the errors that can be told apart."""
    diffsort = _peer("diffsort")
    x = torch.randn(4, 6)
    for module in (diffsort, pyloss):
        net = module.DiffSortNet("odd_even", 6, "cpu", 5.0, 0.25, "logistic")
        assert (net.sorting_network_type, net.size, net.distribution) == ("odd_even", 6, "logistic")
        assert (net.steepness, net.art_lambda) == (5.0, 0.25)
        sorted_vectors, permutation = net(x)
        assert sorted_vectors.shape == (4, 6) and permutation.shape == (4, 6, 6)
        with pytest.raises(NotImplementedError):
            module.DiffSortNet("bubble", 6)
        assert net.to("cpu")(vectors=x)[0].shape == (4, 6)


def test_the_loss_is_that_of_diffsorts_training_loop():
    """binary_cross_entropy(P, Q) with Q[i, rank of i] = 1, as its experiments have it."""
    diffsort = _peer("diffsort")
    x, values = torch.randn(8, 9), torch.randn(8, 9)
    found = []
    for fused in (False, True):
        leaf = x.clone().requires_grad_()
        if fused:
            loss = pyloss.sorting_cross_entropy(leaf, values, network="odd_even", steepness=8.0)
        else:
            _, p = diffsort.DiffSortNet("odd_even", 9, steepness=8.0)(leaf)
            q = torch.nn.functional.one_hot(values.argsort(1), 9).transpose(-2, -1).float()
            loss = torch.nn.BCELoss()(p.clamp(0, 1), q)
        found.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# difftopk


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_difftopk(network, distribution):
    difftopk = _peer("difftopk")
    for n, k in ((2, 1), (5, 5), (16, 3), (23, 1), (33, 7)):
        options = dict(steepness=7.0, art_lambda=0.3, distribution=distribution)
        theirs = difftopk.DiffTopkNet(network, n, k, **options)
        ours = pyloss.DiffTopkNet(network, n, k, **options)
        x, g = torch.randn(3, n), torch.randn(3, n, k)
        found = []
        for net in (ours, theirs):
            leaf = x.clone().requires_grad_()
            nothing, p = net(leaf)
            assert nothing is None and p.shape == (3, n, k)
            found.append((p.detach(), *torch.autograd.grad(p, leaf, g)))
        _close(found[0][0], found[1][0], 1e-5)
        # Both in float32; logistic_phi is the worst conditioned.
        size = found[1][1].abs().max().item()
        torch.testing.assert_close(found[0][1] / size, found[1][1] / size, rtol=0, atol=1e-3)


@pytest.mark.parametrize("n, k", [(8, 1), (16, 1), (16, 5), (30, 3), (50, 5), (64, 5)])
def test_splitter_selection(n, k, capsys):
    """Its network, run by its own loop over dense matrices; its sparse one needs torch-sparse."""
    difftopk = _peer("difftopk")
    layers = difftopk.networks.sparse_splitter_selection_network(n, k)
    dense = [[torch.from_numpy(m).double() for m in layer[:4]] for layer in layers]
    x = torch.randn(3, n)
    for distribution in ("cauchy", "logistic", "reciprocal"):
        torch.set_default_dtype(torch.float64)  # its identity matrix has the default dtype
        try:
            _, theirs = difftopk.functional.execute_topk(
                dense, x.double(), k, 6.0, 0.25, distribution
            )
        finally:
            torch.set_default_dtype(torch.float32)
        net = pyloss.DiffTopkNet("splitter_selection", n, k, True, "cpu", 6.0, 0.25, distribution)
        _close(net(x)[1], theirs, 1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_neural_sort_and_soft_sort_of_difftopk(n):
    """Its NeuralSort has an element per row, smallest first; its SoftSort is ours."""
    difftopk = _peer("difftopk")
    x = torch.randn(4, n)
    for tau in (0.2, 1.0, 3.0):
        for hard in (False, True):
            theirs = difftopk.NeuralSort(tau, hard)(x)
            ours = pyloss.nn.NeuralSort(tau)(-x).mT
            if not hard:  # its hard rows are elements
                _close(ours, theirs, 1e-5)
            for pow in (1.0, 2.0):
                theirs = difftopk.SoftSort(tau, hard, pow)(x)
                _close(pyloss.nn.SoftSort(tau, hard, pow)(x), theirs, 1e-5)


# --------------------------------------------------------------------------------------------------
# torchsort


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["l2", "kl"])
@pytest.mark.parametrize("name", ["soft_rank", "soft_sort"])
def test_torchsort(name, kind, strength):
    torchsort = _peer("torchsort")
    ours = dict(
        soft_rank=pyloss.functional.permutahedron_rank,
        soft_sort=pyloss.functional.permutahedron_sort,
    )[name]
    also = getattr(pyloss, name)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 2e-4)):
        for n in (1, 2, 5, 33, 200):
            x, g = torch.randn(4, n, dtype=dtype), torch.randn(4, n, dtype=dtype)
            found = []
            for fn in (ours, getattr(torchsort, name)):
                leaf = x.clone().requires_grad_()
                y = fn(leaf, regularization=kind, regularization_strength=strength)
                found.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
            for a, b in zip(*found):
                torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(1.0, b.abs().max()))
            options = dict(regularization=kind, regularization_strength=strength)
            assert torch.equal(also(x, method="permutahedron", **options), found[0][0])
