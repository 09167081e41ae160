"""Metric learning: losses and metrics of embeddings; the references go pair by pair."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import (
    arcface_loss,
    contrastive_pair_loss,
    cosface_loss,
    icnn_loss,
    icnn_score,
    multi_similarity_loss,
    proto_triplet_loss,
    prototypes,
    tcm_loss,
    triplet_margin_loss,
)
from pyloss.metrics import alignment, opis, penalty_entropy, tolerance, uniformity
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

LABELS = torch.tensor([4, -1, 4, 7, -1, 4])


def embeddings(rows: int = 6, dim: int = 3, seed: int = 0) -> Tensor:
    return make_logits((rows, dim), F64, scale=1.0, seed=seed)


def unit(x: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1) if normalize else x


# --------------------------------------------------------------------------------------------------
# Metrics


def uniformity_reference(embeddings, t=2.0, *, normalize=True):
    x = unit(embeddings, normalize)
    each = [(-t * ((a - b) ** 2).sum()).exp() for a, b in itertools.combinations(x, 2)]
    return torch.stack(each).mean().log()


def tolerance_reference(embeddings, labels, *, normalize=True, over="same_class"):
    rows = list(zip(unit(embeddings, normalize), labels.tolist()))
    both = list(itertools.combinations(rows, 2))
    same = [a @ b for (a, y), (b, z) in both if y == z]
    return sum(same) / len(same if over == "same_class" else both)


def alignment_reference(x, y, alpha=2.0, *, normalize=True, reduction="mean"):
    each = [(a - b).norm() ** alpha for a, b in zip(unit(x, normalize), unit(y, normalize))]
    return reduced(torch.stack(each), reduction)


def entropy_reference(queries, keys=None, *, temperature=0.07, normalize=True, reduction="mean"):
    q, k = (unit(x, normalize) for x in (queries, queries if keys is None else keys))
    found = []
    for i in range(len(q)):
        others = torch.stack([q[i] @ k[j] for j in range(len(k)) if j != i])
        found.append(torch.distributions.Categorical(logits=others / temperature).entropy())
    return reduced(torch.stack(found), reduction)


def opis_reference(embeddings, labels, *, far=(0.01, 0.1), num_thresholds=101, thresholds=None,
                   epsilon=0.1, normalize=True, return_curves=False):  # fmt: skip
    x, y = unit(embeddings, normalize), labels.tolist()
    within, across, negative = {}, {}, []
    for (a, i), (b, j) in itertools.combinations(list(zip(x, y)), 2):
        d = (a - b).norm()
        if i == j:
            within.setdefault(i, []).append(d)
        else:
            negative.append(d)
            across.setdefault(i, []).append(d)
            across.setdefault(j, []).append(d)
    if thresholds is None:
        low, high = (sorted(negative)[math.ceil(f * len(negative)) - 1] for f in far)
        steps = range(num_thresholds)
        thresholds = torch.stack([low + (high - low) * k / (num_thresholds - 1) for k in steps])
    classes = sorted(within)
    near = torch.stack([(torch.stack(within[c]) <= thresholds[:, None]).double().mean(1)
                        for c in classes])  # fmt: skip
    far = torch.stack([(torch.stack(across[c]) > thresholds[:, None]).double().mean(1)
                       for c in classes])  # fmt: skip
    utility = torch.nan_to_num(2 * near * far / (near + far))
    score, some = utility.var(0, correction=0).mean(), math.ceil(epsilon * len(classes))
    if not return_curves:
        return score
    ordered = utility.sort(0, descending=True).values
    gap = (ordered[:some].mean(0) - ordered[-some:].mean(0)).square().mean()
    sizes = torch.tensor([y.count(c) for c in classes])
    skipped = torch.tensor(len(set(y)) - len(classes))
    return score, gap, thresholds, utility, near, far, torch.tensor(classes), sizes, skipped


def reduced(each: Tensor, reduction: str) -> Tensor:
    return {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]


def alone(**options) -> Sample:
    return Sample(dict(embeddings=embeddings()), options)


def labelled(**options) -> Sample:
    return Sample(dict(embeddings=embeddings(), labels=LABELS), options)


# Not at the distances of any pair, where a rounding would decide.
THRESHOLDS = torch.tensor([0.31, 0.77, 1.05, 1.63], dtype=F64)


def sorted_by_opis(**options) -> Sample:
    return labelled(thresholds=THRESHOLDS, **options)


def pair(**options) -> Sample:
    return Sample(dict(x=embeddings(), y=embeddings(seed=1)), options)


def views(keys=True, **options) -> Sample:
    return Sample(dict(queries=embeddings(), keys=embeddings(seed=1) if keys else None), options)


X = embeddings()
BAD_X = (
    Bad(TypeError, "embeddings must be a Tensor, got list", dict(embeddings=[1.0])),
    Bad(TypeError, "embeddings must be floating, got torch.int64", dict(embeddings=X.long())),
    Bad(ValueError, r"embeddings must be \(N, D\), got \[6\]", dict(embeddings=X[:, 0])),
    Bad(TypeError, "embeddings must be a dense", dict(embeddings=X.to_sparse())),
)
BAD_LABELS = (
    Bad(TypeError, "labels must be a Tensor, got list", dict(labels=[1])),
    Bad(TypeError, "labels must hold integers, got torch.float64", dict(labels=X[:, 0])),
    Bad(ValueError, r"labels must have the shape \[6\], got \[5\]", dict(labels=LABELS[:5])),
    Bad(RuntimeError, "same device, but labels is on meta", dict(labels=LABELS.to("meta"))),
)
BAD_REDUCTION = Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg"))
BAD_NORMALIZE = Bad(TypeError, "normalize must be a bool", dict(normalize="l2"))


def metric(function, reference, **fields) -> Spec:
    return Spec(**dict(function=function, reference=reference, result="wide") | fields)


METRICS = (
    metric(
        uniformity, uniformity_reference,
        samples={
            "plain": alone,
            "far": lambda: alone(t=60.0),
            "raw": lambda: alone(normalize=False),
        },
        empty={"no features": Empty(lambda: alone().map(lambda _, t: t[:, :0]), 0.0)},
        nan={"embeddings": "all"},
        errors=(
            *BAD_X, BAD_NORMALIZE,
            Bad(ValueError, "embeddings must hold at least 2 rows", dict(embeddings=X[:1])),
            Bad(ValueError, "t must be finite and > 0, got 0", dict(t=0.0)),
            Bad(ValueError, "max_pairs must be at least 1, got 0", dict(max_pairs=0)),
            Bad(TypeError, "max_pairs must be an integer", dict(max_pairs=2.5)),
        ),
    ),
    metric(
        tolerance, tolerance_reference,
        samples={"plain": labelled, "all": lambda: labelled(over="all", normalize=False)},
        empty={
            "no rows": Empty(lambda: labelled().each(lambda _, t: t[:0]), math.nan),
            "no pair": Empty(lambda: labelled().each(lambda _, t: t[1:4]), math.nan),
        },
        nan={"embeddings": "all"},
        errors=(
            *BAD_X, *BAD_LABELS, BAD_NORMALIZE,
            Bad(ValueError, "over must be one of same_class, all", dict(over="class")),
        ),
    ),
    metric(
        alignment, alignment_reference,
        samples={
            "plain": pair,
            "none": lambda: pair(alpha=1.0, reduction="none"),
            "raw": lambda: pair(normalize=False, reduction="sum"),
        },
        empty={"no rows": Empty(lambda: pair().map(lambda _, t: t[:0]), math.nan)},
        nan={"x": "all", "y": "all"},
        vmap=("x", "y"),
        errors=(
            Bad(TypeError, "x must be floating", dict(x=X.long())),
            Bad(ValueError, r"y must be torch.float32 of the shape \[6, 3\] of x, got "
                r"torch.float32 \[5, 3\]", dict(y=X[:5].float())),
            Bad(RuntimeError, "same device, but y is on meta", dict(y=X.float().to("meta"))),
            Bad(ValueError, "alpha must be finite and > 0", dict(alpha=-1.0)),
            BAD_REDUCTION, BAD_NORMALIZE,
        ),
    ),
    metric(
        penalty_entropy, entropy_reference,
        samples={
            "plain": lambda: views(temperature=0.5),
            "alone": lambda: views(keys=False, temperature=0.5, reduction="none"),
            "raw": lambda: views(normalize=False, temperature=2.0, reduction="sum"),
        },
        empty={"no features": Empty(
            lambda: views(reduction="sum").map(lambda _, t: t[:2, :0]), 0.0)},
        nan={"queries": "all", "keys": "all"},
        errors=(
            Bad(TypeError, "queries must be floating", dict(queries=X.long())),
            Bad(ValueError, "queries must hold at least 2 rows", dict(queries=X[:1])),
            Bad(ValueError, r"keys must be torch.float32 of the shape \[6, 3\] of queries, got "
                r"torch.float64", dict(keys=X)),
            Bad(RuntimeError, "same device, but keys is on meta", dict(keys=X.float().to("meta"))),
            Bad(ValueError, "temperature must be finite and > 0", dict(temperature=0.0)),
            BAD_REDUCTION, BAD_NORMALIZE,
        ),
    ),    metric(
        opis, opis_reference,
        samples={
            "plain": sorted_by_opis,
            "curves": lambda: sorted_by_opis(return_curves=True, epsilon=0.5),
            "raw": lambda: sorted_by_opis(normalize=False),
        },
        empty={
            "no rows": Empty(lambda: labelled().each(lambda _, t: t[:0]), 0.0),
            "no pair": Empty(lambda: labelled().each(lambda _, t: t[1:4]), 0.0),
            "one class": Empty(lambda: labelled().replace(dict(labels=0 * LABELS)), 0.0),
        },
        wide=("thresholds",),
        compile="data-dependent|unique_consecutive",  # the number of classes
        nan={"embeddings": "all"},
        errors=(
            *BAD_X, *BAD_LABELS, BAD_NORMALIZE,
            Bad(ValueError, r"far must be 0 < low < high <= 1, got \(0.2, 0.1\)",
                dict(far=(0.2, 0.1))),
            Bad(ValueError, "far must be two shares, got 0.1", dict(far=0.1)),
            Bad(TypeError, "far must be a number, got str", dict(far=("low", 0.1))),
            Bad(ValueError, "num_thresholds must be at least 2, got 1", dict(num_thresholds=1)),
            Bad(TypeError, "bounds_samples must be an integer", dict(bounds_samples=1e6)),
            Bad(TypeError, "thresholds must be a Tensor, got list", dict(thresholds=[0.1])),
            Bad(ValueError, r"thresholds must be \(T,\), got \[0\]", dict(thresholds=X[0, :0])),
            Bad(RuntimeError, "same device, but thresholds", dict(thresholds=X[0].to("meta"))),
            Bad(ValueError, "epsilon must be finite and > 0", dict(epsilon=0.0)),
            Bad(ValueError, "epsilon must be at most 1, got 2", dict(epsilon=2)),
        ),
    ),
)  # fmt: skip

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
# Episodes


def prototypes_reference(support, labels, num_classes):
    rows = range(len(labels))
    return torch.stack([
        torch.stack([support[i] for i in rows if labels[i] == c]).mean(0)
        for c in range(num_classes)
    ])  # fmt: skip


def shifted(x: Tensor, y: Tensor) -> Tensor:
    return (((x - y) ** 2).sum() + 1e-6).sqrt()


def proto_reference(queries, query_labels, prototypes, margin=0.5, *, reduction="mean"):
    each = []
    for q, y in zip(queries, query_labels.tolist()):
        d = [shifted(q, p) for p in prototypes]
        each.append((d[y] - min(d[:y] + d[y + 1 :]) + margin).relu())
    return reduced(torch.stack(each), reduction)


def score_reference(embeddings, labels, targets=None, target_labels=None, *, k=4, neighbours=None,
                    use_omega=False):  # fmt: skip
    own = targets is None
    t, z = (embeddings, labels) if own else (targets, target_labels)
    many = k + 2 >= len(t)
    neighbours, k = neighbours or k + 1, len(t) - 2 if many else k
    table = []
    for i in range(len(embeddings)):
        row = [(shifted(embeddings[i], t[j]), bool(labels[i] == z[j]))
               for j in range(len(t)) if not (own and i == j)]  # fmt: skip
        table.append(sorted(row, key=lambda pair: pair[0])[: max(neighbours, k)])
    largest = max([d for row in table for d, same in row[:k] if not same], default=0.0)
    zero = embeddings.sum() * 0
    within, across, all_r, all_q, hits = [], [], [], [], 0
    for row in table:
        m = min([d for d, same in row if not same], default=math.inf)
        r = [d / (m + 1e-7) for d, _ in row[:k]]
        r = [v / max(max(r), 1.0) for v in r]
        mine = [v for v, (_, same) in zip(r, row) if same]
        theirs = [d / (largest + 1e-7) for d, same in row[:k] if not same]
        hits += len(mine)
        all_r += mine
        all_q += theirs
        within += [sum(mine) / len(mine)] if mine else []
        across += [sum(theirs) / len(theirs)] if theirs else []
    lam_s = 1 - sum(within, zero) / len(within) if within else zero
    lam_d = sum(across, zero) / len(across) if across else zero + 1
    gamma = zero + (1 if many else hits / (k * len(table)))
    terms = [(lam_s + lam_d) / 2, gamma]
    if use_omega:
        terms.append(1 - sum(torch.stack(v).var(correction=0) for v in (all_r, all_q)))
    return sum(terms) / len(terms)


def icnn_reference(*args, **options):
    return -score_reference(*args, **options).log()


CLASSES = torch.tensor([2, 0, 1, 2, 2, 0])
POINTS = torch.tensor([0, 1, 0, 1, 1, 2, 0, 2, 1])


def support(**options) -> Sample:
    # An option, so that no layout is tried in which all labels are one: a class would be missing.
    return Sample(dict(support=embeddings()), dict(labels=CLASSES, num_classes=3) | options)


def queries(**options) -> Sample:
    inputs = dict(queries=embeddings(), query_labels=CLASSES, prototypes=embeddings(3, seed=1))
    return Sample(inputs, options)


def episode(given=False, **options) -> Sample:
    inputs = dict(embeddings=embeddings(9), labels=POINTS, targets=None, target_labels=None)
    if given:
        inputs |= dict(targets=embeddings(7, seed=1), target_labels=POINTS[:7])
    return Sample(inputs, options)


def icnn(function, reference, module, empty: dict, **fields) -> Spec:
    return Spec(
        function=function,
        reference=reference,
        module=module,
        same_signature=module is not None,
        samples={
            "plain": episode,
            "few": lambda: episode(k=2, use_omega=True),
            "targets": lambda: episode(given=True, k=3, neighbours=5),
            "all": lambda: episode(k=8),
        },
        gradients=("embeddings", "targets"),
        empty={
            "no rows": Empty(lambda: episode(given=True).replace(
                dict(embeddings=embeddings(0), labels=POINTS[:0])), math.nan),
            "one class": Empty(lambda: episode().replace(dict(labels=0 * POINTS)), empty["class"]),
            **fields.pop("more", {}),
        },
        # What is mapped over takes its neighbours by torch's gather, as one alone does.
        vmap=("embeddings",),
        nan={"embeddings": "all"},
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            *BAD_X,
            Bad(TypeError, "labels must hold integers", dict(labels=embeddings(9)[:, 0])),
            Bad(ValueError, r"labels must have the shape \[9\], got \[6\]", dict(labels=LABELS)),
            Bad(ValueError, "give both targets and target_labels", dict(targets=X)),
            Bad(ValueError, "targets must be torch.float32 with 3 features as embeddings",
                dict(targets=X, target_labels=LABELS)),
            Bad(ValueError, r"target_labels must have the shape \[6\], got \[5\]",
                dict(targets=X.float(), target_labels=LABELS[:5])),
            Bad(ValueError, r"targets must hold at least 3 rows, got \[2, 3\]",
                dict(targets=X[:2].float(), target_labels=LABELS[:2])),
            Bad(ValueError, r"embeddings must hold at least 3 rows, got \[2, 3\]",
                dict(embeddings=X[:2], labels=LABELS[:2])),
            Bad(ValueError, "k must be at least 1, got 0", dict(k=0)),
            Bad(TypeError, "k must be an integer, got float", dict(k=2.0)),
            Bad(ValueError, "neighbours must be at least k = 4, got 3", dict(neighbours=3)),
            Bad(TypeError, "use_omega must be a bool", dict(use_omega=1.0)),
        ),
        **fields,
    )  # fmt: skip


EPISODES = (
    Spec(
        function=prototypes,
        reference=prototypes_reference,
        samples={"plain": support},
        gradients=("support",),
        autocast={},
        empty={"no features": Empty(lambda: support().map(lambda _, t: t[:, :0]), 0.0, (3, 0))},
        vmap=("support",),
        nan={"support": lambda found, clean: bool(found[:, 0].isnan().all())
             and torch.equal(found[:, 1:], clean[:, 1:])},
        errors=(
            Bad(TypeError, "support must be floating", dict(support=LABELS)),
            Bad(TypeError, "labels must hold integers", dict(labels=X[:, 0])),
            Bad(ValueError, r"labels must have the shape \[6\], got \[5\]",
                dict(labels=LABELS[:5])),
            Bad(IndexError, r"labels must be in \[0, 1\], got 2", dict(num_classes=2)),
            Bad(ValueError, "labels must name every class, but class 3", dict(num_classes=5)),
            Bad(ValueError, "num_classes must be at least 1", dict(num_classes=0)),
            Bad(TypeError, "num_classes must be an integer", dict(num_classes=3.0)),
        ),
    ),
    Spec(
        function=proto_triplet_loss,
        reference=proto_reference,
        module=pyloss.nn.ProtoTripletLoss,
        same_signature=True,
        samples={
            "plain": queries,
            "margin": lambda: queries(margin=1.5, reduction="none"),
            "sum": lambda: queries(margin=0.0, reduction="sum"),
        },
        gradients=("queries", "prototypes"),
        empty={"no queries": Empty(lambda: queries().replace(
            dict(queries=embeddings(0), query_labels=CLASSES[:0])), math.nan)},
        vmap=("queries", "prototypes"),
        nan={"queries": "all", "prototypes": "any"},
        tolerances={F32: (1e-4, 1e-6)},
        errors=(
            Bad(TypeError, "queries must be floating", dict(queries=LABELS)),
            Bad(ValueError, r"query_labels must have the shape \[6\]",
                dict(query_labels=LABELS[:5])),
            Bad(IndexError, r"query_labels must be in \[0, 2\], got 3",
                dict(query_labels=CLASSES + 1)),
            Bad(ValueError, "prototypes must hold at least 2 rows", dict(prototypes=X[:1])),
            Bad(ValueError, "prototypes must be torch.float32 with 3 features as queries",
                dict(prototypes=X)),
            Bad(RuntimeError, "same device, but prototypes", dict(prototypes=X.float().to("meta"))),
            Bad(ValueError, "margin must be finite and >= 0", dict(margin=-1.0)),
            BAD_REDUCTION,
        ),
    ),
    icnn(icnn_score, score_reference, None, {"class": 1.0}),
    icnn(
        icnn_loss, icnn_reference, pyloss.nn.ICNNLoss, {"class": 0.0},
        more={"no pair": Empty(
            lambda: episode().replace(dict(labels=torch.arange(9))), 0.0)},
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

SPECS = (*METRICS, *PAIRS, *EPISODES, *MARGINS)
