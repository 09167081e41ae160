"""What torch.profiler and autograd call the ops: names that a person can look up."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import pyloss
from pyloss import functional as F
from pyloss.ops import _registry

ROOT = Path(__file__).resolve().parents[1]
X, Y, W = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), torch.randn(6, 6)
OFFSETS = torch.tensor([0, 1, 4])


def _attention(x, **options):
    return pyloss.tensor_attention(*[x[None, None] / 8] * 5, **options)


# Of x and weight: the node of autograd, and the ops inside, forward before backward
CALLS = {
    "_RowSoftmax": (
        lambda x, w: pyloss.focal_loss(x, Y, reduction="none"),
        "row_softmax_fwd row_softmax_bwd",
    ),
    "_SmallRowSoftmax": (lambda x, w: pyloss.fused_cross_entropy(x, Y), "scale_"),
    "_RowStats": (
        lambda x, w: F.row_softmax_stats(x, Y).lse,
        "row_softmax_fwd row_softmax_bwd",
    ),
    "_Aldr": (lambda x, w: pyloss.aldr_loss(x, Y), "aldr_fwd scale_"),
    "_MarginShift": (
        lambda x, w: F.margin_shift(x, x.flip(1), Y),
        "margin_shift_fwd margin_shift_bwd",
    ),
    "_RowMoments": (lambda x, w: F.spherical_z_loss(x, Y), "row_moments_fwd row_moments_bwd"),
    "_LinearCrossEntropy": (
        lambda x, w: pyloss.token_logprobs(x, w, Y),
        "linear_cross_entropy_fwd linear_cross_entropy_bwd",
    ),
    "_LinearDistillation": (
        lambda x, w: F.linear_distillation_loss(x, w, X, W, reduction="none"),
        "linear_distillation",
    ),
    "_SimilarityLoss": (
        lambda x, w: pyloss.info_nce(x, x.flip(1)),
        "similarity_loss_fwd similarity_loss_bwd",
    ),
    "_SimilaritySoftmax": (
        lambda x, w: pyloss.info_nce(x, w[:4], queue=W),
        "similarity_softmax_fwd similarity_softmax_bwd",
    ),
    "_SimilarityHardest": (
        lambda x, w: F.hard_info_nce(x, w[:4]),
        "similarity_hardest similarity_hardest_bwd",
    ),
    "_SortingNetworkSort": (
        lambda x, w: pyloss.soft_sort(x),
        "sorting_network_sort sorting_network_sort_bwd",
    ),
    "_SortingNetworkApply": (
        lambda x, w: pyloss.soft_rank(x),
        "sorting_network_apply sorting_network_apply_bwd",
    ),
    "_SortingNetworkPermutation": (
        lambda x, w: pyloss.soft_permutation(x),
        "sorting_network_permutation sorting_network_permutation_bwd",
    ),
    "_Permutahedron": (
        lambda x, w: F.permutahedron_sort(x),
        "permutahedron_fwd permutahedron_bwd",
    ),
    "_TensorAttention": (
        lambda x, w: _attention(x),
        "tensor_attention_fwd tensor_attention_bwd",
    ),
    "_TensorAttentionLowRank": (
        lambda x, w: _attention(x, method="lowrank", degree=2),
        "tensor_attention_lowrank_fwd tensor_attention_lowrank_bwd",
    ),
    "_BettiLoss": (
        lambda x, w: pyloss.betti_matching_loss(x.sigmoid()[None, None], (X > 0).to(X)[None, None]),
        "betti_loss_fused",
    ),
    "_SegmentFold": (lambda x, w: F.segment_reduce(x, OFFSETS), "segment_fold segment_map"),
    "_SegmentSoftmax": (lambda x, w: F.segment_softmax(x, OFFSETS), "segment_fold segment_map"),
    "_FramePca": (
        lambda x, w: F.pca_frames(x.view(4, 3, 2))[0],
        "frame_pca_fwd frame_pca_bwd",
    ),
}


@pytest.mark.parametrize("node", CALLS)
def test_a_profile_shows_node_and_ops(node: str) -> None:
    function, ops = CALLS[node]
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function(x, w).square().sum().backward()
    names = {event.key for event in found.key_averages()}
    assert {node, f"{node}Backward"} <= names
    assert {n for n in names if n.startswith("pyloss::")} == {f"pyloss::{op}" for op in ops.split()}


def test_every_family_is_among_them() -> None:
    """What begins with none of these names is a metric, or stands in docs/export.md by itself."""
    pyloss.ops.load_all()
    shown = " ".join(ops for _, ops in CALLS.values()).split()
    families = {re.sub(r"_(fwd|bwd)$", "", name) for name in shown}
    rest = {n for n in _registry.plain_forms if not n.startswith(tuple(families))}
    assert rest == {
        "betti_matching", "betti_matching_dense", "persistence_pairs", "lion_k_", "similarity_topk",
        "similarity_counts", "similarity_sums_fwd", "similarity_sums_bwd", "sorting_network_loss",
    }  # fmt: skip
    page = (ROOT / "docs/export.md").read_text()
    named = set(re.findall(r"pyloss::(\w+)", page))
    assert named <= set(_registry.plain_forms)
    assert all(f"`{node}`" in page for node in CALLS)


def test_nodes_of_autograd_have_names_of_their_own() -> None:
    pattern = re.compile(r"^class (\w+)\(torch\.autograd\.Function\):", re.M)
    names = [n for p in (ROOT / "pyloss").rglob("*.py") for n in pattern.findall(p.read_text())]
    assert len(names) > 30
    assert [name for name, count in Counter(names).items() if count > 1] == []
