"""Neural collapse: the loss of free features, and metrics, whose references go by loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyloss.functional import ufm_loss
from pyloss.metrics import cdnv, equiangle, equinorm, nc1, nc2, nc3, nc4
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

LABELS = torch.tensor([0, 2, 0, 2, -7, 3, 3, 3])  # no sample of class 1, one that is left out


def rows(count: int, dim: int, seed: int = 0) -> Tensor:
    return make_logits((count, dim), F64, scale=1.0, seed=seed)


# --------------------------------------------------------------------------------------------------
# The loss


def loss_of(weights, features, target, hidden=None, bias=None, **options):
    layers = weights if hidden is None else [hidden, weights]
    return ufm_loss(layers, features, target, bias=bias, **options)


def loss_by_hand(
    weights, features, target, hidden=None, bias=None, *, lam_w, lam_h, loss="mse"
) -> Tensor:
    layers = [w for w in (hidden, weights) if w is not None]
    decay = lam_w if isinstance(lam_w, list) else [lam_w] * len(layers)
    total = sum(d / 2 * (w**2).sum() for d, w in zip(decay, layers))
    total = total + lam_h / 2 * (features**2).sum()
    for h, k in zip(features, target.tolist()):
        for w in layers:
            h = torch.stack([row @ h for row in w])
        z = h if bias is None else h + bias
        if loss == "ce":
            each = torch.logsumexp(z, 0) - z[k]
        else:
            each = sum((x - float(j == k)) ** 2 for j, x in enumerate(z)) / 2
        total = total + each / len(features)
    return total


def free(deep=False, bias=False, **options) -> Sample:
    inputs = dict(weights=rows(3, 4), features=rows(5, 4, seed=1), target=torch.arange(5) % 3)
    inputs["hidden"] = rows(4, 4, seed=2) if deep else None
    inputs["bias"] = rows(1, 3, seed=3)[0] if bias else None
    return Sample(inputs, dict(lam_w=0.3, lam_h=0.2) | options)


def no_samples() -> Sample:
    given = free(lam_w=0.0, lam_h=0.0)  # which would have a gradient
    nothing = dict(features=rows(0, 4), target=torch.arange(0))
    return Sample({**given.inputs, **nothing}, given.options)


# --------------------------------------------------------------------------------------------------
# Metrics, by loops


def groups(features, labels, num_classes, ignored) -> list[Tensor]:
    """The samples of each class that has any."""
    found = ([h for h, y in zip(features, labels.tolist()) if y == k] for k in range(num_classes))
    return [torch.stack(g) for g in found if g]


def nc1_reference(features, labels, num_classes, *, kind="pinv", ignore_index=-100):
    classes = groups(features, labels, num_classes, ignore_index)
    every, dim = torch.cat(classes), features.shape[1]
    within, between = (torch.zeros(dim, dim, dtype=F64) for _ in range(2))
    for g in classes:
        off = g.mean(0) - every.mean(0)
        between = between + torch.outer(off, off) / len(classes)
        for h in g:
            within = within + torch.outer(h - g.mean(0), h - g.mean(0)) / len(every)
    if kind == "trace":
        return within.trace() / between.trace()
    return (within @ torch.linalg.pinv(between, rtol=1e-8)).trace() / len(classes)


def cdnv_reference(features, labels, num_classes, *, reduction="mean", ignore_index=-100):
    names = [k for k in range(num_classes) if (labels == k).any()]
    found = torch.full((num_classes, num_classes), math.nan, dtype=F64)
    for i in names:
        for j in names:
            a, b = features[labels == i], features[labels == j]
            spread = a.var(0, correction=0).sum() + b.var(0, correction=0).sum()
            if i != j:
                found[i, j] = spread / (2 * (a.mean(0) - b.mean(0)).square().sum())
    return found if reduction == "none" else found.nanmean()


def goal(target, classes) -> Tensor:
    if isinstance(target, Tensor):
        return torch.diag(target) if target.dim() == 1 else target
    eye = torch.eye(classes, dtype=F64)
    return eye - 1 / classes if target == "etf" else eye


def off(gram: Tensor, target) -> Tensor:
    wanted = goal(target, len(gram))
    return (gram / (gram**2).sum().sqrt() - wanted / (wanted**2).sum().sqrt()).norm()


def nc2_reference(vectors, target="etf", *, center=None):
    x = vectors if center is None else vectors - center
    return off(torch.stack([torch.stack([a @ b for b in x]) for a in x]), target)


def nc3_reference(weight, means, target="etf", *, center=None):
    x = means if center is None else means - center
    return off(torch.stack([torch.stack([a @ b for b in x]) for a in weight]), target)


def nc4_reference(logits, features, means):
    wrong = [z.argmax() != torch.stack([(h - m).norm() for m in means]).argmin()
             for z, h in zip(logits, features)]  # fmt: skip
    return torch.stack(wrong).double().mean()


def equinorm_reference(vectors, *, center=None):
    length = torch.stack([v.norm() for v in (vectors if center is None else vectors - center)])
    return length.std(correction=0) / length.mean()


def equiangle_reference(vectors, target="etf", *, center=None):
    x = vectors if center is None else vectors - center
    want = -1 / (len(x) - 1) if target == "etf" else 0.0
    each = [a @ b / (a.norm() * b.norm()) - want
            for i, a in enumerate(x) for j, b in enumerate(x) if i != j]  # fmt: skip
    return torch.stack(each).abs().max()


def labelled(**options) -> Sample:
    inputs = dict(features=rows(8, 5), labels=LABELS)
    return Sample(inputs, dict(num_classes=4, ignore_index=-7) | options)


def none_labelled(**options) -> Sample:
    given = labelled(**options).inputs
    return Sample(
        dict(features=given["features"][:0], labels=LABELS[:0]), dict(num_classes=4, **options)
    )


def vectors(target=None, center=False, **options) -> Sample:
    options |= {} if target is None else dict(target=target)
    inputs = dict(vectors=rows(4, 6))
    return Sample(inputs, options | (dict(center=rows(1, 6, seed=1)[0]) if center else {}))


def aligned(center=False, **options) -> Sample:
    inputs = dict(weight=rows(4, 6), means=rows(4, 6) + 0.3 * rows(4, 6, seed=1))
    return Sample(inputs, options | (dict(center=rows(1, 6, seed=2)[0]) if center else {}))


def compared(count: int = 6) -> Sample:
    features, means = rows(count, 3), rows(4, 3, seed=1)
    logits = rows(count, 4, seed=2)
    return Sample(dict(logits=logits, features=features, means=means))


def metric(function, reference, **fields) -> Spec:
    shared = dict(function=function, reference=reference, result="wide", threads=False)
    # Compiled in all tests: nc1, which has all that the others are made of.
    shared["exhaustive"] = () if function is nc1 else ("compiled",)
    return Spec(**shared | fields)


X = rows(8, 5)
BAD_SAMPLES = (
    Bad(TypeError, "features must be a Tensor, got list", dict(features=[1.0])),
    Bad(TypeError, "features must be floating, got torch.int64", dict(features=X.long())),
    Bad(ValueError, r"features must be \(N, D\), got \[8\]", dict(features=X[:, 0])),
    Bad(TypeError, "labels must hold integers, got torch.float64", dict(labels=X[:, 0])),
    Bad(ValueError, r"labels must have the shape \[8\], got \[7\]", dict(labels=LABELS[:7])),
    Bad(RuntimeError, "same device, but labels is on meta", dict(labels=LABELS.to("meta"))),
    Bad(IndexError, "label 3 is out of range for 3 classes", dict(num_classes=3)),
    Bad(IndexError, "label -7 is out of range for 4 classes", dict(ignore_index=-8)),
    Bad(ValueError, "num_classes must be >= 1, got 0", dict(num_classes=0)),
    Bad(TypeError, "ignore_index must be an integer", dict(ignore_index=0.5)),
)
BAD_VECTORS = (
    Bad(TypeError, "vectors must be floating", dict(vectors=X.long())),
    Bad(ValueError, r"vectors must be \(N, D\), got \[8\]", dict(vectors=X[:, 0])),
    Bad(ValueError, "vectors must hold at least 1 rows", dict(vectors=X[:0])),
    Bad(ValueError, r"center must have the shape \[6\], got \[5\]", dict(center=X[0])),
    Bad(TypeError, "center must be a Tensor, got float", dict(center=0.0)),
)
BAD_TARGET = (
    Bad(ValueError, "target must be one of etf, of, got 'gof'", dict(target="gof")),
    Bad(ValueError, r"target must be 'etf', 'of', or of shape \[4\] or \[4, 4\], got \[3\]",
        dict(target=torch.ones(3))),
    Bad(TypeError, "target must be a Tensor, got NoneType", dict(target=None)),
)  # fmt: skip
LENGTHS = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=F64)
W = rows(3, 4)

SPECS = (
    Spec(
        function=loss_of,
        name="ufm_loss",
        covers=(ufm_loss,),
        samples={
            "plain": free,
            "deep": lambda: free(deep=True, bias=True, lam_w=[0.3, 0.1]),
            "cross entropy": lambda: free(bias=True, loss="ce"),
        },
        reference=loss_by_hand,
        gradients=("weights", "features", "hidden", "bias"),
        empty={"no samples": Empty(no_samples, math.nan)},
        nan={"weights": "all", "features": "all"},
        vmap=("features",),
        threads=False,  # torch's sums
        compile_samples=("deep",),
        errors=(
            Bad(TypeError, "weights must be a Tensor, got float", dict(weights=[1.0])),
            Bad(ValueError, "weights must hold at least one layer, got none", dict(weights=[])),
            Bad(ValueError, r"weights must be \(out, 4\) there, got \[3, 5\]",
                dict(weights=rows(3, 5))),
            Bad(ValueError, r"weights must be \(out, 3\) there, got \[3, 4\]",
                dict(hidden=W, weights=W)),
            Bad(TypeError, "features must be floating", dict(features=X.long())),
            Bad(ValueError, r"target must have the shape \[5\], got \[8\]", dict(target=LABELS)),
            Bad(IndexError, "Target 3 is out of bounds", dict(target=torch.full((5,), 3))),
            Bad(ValueError, r"bias must have the shape \[3\], got \[8\]", dict(bias=X[:, 0])),
            Bad(ValueError, "lam_w must be finite and >= 0, got -1", dict(lam_w=-1)),
            Bad(ValueError, r"lam_w must be a number or one for each of 1 layers, got \[1, 2\]",
                dict(lam_w=[1, 2])),
            Bad(TypeError, "lam_w must be a number, got str", dict(lam_w=["0.1"])),
            Bad(ValueError, "lam_h must be finite and >= 0", dict(lam_h=math.inf)),
            Bad(ValueError, "loss must be one of mse, ce, got 'mae'", dict(loss="mae")),
        ),
    ),
    metric(
        nc1, nc1_reference,
        samples={"pinv": labelled, "trace": lambda: labelled(kind="trace")},
        empty={
            "no samples": Empty(none_labelled, math.nan),
            "one class": Empty(lambda: labelled().replace(dict(labels=0 * LABELS)), math.nan),
        },
        nan={"features": "all"},
        tolerances={F32: (1e-5, 1e-6)},
        errors=(*BAD_SAMPLES, Bad(ValueError, "kind must be one of pinv, trace", dict(kind="x"))),
    ),
    metric(
        cdnv, cdnv_reference,
        samples={"mean": labelled, "none": lambda: labelled(reduction="none")},
        rounded=False,  # compared without a look at NaN
        empty={"no samples": Empty(none_labelled, math.nan)},
        nan={"features": "all"},
        errors=(*BAD_SAMPLES, Bad(ValueError, "sum is not a valid", dict(reduction="sum"))),
    ),
    metric(
        nc2, nc2_reference,
        samples={
            "etf": vectors,
            "of": lambda: vectors("of", center=True),
            "gof": lambda: vectors(LENGTHS),
            "matrix": lambda: vectors(torch.diag(LENGTHS) + 0.1),
        },
        empty={"no features": Empty(lambda: vectors().map(lambda _, t: t[:, :0]), math.nan)},
        nan={"vectors": "all"},
        errors=(*BAD_VECTORS, *BAD_TARGET),
    ),
    metric(
        nc3, nc3_reference,
        samples={
            "etf": aligned,
            "of": lambda: aligned(target="of", center=True),
            "gof": lambda: aligned(target=LENGTHS),
        },
        empty={"no features": Empty(lambda: aligned().map(lambda _, t: t[:, :0]), math.nan)},
        nan={"weight": "all", "means": "all"},
        errors=(
            Bad(ValueError, r"means must have the shape of weight, \[4, 6\], got \[8, 5\]",
                dict(means=X)),
            *BAD_TARGET,
        ),
    ),
    metric(
        nc4, nc4_reference,
        samples={"plain": compared},
        dtypes=(F64, F32),  # rounding would change which one is nearest
        empty={"no samples": Empty(lambda: compared(0), math.nan)},
        nan={"logits": "all", "features": "all", "means": "all"},
        errors=(
            Bad(ValueError, r"logits must have the shape \[6, 4\], got \[8, 5\]", dict(logits=X)),
            Bad(ValueError, r"means must be \(K, 3\), got \[8, 5\]", dict(means=X)),
        ),
    ),
    metric(
        equinorm, equinorm_reference,
        samples={"plain": vectors, "center": lambda: vectors(center=True)},
        empty={"no features": Empty(lambda: vectors().map(lambda _, t: t[:, :0]), math.nan)},
        nan={"vectors": "all"},
        errors=BAD_VECTORS,
    ),
    metric(
        equiangle, equiangle_reference,
        samples={"etf": vectors, "of": lambda: vectors("of", center=True)},
        empty={
            "no features": Empty(lambda: vectors().map(lambda _, t: t[:, :0]), math.nan),
            "one vector": Empty(lambda: vectors().map(lambda _, t: t[:1]), math.nan),
        },
        nan={"vectors": "all"},
        errors=(*BAD_VECTORS, BAD_TARGET[0]),
    ),
)  # fmt: skip
