"""Losses on aggregates: the reference goes bag by bag, with probabilities as they stand."""

from __future__ import annotations

import math

import torch

import pyloss
from pyloss.aggregate import interpolated_least_squares
from pyloss.functional import aggregate_loss
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec

INDEX = torch.tensor([1, 0, 2, 1, 0, 1])  # bags of 2, 3 and 1


def members(n, bags, bag_index, bag_size, offsets):
    """The instances of each bag."""
    if bag_size is not None:
        return [range(a * bag_size, (a + 1) * bag_size) for a in range(bags)]
    if offsets is not None:
        return [range(a, b) for a, b in zip(offsets.tolist(), offsets[1:].tolist())]
    return [[i for i in range(n) if bag_index[i] == a] for a in range(bags)]


def absolute(pred, response):
    return (pred - response).abs()


def squared(p, y):
    return ((p - y) ** 2).mean()


def log_loss(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


# loss -> (prediction of a logit, loss of a prediction)
FORMULAS = {
    "mse": (lambda f: f, squared),
    "ce": (lambda f: f.exp() / f.exp().sum(), lambda p, y: -(y * p.log()).sum()),
    "bce": (lambda f: 1 / (1 + (-f).exp()), log_loss),
    absolute: (lambda f: f, lambda p, y: (p - y).abs()),
}


def reference(
    pred, bag_response, bag_index=None, *, bag_size=None, offsets=None, rho=0.5, loss="mse",
    bag_weight="equal", reduction="mean",
):  # fmt: skip
    link, of = FORMULAS[loss]
    each, sizes = [], []
    bags = members(len(pred), len(bag_response), bag_index, bag_size, offsets)
    for y, rows in zip(bag_response, bags):
        p = [link(pred[i]) for i in rows]
        sizes.append(len(p))
        mean = sum(p) / len(p)
        each.append((1 - rho) * of(mean, y) + rho * sum(of(q, y) for q in p) / len(p))
    each = torch.stack(each) if each else 0 * pred.flatten() + 0 * bag_response.flatten()
    weight = torch.tensor(sizes if bag_weight == "size" else [1] * len(sizes), dtype=pred.dtype)
    each = each * weight
    total = each.sum()
    return {"none": each, "sum": total, "mean": total / weight.sum()}[reduction]


def sample(bag_index=INDEX, rest=(), loss="mse", **options) -> Sample:
    n, m = len(bag_index), 3 if len(bag_index) else 0
    pred = make_logits((n, *rest), F64, scale=1.0)
    y = make_logits((m, *rest), F64, scale=1.0, seed=1)
    if loss == "ce":
        y = y.softmax(1)
    elif loss == "bce":
        y = y.sigmoid()
    return Sample(dict(pred=pred, bag_response=y, bag_index=bag_index), dict(loss=loss, **options))


def other_way(bag_index=None, **inputs):
    """The bags said in another way."""
    found = sample()
    return Sample({**found.inputs, "bag_index": bag_index, **inputs}, found.options)


def fit(x, bag_response, bag_index, rho):
    return interpolated_least_squares(x, bag_response, bag_index, rho=rho)


def fit_reference(x, bag_response, bag_index, rho):
    """The normal equations."""
    left = right = 0
    for y, rows in zip(bag_response, members(len(x), len(bag_response), bag_index, None, None)):
        mean = x[rows].mean(0)
        square = sum(torch.outer(x[i], x[i]) for i in rows) / len(rows)
        left = left + (1 - rho) * torch.outer(mean, mean) + rho * square
        right = right + mean[:, None] * y.reshape(1, -1)
    found = torch.linalg.solve(left, right) if len(bag_response) else 0 * x.mT
    return found.squeeze(1) if bag_response.dim() == 1 else found


def fit_sample(rho=0.4, several=False) -> Sample:
    x = make_logits((6, 2), F64, scale=1.0)
    y = make_logits((3, 2) if several else (3,), F64, scale=1.0, seed=1)
    return Sample(dict(x=x, bag_response=y), dict(bag_index=INDEX, rho=rho))


S = sample().inputs
SPECS = (
    Spec(
        function=aggregate_loss,
        module=pyloss.nn.AggregateLoss,
        reference=reference,
        samples={
            "bags of two": lambda: other_way(bag_size=2),
            "plain": sample,
            "ce, by size": lambda: sample(rest=(3,), loss="ce", bag_weight="size", rho=0.2),
            "bce": lambda: sample(rest=(2,), loss="bce", reduction="none", bag_weight="size"),
            "function": lambda: sample(loss=absolute, reduction="sum", rho=0.3),
            "offsets": lambda: other_way(offsets=torch.tensor([0, 1, 4, 6], dtype=torch.int32)),
            "bag level": lambda: sample(loss="bce", rho=0.0),
        },
        derivative_samples=("bags of two", "ce, by size"),
        gradients=("pred", "bag_response"),
        tolerances={F32: (1e-4, 1e-6)},
        empty={"no bags": Empty(lambda: sample(INDEX[:0]), math.nan)},
        vmap=("pred", "bag_response"),
        nan={"pred": "all", "bag_response": "all"},
        errors=(
            Bad(TypeError, "pred must be floating", dict(pred=INDEX)),
            Bad(
                ValueError,
                "bag_response must have a row like those of pred",
                dict(bag_response=torch.zeros(3, 2)),
            ),
            Bad(ValueError, r"pred must be \(n, C\) with loss='ce'", dict(loss="ce")),
            Bad(ValueError, "give one of bag_index, bag_size and offsets", dict(bag_size=None)),
            Bad(
                RuntimeError,
                "bag_index must be int32 or int64",
                dict(bag_size=None, bag_index=S["pred"]),
            ),
            Bad(
                ValueError,
                "a bag for each of 6 instances, got 5",
                dict(bag_size=None, bag_index=INDEX[:5]),
            ),
            Bad(
                ValueError,
                "less than the number of bags, 3",
                dict(bag_size=None, bag_index=INDEX + 1),
            ),
            Bad(
                ValueError,
                "every bag must have an instance",
                dict(bag_size=None, bag_index=INDEX.clamp(max=1)),
            ),
            Bad(ValueError, r"rho must be in \[0, 1\], got 1.5", dict(rho=1.5)),
            Bad(ValueError, "rho must be finite and >= 0", dict(rho=-0.1)),
            Bad(ValueError, "loss must be one of mse, ce, bce, or a function", dict(loss="l1")),
            Bad(
                ValueError,
                r"loss must give one number a row, \[3\], got \[\]",
                dict(loss=torch.nn.functional.l1_loss),
            ),
            Bad(ValueError, "bag_weight must be one of equal, size", dict(bag_weight="none")),
            Bad(ValueError, "avg is not a valid value", dict(reduction="avg")),
        ),
    ),
    Spec(
        function=fit,
        name="interpolated_least_squares",
        covers=(interpolated_least_squares,),
        reference=fit_reference,
        samples={"plain": fit_sample, "several": lambda: fit_sample(0.0, several=True)},
        gradients=("x", "bag_response"),
        dtypes=(F64, F32),
        autocast={},
        transforms={},
        empty={"no bags": Empty(lambda: fit_sample().each(lambda _, t: t[:0]), 0.0, (2,))},
        nan={"x": "all", "bag_response": "all"},
        threads=False,
        errors=(
            Bad(ValueError, r"x must be \(n, d\), got \[6\]", dict(x=S["pred"])),
            Bad(
                ValueError,
                r"bag_response must be \(m,\) or \(m, r\)",
                dict(bag_response=torch.zeros(3, 1, 1)),
            ),
            Bad(ValueError, r"rho must be in \[0, 1\]", dict(rho=2.0)),
        ),
    ),
)
