"""Losses of metric learning; the references go pair by pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    arcface_loss,
    contrastive_pair_loss,
    cosface_loss,
    multi_similarity_loss,
    tcm_loss,
    triplet_margin_loss,
)
from specs._embeddings import (
    BAD_LABELS,
    BAD_NORMALIZE,
    BAD_REDUCTION,
    BAD_X,
    CLASSES,
    LABELS,
    X,
    embeddings,
    reduced,
    unit,
)
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

# --------------------------------------------------------------------------------------------------
# Pairs and triplets


class Pairs:
    """Distances and similarities of a labelled set, pair by pair."""

    def __init__(self, embeddings, labels, ref_emb, ref_labels, normalize=True):
        self.own = ref_emb is None
        self.x = unit(embeddings, normalize)
        self.y = self.x if self.own else unit(ref_emb, normalize)
        self.labels = labels.tolist()
        self.others = self.labels if self.own else ref_labels.tolist()

    def of(self, i: int, same: bool) -> list[int]:
        """What is compared with anchor i as a positive, or as a negative."""
        return [j for j in range(len(self.y)) if (self.labels[i] == self.others[j]) is same
                and not (self.own and i == j)]  # fmt: skip

    def distance(self, i: int, j: int, kind: str) -> Tensor:
        square = ((self.x[i] - self.y[j]) ** 2).sum()
        return {"euclidean": square.sqrt, "squared": lambda: square,
                "cosine": lambda: 1 - self.x[i] @ self.y[j]}[kind]()  # fmt: skip


def mean_or_zero(terms: list[Tensor], count: int, zero: Tensor) -> Tensor:
    return sum(terms, zero) / max(count, 1)


def summed(rows: list[list[Tensor]], average: str, reduction: str, zero: Tensor) -> Tensor:
    """Of the terms of each anchor."""
    if reduction == "none":
        return torch.stack([sum(row, zero) for row in rows])
    terms = [t for row in rows for t in row]
    counted = len(terms) if average == "all" else sum(bool(t > 0) for t in terms)
    return mean_or_zero(terms, counted if reduction == "mean" else 1, zero)


def tcm_reference(embeddings, labels, *, m_pos=0.9, m_neg=0.5, lam_pos=1.0, lam_neg=1.0,
                  ref_emb=None, ref_labels=None):  # fmt: skip
    p, zero = Pairs(embeddings, labels, ref_emb, ref_labels), embeddings.sum() * 0
    zero = zero if ref_emb is None else zero + ref_emb.sum() * 0
    s = {same: [p.x[i] @ p.y[j] for i in range(len(p.x)) for j in p.of(i, same)]
         for same in (True, False)}  # fmt: skip
    low = [m_pos - v for v in s[True] if v <= m_pos]
    high = [v - m_neg for v in s[False] if v >= m_neg]
    return lam_pos * mean_or_zero(low, len(low), zero) + lam_neg * mean_or_zero(
        high, len(high), zero
    )


def contrastive_reference(embeddings, labels, *, pos_margin=0.0, neg_margin=1.0,
                          distance="euclidean", normalize=True, average="active",
                          reduction="mean", ref_emb=None, ref_labels=None):  # fmt: skip
    p, zero = Pairs(embeddings, labels, ref_emb, ref_labels, normalize), embeddings.sum() * 0
    anchors = range(len(p.x))
    near = [[(p.distance(i, j, distance) - pos_margin).relu() for j in p.of(i, True)]
            for i in anchors]  # fmt: skip
    far = [[(neg_margin - p.distance(i, j, distance)).relu() for j in p.of(i, False)]
           for i in anchors]  # fmt: skip
    return sum(summed(rows, average, reduction, zero) for rows in (near, far))


def triplet_reference(embeddings, labels, *, margin=0.05, mining="all", distance="euclidean",
                      normalize=True, average="active", reduction="mean", ref_emb=None,
                      ref_labels=None):  # fmt: skip
    p, zero = Pairs(embeddings, labels, ref_emb, ref_labels, normalize), embeddings.sum() * 0
    rows = []
    for i in range(len(p.x)):
        near = [p.distance(i, j, distance) for j in p.of(i, True)]
        far = [p.distance(i, j, distance) for j in p.of(i, False)]
        if mining == "batch_hard":
            near, far = sorted(near)[-1:], sorted(far)[:1]
        kept = [(a, b) for a in near for b in far if
                {"hard": b <= a, "semihard": a < b < a + margin}.get(mining, True)]  # fmt: skip
        rows.append([(a - b + margin).relu() for a, b in kept])
    return summed(rows, average, reduction, zero)


def multi_similarity_reference(embeddings, labels, *, alpha=2.0, beta=50.0, base=0.5, epsilon=None,
                               reduction="mean", ref_emb=None, ref_labels=None):  # fmt: skip
    p = Pairs(embeddings, labels, ref_emb, ref_labels)
    rows = []
    for i in range(len(p.x)):
        near, far = ([p.x[i] @ p.y[j] for j in p.of(i, same)] for same in (True, False))
        if epsilon is not None:
            least, most = min(near, default=math.inf), max(far, default=-math.inf)
            near = [s for s in near if s - epsilon < most]
            far = [s for s in far if s + epsilon > least]
        one = embeddings.sum() * 0 + 1
        a = torch.log(sum([torch.exp(-alpha * (s - base)) for s in near], one)) / alpha
        b = torch.log(sum([torch.exp(beta * (s - base)) for s in far], one)) / beta
        rows.append(a + b)
    return reduced(torch.stack(rows), reduction)


REF_LABELS = torch.tensor([7, 4, -1, 4, 4])


def labelled_pair(ref=False, **options) -> Sample:
    inputs = dict(embeddings=embeddings(), labels=LABELS, ref_emb=None, ref_labels=None)
    if ref:
        inputs |= dict(ref_emb=embeddings(5, seed=1), ref_labels=REF_LABELS)
    return Sample(inputs, options)


def cut(sample: Sample, rows: slice) -> Sample:
    return sample.each(lambda _, t: t[rows])


BAD_REF = (
    Bad(ValueError, "give both ref_emb and ref_labels", dict(ref_emb=X)),
    Bad(TypeError, "ref_emb must be a Tensor", dict(ref_emb=[1.0], ref_labels=LABELS)),
    Bad(ValueError, r"ref_emb must be torch.float32 \(M, 3\) as embeddings, got torch.float32 "
        r"\[6, 2\]", dict(ref_emb=X[:, :2].float(), ref_labels=LABELS)),
    Bad(ValueError, r"ref_labels must have the shape \[6\], got \[5\]",
        dict(ref_emb=X.float(), ref_labels=LABELS[:5])),
    Bad(RuntimeError, "same device, but ref_emb is on meta",
        dict(ref_emb=X.float().to("meta"), ref_labels=LABELS)),
)  # fmt: skip
BAD_DISTANCE = (
    Bad(ValueError, "distance must be one of euclidean, squared, cosine, got 'l1'",
        dict(distance="l1")),
    Bad(ValueError, "average must be one of active, all, got 'some'", dict(average="some")),
    BAD_NORMALIZE, BAD_REDUCTION,
)  # fmt: skip


def pair_loss(function, reference, module, **fields) -> Spec:
    return Spec(
        **dict(
            function=function,
            reference=reference,
            module=module,
            same_signature=True,
            gradients=("embeddings", "ref_emb"),
            empty={
                "no rows": Empty(lambda: cut(labelled_pair(), slice(0)), 0.0),
                # One of each class, and of each side: no positive.
                "no references": Empty(
                    lambda: labelled_pair(ref=True).replace(
                        dict(ref_emb=embeddings(0), ref_labels=REF_LABELS[:0])
                    ),
                    0.0,
                ),
                "one row": Empty(lambda: cut(labelled_pair(), slice(1)), 0.0),
            },
            vmap=("embeddings",),
            nan={"embeddings": "all"},
            tolerances={F32: (1e-4, 1e-6)},
        )
        | fields
    )


PAIRS = (
    pair_loss(
        tcm_loss, tcm_reference, pyloss.nn.ThresholdConsistentMarginLoss,
        samples={
            "plain": lambda: labelled_pair(m_neg=-0.2),
            "references": lambda: labelled_pair(ref=True, lam_pos=0.5, lam_neg=2.0, m_pos=0.3),
            "nothing": lambda: labelled_pair(m_pos=-1.5, m_neg=1.5),
        },
        errors=(
            *BAD_X, *BAD_LABELS, *BAD_REF,
            Bad(TypeError, "m_pos must be a number, got str", dict(m_pos="0.9")),
            Bad(ValueError, "lam_neg must be finite and >= 0, got -1", dict(lam_neg=-1.0)),
        ),
    ),
    pair_loss(
        contrastive_pair_loss, contrastive_reference, pyloss.nn.ContrastivePairLoss,
        samples={
            "plain": labelled_pair,
            "references": lambda: labelled_pair(ref=True, distance="squared", reduction="none"),
            "raw": lambda: labelled_pair(
                normalize=False, pos_margin=0.25, neg_margin=1.5, average="all"),
            "cosine": lambda: labelled_pair(distance="cosine", reduction="sum"),
        },
        errors=(
            *BAD_X, *BAD_LABELS, *BAD_REF, *BAD_DISTANCE,
            Bad(ValueError, "pos_margin must be finite and >= 0", dict(pos_margin=-1.0)),
            Bad(TypeError, "neg_margin must be a number", dict(neg_margin=None)),
        ),
    ),
    pair_loss(
        triplet_margin_loss, triplet_reference, pyloss.nn.TripletMarginLoss,
        samples={
            "plain": lambda: labelled_pair(margin=0.4),
            "hard": lambda: labelled_pair(mining="hard", distance="squared", reduction="none"),
            "semihard": lambda: labelled_pair(mining="semihard", margin=1.0, normalize=False),
            "batch_hard": lambda: labelled_pair(mining="batch_hard", margin=0.5, average="all"),
            "references": lambda: labelled_pair(ref=True, margin=0.3, average="all"),
            "cosine": lambda: labelled_pair(margin=1.0, distance="cosine", reduction="sum"),
        },
        errors=(
            *BAD_X, *BAD_LABELS, *BAD_REF, *BAD_DISTANCE,
            Bad(ValueError, "margin must be finite and >= 0, got -0.5", dict(margin=-0.5)),
            Bad(ValueError, "mining must be one of all, hard, semihard, batch_hard, got 'easy'",
                dict(mining="easy")),
        ),
    ),
    pair_loss(
        multi_similarity_loss, multi_similarity_reference, pyloss.nn.MultiSimilarityLoss,
        samples={
            "plain": lambda: labelled_pair(beta=8.0),
            "mined": lambda: labelled_pair(beta=8.0, epsilon=0.1, base=0.25, reduction="none"),
            "references": lambda: labelled_pair(ref=True, beta=4.0, alpha=1.5, reduction="sum"),
        },
        errors=(
            *BAD_X, *BAD_LABELS, *BAD_REF, BAD_REDUCTION,
            Bad(ValueError, "alpha must be finite and > 0", dict(alpha=0.0)),
            Bad(ValueError, "beta must be finite and > 0", dict(beta=-1.0)),
            Bad(TypeError, "base must be a number", dict(base="0.5")),
            Bad(ValueError, "epsilon must be finite and >= 0", dict(epsilon=-0.1)),
        ),
    ),
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Margins of the softmax


def margin_reference(harder):
    def reference(input, linear_weight, target, *, margin, scale, **options):
        cosines = unit(input, True) @ unit(linear_weight, True).mT
        rows = []
        for row, y in zip(cosines, target.tolist()):
            rows.append(torch.stack(
                [harder(c, margin) if j == y else c for j, c in enumerate(row)]))  # fmt: skip
        return torch.nn.functional.cross_entropy(scale * torch.stack(rows), target, **options)

    return reference


def arc(c, m):
    angle = torch.acos(c)
    return torch.cos(angle + m) if angle <= math.pi - m else c - m * math.sin(m)


def directions(margin=0.5, **options) -> Sample:
    inputs = dict(input=embeddings(), linear_weight=embeddings(4, seed=1), target=CLASSES)
    return Sample(inputs, dict(margin=margin, scale=4.0) | options)


def build_directions(spec: Spec, sample: Sample):
    inputs = dict(sample.inputs)
    w = inputs.pop("linear_weight")
    module = spec.module(*w.shape, dtype=w.dtype, **sample.options)
    with torch.no_grad():
        module.linear_weight.copy_(w)
    return module, inputs


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 1.5], dtype=F64)


def direction_spec(function, harder, module, *errors, **samples) -> Spec:
    return Spec(
        function=function,
        reference=margin_reference(harder),
        module=module,
        build=build_directions,
        parameters={"linear_weight": "linear_weight"},
        samples={
            "plain": directions,
            "options": lambda: directions(
                weight=WEIGHT, ignore_index=2, label_smoothing=0.125, reduction="sum"
            ),
            **samples,
        },
        gradients=("input", "linear_weight"),
        wide=("weight",),
        empty={"no rows": Empty(lambda: directions().each(
            lambda name, t: t if name == "linear_weight" else t[:0]), math.nan)},
        vmap=("input", "linear_weight"),
        nan={"input": "all", "linear_weight": "all"},
        tolerances={F32: (1e-4, 1e-5)},
        errors=(
            Bad(TypeError, "input must be floating", dict(input=LABELS)),
            Bad(RuntimeError, r"linear_weight must be torch.float32 \(C, 3\) as input",
                dict(linear_weight=X)),
            Bad(RuntimeError, r"input must be 2-D, got \[6\]", dict(input=X[:, 0])),
            Bad(RuntimeError, r"target must have the shape \[6\], got \[5\]",
                dict(target=CLASSES[:5])),
            Bad(RuntimeError, "expected target dtype to be Long", dict(target=X[:, 0])),
            Bad(RuntimeError, "same device, but target is on meta",
                dict(target=CLASSES.to("meta"))),
            Bad(IndexError, "Target 4 is out of bounds", dict(target=CLASSES + 2)),
            Bad(TypeError, "weight must be a Tensor, got list", dict(weight=[1.0] * 4)),
            Bad(ValueError, "margin must be finite and >= 0", dict(margin=-0.5)),
            Bad(ValueError, "scale must be finite and > 0", dict(scale=0.0)),
            BAD_REDUCTION, *errors,
        ),
    )  # fmt: skip


MARGINS = (
    direction_spec(
        arcface_loss, arc, pyloss.nn.ArcFaceLoss,
        Bad(ValueError, "margin must be an angle of at most pi, got 3.5", dict(margin=3.5)),
        beyond=lambda: directions(margin=2.0, reduction="none"),
    ),
    direction_spec(cosface_loss, lambda c, m: c - m, pyloss.nn.CosFaceLoss),
)  # fmt: skip

SPECS = (*PAIRS, *MARGINS)
