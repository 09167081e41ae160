"""Top-k classification: the peer it stands in for, limits. Its promises: tests/specs/topk.py."""

from __future__ import annotations

import pytest
import torch

import pyloss
from pyloss.nn import TopKCrossEntropyLoss

PEERS = {  # ours by difftopk's name
    "bitonic__non_sparse": dict(distribution="cauchy"),
    "odd_even": dict(distribution="logistic_phi", art_lambda=0.5),
    "neuralsort": {},
    "softsort": {},
}


@pytest.mark.filterwarnings("ignore")  # difftopk prints what it lacks
@pytest.mark.parametrize("mode", ["sm", "smce", "sort"])
@pytest.mark.parametrize("m", [None, 8])
@pytest.mark.parametrize("method", list(PEERS))
def test_difftopk_gives_the_same(method, m, mode) -> None:
    difftopk = pytest.importorskip("difftopk")
    p_k = [0.2, 0.1, 0.0, 0.7]
    arguments = (method, 0.7, p_k, 16)
    options = dict(m=m, top1_mode=mode, **PEERS[method])
    theirs = difftopk.TopKCrossEntropyLoss(*arguments, **options)
    ours = TopKCrossEntropyLoss(*arguments, **options)
    logits = torch.randn(6, 16).requires_grad_()
    labels = torch.randint(16, (6,))
    losses = [theirs(logits, labels), ours(logits, labels)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("sorter", ["splitter_selection", "bitonic", "neuralsort", "softsort"])
def test_the_hard_limit_counts_the_k_largest(sorter) -> None:
    """Steep, the share of the label is that of all k that reach it: here 0.5 from k = 3 on."""
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]).double()
    p_k = (0.5, 0.0, 0.5)
    shares = []
    for label in range(6):
        loss = pyloss.topk_cross_entropy(
            logits, torch.tensor([label]), p_k, top1_mode="sort", sorter=sorter, steepness=1e9
        )
        shares.append(round(float((-loss).exp()), 3))
    assert shares == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_one_k_of_one_is_cross_entropy() -> None:
    """With the softmax for the top, and nothing else, but for the authors' 1e-7."""
    logits, labels = torch.randn(5, 7).double(), torch.randint(7, (5,))
    found = pyloss.topk_cross_entropy(logits, labels, 1)
    torch.testing.assert_close(
        found, torch.nn.functional.cross_entropy(logits, labels), rtol=1e-5, atol=0
    )


def test_scores_that_take_no_part_get_no_gradient() -> None:
    logits = torch.arange(10.0).unsqueeze(0).requires_grad_()
    pyloss.topk_cross_entropy(logits, torch.tensor([2]), 2, m=4).backward()
    assert (logits.grad[0] != 0).tolist() == [False, False, True, *[False] * 4, True, True, True]


def test_the_label_may_be_among_the_largest() -> None:
    """It is kept once: m - 1 others beside it."""
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.0]], requires_grad=True)
    pyloss.topk_cross_entropy(logits, torch.tensor([0]), 1, m=2).backward()
    assert (logits.grad[0] != 0).tolist() == [True, True, False, False]


def test_several_labels_are_the_sum_of_each() -> None:
    logits = torch.randn(4, 6).double()
    both = torch.zeros(4, 6).double()
    both[:, [1, 3]] = 1
    one, other = (pyloss.topk_cross_entropy(logits, torch.full((4,), label), 3) for label in (1, 3))
    torch.testing.assert_close(pyloss.topk_cross_entropy(logits, both, 3), one + other)


@pytest.mark.parametrize("sorter", ["splitter_selection", "odd_even"])
def test_nothing_of_the_size_of_the_matrix_is_kept(sorter) -> None:
    kept = []

    def pack(t):
        kept.append(t.numel())
        return t

    logits = torch.randn(8, 200, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pyloss.topk_cross_entropy(logits, torch.arange(8), 5, sorter=sorter)
    assert sum(kept) < 10 * logits.numel()
