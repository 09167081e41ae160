"""Group ordering: peers, processes, memory. What every loss promises: tests/specs/groco.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import check_ranks

import pyloss
from pyloss.functional import groco_from_scores

WORKER = Path(__file__).with_name("groco_worker.py")


def authors_loss(views, n_pos, topk_neg):
    """The published loss, step by step as the paper's code goes, on networks of diffsort."""
    diffsort = pytest.importorskip("diffsort")
    total = 0.0
    for a, anchor in enumerate(views):
        others = [p.detach() for k, p in enumerate(views[:n_pos]) if k != a]
        pos = torch.stack([F.cosine_similarity(anchor, p) for p in others], 1)
        near = F.cosine_similarity(anchor.unsqueeze(1), anchor.detach().unsqueeze(0), dim=-1)
        near = near - torch.diag(torch.full((len(anchor),), math.inf).to(near))
        neg = near.topk(topk_neg, 1, largest=True, sorted=True).values.flip(1)
        scores = torch.cat([neg, pos.sort(1).values], 1)
        truth = torch.zeros_like(scores)
        truth[:, topk_neg:] = 1
        _, matrix = diffsort.DiffSortNet("odd_even", scores.shape[1], steepness=1.0)(scores)
        high = matrix[:, :, topk_neg:].sum(2).clamp(0, 1)
        low = matrix[:, :, :topk_neg].sum(2).clamp(0, 1)
        total += F.binary_cross_entropy(high, truth) + F.binary_cross_entropy(low, 1 - truth)
    return total / 2 / len(views)


@pytest.mark.parametrize("count, n_pos, topk_neg", [(2, 2, 10), (4, 4, 10), (8, 2, 6)])
def test_diffsort_gives_the_same(count, n_pos, topk_neg) -> None:
    views = torch.randn(count, 40, 8, dtype=torch.float64, requires_grad=True)
    expected = authors_loss(list(views), n_pos, topk_neg)
    found = pyloss.groco_loss(views, n_pos=n_pos, topk_neg=topk_neg)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, views)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_groups_in_order_lose_nothing() -> None:
    pos, neg = torch.tensor([[0.9, 0.8]]), torch.linspace(-0.5, 0.5, 10).unsqueeze(0)
    losses = [float(groco_from_scores(pos, neg, steepness=s)) for s in (1.0, 10.0, 1e3, 1e6)]
    assert losses == sorted(losses, reverse=True)
    assert 0 <= losses[-1] < 1e-4
    # Turned around, 4 of the 12 have nothing of their mass in the right block.
    assert float(groco_from_scores(-pos, neg + 1, steepness=1e6)) > 4


def test_small_masses_keep_their_digits() -> None:
    """The mass of the wrong block, 1e-9 and less, is no difference from 1."""
    pos, neg = torch.tensor([[-1e4]]), torch.tensor([[1e4]])
    found = groco_from_scores(pos, neg, steepness=1e4)
    torch.testing.assert_close(
        found, groco_from_scores(pos.double(), neg.double(), steepness=1e4).float()
    )
    assert 19 < float(found) < 21


def test_padding_by_infinity() -> None:
    """No negative of -inf is ever above another score; the mean still counts it."""
    pos, neg = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    padded = torch.cat([torch.full((3, 2), -math.inf, dtype=torch.float64), neg], 1)
    options = dict(network="odd_even", reduction="none")
    assert torch.isfinite(groco_from_scores(pos, padded, **options)).all()


def test_all_processes_are_one_batch(tmp_path: Path) -> None:
    texts = check_ranks(tmp_path, 2, str(WORKER))
    assert all(text.count(": ok") == 3 for text in texts)


def test_float32_under_autocast() -> None:
    views = F.normalize(torch.randn(2, 30, 16), dim=-1)
    views = (views + 0.001 * torch.randn_like(views)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = pyloss.groco_loss(views)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pyloss.groco_loss(views), rtol=0, atol=0)


def test_memory_does_not_grow_with_the_square_of_the_batch() -> None:
    """What autograd keeps: per anchor some vectors, and k numbers."""
    kept = {}
    for images in (200, 400):
        views = torch.randn(2, images, 16, requires_grad=True)
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.untyped_storage().nbytes())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            pyloss.groco_loss(views, topk_neg=10)
        kept[images] = sum(sizes)
    assert kept[400] < 2.1 * kept[200]


@pytest.mark.parametrize("wanted", [(0, 1), (0,), (1,)])
def test_two_views_have_one_backward(wanted, monkeypatch) -> None:
    """It is that of the operations, in short rows and in rows of zeros too."""
    views = list(torch.randn(2, 30, 6, dtype=torch.float64))
    views[0][3], views[1][5] = 0.0, views[1][5] * 1e-10
    for at in wanted:
        views[at].requires_grad_()
    leaves = [views[at] for at in wanted]

    def found():
        losses = pyloss.groco_loss(views, topk_neg=4, reduction="none")
        weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype).view_as(losses)
        return losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)

    ours = found()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(ours, found(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("second", [lambda a: a, torch.square], ids=["the same", "a function"])
def test_a_view_that_depends_on_the_other(second) -> None:
    """A gradient that will be differentiated is the one that will not."""
    x = torch.linspace(-3.0, 3.0, 36, dtype=torch.float64).sin().view(9, 4).requires_grad_()
    a = 1.5 * x
    loss = pyloss.groco_loss([a, second(a)], topk_neg=4)
    (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
    (differentiable,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(differentiable, plain)
