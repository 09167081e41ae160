"""Metrics of embeddings; the references go pair by pair."""

from __future__ import annotations

import itertools
import math

import torch

from pyloss.metrics import alignment, opis, penalty_entropy, tolerance, uniformity
from specs._embeddings import (
    BAD_LABELS,
    BAD_NORMALIZE,
    BAD_REDUCTION,
    BAD_X,
    LABELS,
    X,
    embeddings,
    reduced,
    unit,
)
from specs._spec import F64, Bad, Empty, Sample, Spec


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


def metric(function, reference, **fields) -> Spec:
    return Spec(**dict(function=function, reference=reference, result="wide") | fields)


SPECS = (
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
    ),
    metric(
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
