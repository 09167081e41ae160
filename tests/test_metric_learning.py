"""Metric learning against pytorch-metric-learning, and what its losses reach.

Their promises: tests/specs/metric_learning.py and tests/specs/metric_learning_episodes.py.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import normalize

from pyloss import functional as F
from pyloss import metrics, nn

MININGS = ("all", "hard", "semihard")


@pytest.fixture
def batch():
    """Classes that overlap, one that has a single embedding, labels out of order."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(6, (40,), generator=g)
    labels[11] = 9
    centre = torch.randn(10, 8, generator=g, dtype=torch.float64)
    return (centre[labels] + torch.randn(40, 8, generator=g, dtype=torch.float64), labels)


def assert_same(ours, theirs, *tensors) -> None:
    """Values and gradients of two calls."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    found, expected = ours(*leaves), theirs(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# pytorch-metric-learning


@pytest.fixture
def pml():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    class Peer:
        pass

    peer = Peer()
    peer.distances, peer.losses, peer.miners, peer.reducers = distances, losses, miners, reducers
    return peer


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("average", ["active", "all"])
def test_mined_triplets_are_those_of_the_peer(pml, batch, mining, average) -> None:
    x, y = batch
    miner = pml.miners.TripletMarginMiner(margin=0.3, type_of_triplets=mining)
    reducer = pml.reducers.AvgNonZeroReducer()
    if average == "all":
        reducer = pml.reducers.MeanReducer()
    peer = pml.losses.TripletMarginLoss(margin=0.3, reducer=reducer)
    mined = (lambda x: None) if mining == "all" else (lambda x: miner(x, y))
    assert_same(
        lambda x: F.triplet_margin_loss(x, y, margin=0.3, mining=mining, average=average),
        lambda x: peer(x, y, mined(x)),
        x,
    )


@pytest.mark.parametrize("margin", [0.1, 0.9])
def test_batch_hard_is_that_of_the_peer(pml, batch, margin) -> None:
    x, y = batch
    peer = pml.losses.TripletMarginLoss(margin=margin)
    assert_same(
        lambda x: F.triplet_margin_loss(x, y, margin=margin, mining="batch_hard"),
        lambda x: peer(x, y, pml.miners.BatchHardMiner()(x, y)),
        x,
    )


def test_triplets_with_references_are_those_of_the_peer(pml, batch) -> None:
    x, y = batch
    peer = pml.losses.TripletMarginLoss(margin=0.3, distance=pml.distances.LpDistance(power=2))
    assert_same(
        lambda a, b: F.triplet_margin_loss(
            a, y[:15], margin=0.3, distance="squared", ref_emb=b, ref_labels=y[15:]
        ),
        lambda a, b: peer(a, y[:15], ref_emb=b, ref_labels=y[15:]),
        x[:15], x[15:],
    )  # fmt: skip


def test_contrastive_pairs_are_those_of_the_peer(pml, batch) -> None:
    x, y = batch
    peer = pml.losses.ContrastiveLoss(pos_margin=0.2, neg_margin=1.1)
    assert_same(
        lambda x: F.contrastive_pair_loss(x, y, pos_margin=0.2, neg_margin=1.1),
        lambda x: peer(x, y),
        x,
    )


def test_cosines_and_distances_of_raw_vectors_are_those_of_the_peer(pml, batch) -> None:
    """Margins of a similarity there are 1 - those of the distance here."""
    x, y = batch
    cosine = pml.distances.CosineSimilarity()
    raw = pml.distances.LpDistance(normalize_embeddings=False)
    pairs, triplets = pml.losses.ContrastiveLoss, pml.losses.TripletMarginLoss
    for loss, options, peer in (
        (F.contrastive_pair_loss, dict(distance="cosine", pos_margin=0.125, neg_margin=0.75),
         pairs(pos_margin=0.875, neg_margin=0.25, distance=cosine)),
        (F.triplet_margin_loss, dict(distance="cosine"), triplets(distance=cosine)),
        (F.contrastive_pair_loss, dict(normalize=False, neg_margin=3.0),
         pairs(neg_margin=3, distance=raw)),
        (F.triplet_margin_loss, dict(normalize=False), triplets(distance=raw)),
    ):  # fmt: skip
        assert_same(partial(loss, labels=y, **options), partial(peer, labels=y), x)


@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_multi_similarity_is_that_of_the_peer(pml, batch, epsilon) -> None:
    x, y = batch
    peer = pml.losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    mined = (lambda x: None) if epsilon is None else lambda x: miner(x, y)
    miner = pml.miners.MultiSimilarityMiner(epsilon=0.1)
    assert_same(
        lambda x: F.multi_similarity_loss(x, y, epsilon=epsilon), lambda x: peer(x, y, mined(x)), x
    )


def test_tcm_is_that_of_the_peer(pml, batch) -> None:
    """The peer takes ordered pairs: the mean is that of unordered ones. With references it takes
    rows of the embeddings by their indices (2.9): no example.
    """
    x, y = batch
    peer = pml.losses.ThresholdConsistentMarginLoss(
        lambda_plus=0.7, lambda_minus=1.3, margin_plus=0.8, margin_minus=0.2
    )
    assert_same(
        lambda x: F.tcm_loss(x, y, m_pos=0.8, m_neg=0.2, lam_pos=0.7, lam_neg=1.3),
        lambda x: peer(x, y),
        x,
    )


@pytest.mark.parametrize("margin", [0.5, 2.0])  # of the second some targets are beyond pi - m
def test_arcface_is_that_of_the_peer(pml, batch, margin) -> None:
    x, y = batch
    peer = pml.losses.ArcFaceLoss(10, 8, margin=math.degrees(margin), scale=16)
    ours = nn.ArcFaceLoss(10, 8, margin=margin, scale=16.0, dtype=torch.float64)
    _same_layers(ours, peer, x, y)


def test_cosface_is_that_of_the_peer(pml, batch) -> None:
    x, y = batch
    peer = pml.losses.CosFaceLoss(10, 8, margin=0.35, scale=16)
    _same_layers(nn.CosFaceLoss(10, 8, scale=16.0, dtype=torch.float64), peer, x, y)


def _same_layers(ours, peer, x, y) -> None:
    peer.W.data = ours.linear_weight.data.t().clone()
    assert_same(lambda x: ours(x, y), lambda x: peer(x, y), x)
    for layer in (ours, peer):
        layer(x, y).backward()
    torch.testing.assert_close(ours.linear_weight.grad, peer.W.grad.t(), rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------------------------------
# Limits and edges


def test_arcface_at_the_target_itself() -> None:
    """Where the angle is 0, or pi, the derivative of the sine is infinite: no NaN comes of it."""
    w = torch.eye(3, requires_grad=True)
    x = torch.stack([torch.eye(3)[0], -torch.eye(3)[1]]).requires_grad_()
    loss = F.arcface_loss(x, w, torch.tensor([0, 1]), reduction="none", scale=1.0)
    loss.sum().backward()
    assert x.grad.isfinite().all() and w.grad.isfinite().all()
    plain = (f(x, w, torch.tensor([0, 1]), margin=0.0) for f in (F.arcface_loss, F.cosface_loss))
    torch.testing.assert_close(*plain)


@pytest.mark.parametrize("loss", [F.arcface_loss, F.cosface_loss])
def test_more_classes_than_a_byte_counts(loss) -> None:
    x, w, y = torch.randn(3, 4), torch.randn(300, 4), torch.tensor([5, 100, 255])
    assert torch.equal(loss(x, w, y.to(torch.uint8)), loss(x, w, y))


def test_labels_of_a_byte_name_prototypes_beyond_it() -> None:
    x, p, y = torch.randn(3, 4), torch.randn(256, 4), torch.tensor([5, 100, 255])
    assert torch.equal(F.proto_triplet_loss(x, y.to(torch.uint8), p), F.proto_triplet_loss(x, y, p))


def test_equal_embeddings_give_no_nan() -> None:
    x = torch.ones(6, 3, requires_grad=True)
    y = torch.arange(6) // 2
    for loss in (F.contrastive_pair_loss, F.triplet_margin_loss, F.icnn_loss, F.tcm_loss):
        (g,) = torch.autograd.grad(loss(x, y), x)
        assert g.isfinite().all(), loss.__name__


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]], ids=["no positives", "one class"])
def test_no_triplets_no_loss(labels) -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor(labels)
    for mining in (*MININGS, "batch_hard"):
        loss = F.triplet_margin_loss(x, y, mining=mining)
        assert loss == 0 and not torch.autograd.grad(loss, x)[0].any(), mining
    loss = F.icnn_loss(x, y)
    assert loss == 0 and not torch.autograd.grad(loss, x)[0].any()


def test_equal_distances_without_a_margin_are_mined_but_have_no_loss() -> None:
    """Of the anchor 0: positives at 1 and 2, negatives at 1 and 1.5."""
    x, y = torch.tensor([[0.0], [1.0], [2.0], [-1.0], [1.5]]), torch.tensor([0, 0, 0, 1, 2])
    anchor = dict(ref_emb=x[1:], ref_labels=y[1:], margin=0.0, normalize=False)
    for mining, average, expected in (
        ("all", "active", (1 + 0.5) / 2), ("all", "all", 1.5 / 4),
        ("hard", "active", (1 + 0.5) / 2), ("hard", "all", 1.5 / 3),
        ("semihard", "active", 0.0), ("semihard", "all", 0.0),
    ):  # fmt: skip
        loss = F.triplet_margin_loss(x[:1], y[:1], mining=mining, average=average, **anchor)
        assert loss == expected, (mining, average)


def test_references_that_are_the_embeddings_leave_out_each_itself() -> None:
    x, y = torch.randn(8, 3), torch.arange(8) // 2
    for loss, options in (
        (F.tcm_loss, dict(m_pos=2.0)),
        (F.contrastive_pair_loss, dict(average="all")),
        (F.multi_similarity_loss, {}),
    ):
        alone = loss(x, y, **options)
        assert loss(x, y, ref_emb=x, ref_labels=y, **options) == alone
        assert loss(x, y, ref_emb=x.clone(), ref_labels=y, **options) != alone
    assert F.icnn_score(x, y, x, y) == F.icnn_score(x, y)


def test_proto_triplet_is_the_triplet_loss_of_torch() -> None:
    q, p, y = torch.randn(9, 4), torch.randn(2, 4), torch.arange(9) % 2
    expected = torch.nn.functional.triplet_margin_loss(q, p[y], p[1 - y], margin=0.5, eps=0.0)
    torch.testing.assert_close(F.proto_triplet_loss(q, y, p), expected, rtol=0, atol=1e-5)
    assert F.proto_triplet_loss(p, torch.arange(2), p, margin=0.0) == 0


def test_icnn_tells_separated_classes_from_shuffled_ones() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(50) // 10
    x = 10 * torch.randn(5, 8, generator=g)[y] + 0.1 * torch.randn(50, 8, generator=g)
    assert F.icnn_score(x, y) > 0.9
    assert F.icnn_score(x, y[torch.randperm(50, generator=g)]) < 0.6


def test_icnn_of_a_query_set_keeps_the_nearest() -> None:
    """The authors drop it, as if it were the query itself."""
    t, z = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 0, 1, 1])
    x, y = torch.tensor([[0.1], [10.1]]), torch.tensor([0, 1])
    assert F.icnn_score(x, y, t, z, k=1) > F.icnn_score(x, 1 - y, t, z, k=1) + 0.5


def test_half_embeddings_meet_what_is_kept_in_float32_under_autocast() -> None:
    """Directions of classes, memories, prototypes: as where a network gives half types."""
    x, kept, y = torch.randn(6, 4).bfloat16(), torch.randn(6, 4), torch.arange(6) // 2
    for call in (
        nn.ArcFaceLoss(3, 4), nn.CosFaceLoss(3, 4),
        lambda x, y: F.proto_triplet_loss(x, y, kept),
        lambda x, y: F.icnn_loss(x, y, kept, y),
        lambda x, y: F.tcm_loss(x, y, m_neg=-1.0, ref_emb=kept, ref_labels=y),
        lambda x, y: metrics.alignment(x, kept),
        lambda x, y: metrics.penalty_entropy(x, kept),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, ValueError), match="must be torch.bfloat16"):
            call(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(x, y)
        assert found.dtype == torch.float32 and torch.equal(found, call(x.float(), y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_without_data(dtype) -> None:
    x = torch.empty(6, 4, device="meta", dtype=dtype, requires_grad=True)
    y = torch.empty(6, device="meta", dtype=torch.long)
    for loss in (
        F.tcm_loss(x, y), F.contrastive_pair_loss(x, y), F.triplet_margin_loss(x, y),
        F.triplet_margin_loss(x, y, mining="batch_hard"), F.multi_similarity_loss(x, y),
        F.icnn_loss(x, y), F.proto_triplet_loss(x, y, F.prototypes(x, y, 3)),
        F.arcface_loss(x, x, y), F.cosface_loss(x, x, y), F.groco_loss([x, x], topk_neg=3),
    ):  # fmt: skip
        assert loss.is_meta and loss.shape == () and loss.dtype == dtype
        assert torch.autograd.grad(loss, x)[0].shape == x.shape
    for metric in (metrics.uniformity(x), metrics.tolerance(x, y), metrics.penalty_entropy(x)):
        assert metric.is_meta and metric.dtype == torch.float32


def test_label_smoothing_is_checked_when_made() -> None:
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        nn.ArcFaceLoss(3, 4, label_smoothing=2.0)


# --------------------------------------------------------------------------------------------------
# What the losses reach


@pytest.mark.parametrize(("loss", "noise"), [("icnn", 0.6), ("proto", 2.0)])
def test_few_steps_learn_an_episode(loss, noise) -> None:
    """Five classes, of which 12 of 16 features say nothing: a linear map finds those that do."""
    g = torch.Generator().manual_seed(3)
    y = torch.arange(5).repeat_interleave(8)
    signal = torch.randn(5, 4, generator=g)[y] + 0.3 * torch.randn(40, 4, generator=g)
    x = torch.cat([signal, noise * torch.randn(40, 12, generator=g)], 1)
    w = (0.3 * torch.randn(16, 8, generator=g)).requires_grad_()

    def accuracy() -> float:
        p = F.prototypes(x @ w, y, 5)
        return (torch.cdist(x @ w, p).argmin(1) == y).float().mean().item()

    before, optimiser = accuracy(), torch.optim.Adam([w], lr=0.03)
    for _ in range(200):
        z = x @ w
        if loss == "icnn":
            found = F.icnn_loss(z, y)
        else:
            found = F.proto_triplet_loss(z, y, F.prototypes(z, y, 5))
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
    assert before < 0.8 and accuracy() == 1.0


def test_tcm_lowers_opis() -> None:
    """Six classes of unequal spread, 60 steps of TCM alone, as in the paper's ablation."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat_interleave(40)
    spread = torch.linspace(0.05, 0.4, 6)[y].unsqueeze(1)
    x = normalize(torch.randn(6, 16, generator=g), dim=1)[y]
    x = (x + spread * torch.randn(240, 16, generator=g)).requires_grad_()
    before, optimiser = metrics.opis(x, y), torch.optim.SGD([x], lr=20.0)
    for _ in range(60):
        optimiser.zero_grad()
        F.tcm_loss(x, y).backward()
        optimiser.step()
    assert metrics.opis(x, y) < 0.3 * before
