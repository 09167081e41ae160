"""Group ordering: the reference forms P, and writes the loss as the paper's two cross entropies."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import pyloss
from pyloss.functional import groco_from_scores, groco_loss
from pyloss.reference import sorting_network_permutation
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec


def scores_reference(
    pos, neg, *, steepness=1.0, network="odd_even", distribution="cauchy", art_lambda=0.25,
    reduction="mean",
):  # fmt: skip
    """Mean of the cross entropies of both blocks' masses, as the authors' code has it."""
    lead = torch.broadcast_shapes(pos.shape[:-1], neg.shape[:-1])
    neg, pos = (t.expand(*lead, t.shape[-1]).sort(-1).values for t in (neg, pos))
    s, k = torch.cat([neg, pos], -1), neg.shape[-1]
    if isinstance(steepness, Tensor):
        steepness = steepness.unsqueeze(-1)
    _, p = sorting_network_permutation(s, network, distribution, steepness, art_lambda)
    truth = (torch.arange(s.shape[-1]) >= k).to(p.dtype).expand(s.shape)
    high, low = p[..., k:].sum(-1).clamp(0, 1), p[..., :k].sum(-1).clamp(0, 1)
    each = F.binary_cross_entropy(high, truth, reduction="none")
    each = each + F.binary_cross_entropy(low, 1 - truth, reduction="none")
    each = each.mean(-1) / 2
    return each if reduction == "none" else getattr(each, reduction)()


def views_reference(views, *, n_pos=None, topk_neg=10, stop_grad=True, reduction="mean", **options):
    views = [v / v.norm(dim=-1, keepdim=True).clamp(min=1e-8) for v in views]
    fixed = [v.detach() for v in views] if stop_grad else views
    n_pos, each = n_pos or len(views), []
    for a, anchor in enumerate(views):
        pos = torch.stack([(anchor * fixed[p]).sum(-1) for p in range(n_pos) if p != a], -1)
        near = anchor @ fixed[a].mT
        near = near.masked_fill(torch.eye(len(anchor), dtype=torch.bool), -math.inf)
        neg = near.topk(topk_neg, -1).values
        each.append(scores_reference(pos, neg, reduction="none", **options))
    each = torch.stack(each)
    return each if reduction == "none" else getattr(each, reduction)()


def scores(pos=(2, 2), neg=(2, 4), **options) -> Sample:
    pos, neg = make_logits(pos, F64, scale=0.3), make_logits(neg, F64, scale=0.3, seed=3)
    return Sample(dict(pos=pos, neg=neg), options)


def views(*shape: int, **options) -> Sample:
    shape = shape or (2, 5, 3)
    return Sample(dict(views=make_logits(shape, F64)), dict(topk_neg=3) | options)


def several(**options) -> Sample:
    z = make_logits((3, 6, 4), F64)
    return Sample(dict(views=tuple(z)), dict(topk_neg=2) | options)


S, V = scores().inputs, views().inputs["views"]
NETWORK_ERRORS = (
    Bad(ValueError, "network must be one of auto", dict(network="bubble")),
    Bad(ValueError, "distribution must be one of", dict(distribution="normal")),
    Bad(ValueError, "steepness must be positive", dict(steepness=0)),
    Bad(ValueError, "art_lambda must be in", dict(art_lambda=1.0)),
    Bad(ValueError, "reduction must be one of none", dict(reduction="avg")),
)

SPECS = (
    Spec(
        function=groco_from_scores,
        samples={
            "plain": scores,
            "one each": lambda: scores((3, 1), (3, 1), reduction="none"),
            "shared negatives": lambda: scores((2, 1, 2), (3, 4), reduction="sum"),
            "logistic": lambda: scores(distribution="logistic", network="batcher", steepness=3.0),
            "one item": lambda: scores((3,), (5,), network="bitonic"),
        },
        reference=scores_reference,
        gradients=("pos", "neg"),
        empty={"no rows": Empty(lambda: scores((0, 2), (0, 3)), math.nan)},
        vmap=("pos", "neg"),
        nan={"pos": "any", "neg": "any"},
        large=lambda: scores((3000, 3), (3000, 20)),
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            *NETWORK_ERRORS,
            Bad(TypeError, "pos must be a Tensor, got list", dict(pos=[1.0])),
            Bad(TypeError, "neg must be float.*int64", dict(neg=S["neg"].long())),
            Bad(ValueError, "pos must have at least one dimension", dict(pos=S["pos"][0, 0])),
            Bad(ValueError, r"neg must hold at least one score, got \[2, 0\]",
                dict(neg=S["neg"][:, :0])),
            Bad(ValueError, r"leading shape \[3\] of neg does not broadcast with \[2\] of pos",
                dict(neg=torch.zeros(3, 4))),
            Bad(ValueError, "neg is on meta, pos on cpu", dict(neg=S["neg"].to("meta"))),
        ),
    ),
    Spec(
        function=groco_loss,
        samples={
            "plain": views,
            "several, crops": lambda: several(n_pos=2, reduction="none"),
            "several": lambda: several(network="auto", steepness=2.0, reduction="sum"),
            "gradient of both": lambda: views(stop_grad=False, distribution="logistic"),
        },
        # With stop_grad the gradient is not that of the value.
        derivative_samples=("gradient of both",),
        reference=views_reference,
        gradients=("views",),
        # Two cosines of 0, which may come in either order.
        empty={"no features": Empty(lambda: views(2, 2, 0, topk_neg=1), math.log(2))},
        vmap=("views",),
        nan={"views": "any"},
        large=lambda: views(2, 700, 16, topk_neg=10),
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            *NETWORK_ERRORS,
            Bad(TypeError, "views must be a Tensor or a sequence of them, got int", dict(views=3)),
            Bad(TypeError, r"views must be float.*int64", dict(views=V.long())),
            Bad(ValueError, r"views must be \(V, B, D\).*got \[5, 3\]", dict(views=V[0])),
            Bad(ValueError, r"views\[1\] must be \(B, D\), got \[3\]", dict(views=[V[0], V[1, 0]])),
            Bad(ValueError, r"alike, but views\[1\] is torch.float32",
                dict(views=[V[0], V[1].float()])),
            Bad(ValueError, "at least two", dict(views=V[:1])),
            Bad(ValueError, "topk_neg must be below the number of images, 5, got 5",
                dict(topk_neg=5)),
            Bad(ValueError, "topk_neg must be at least 1, got 0", dict(topk_neg=0)),
            Bad(TypeError, "topk_neg must be an integer, got float", dict(topk_neg=1.0)),
            Bad(ValueError, "n_pos must be at most 2.*got 3", dict(n_pos=3)),
            Bad(ValueError, "n_pos must be at least 2", dict(n_pos=1)),
        ),
        module=pyloss.nn.GroCoLoss,
        same_signature=True,
    ),
)  # fmt: skip
