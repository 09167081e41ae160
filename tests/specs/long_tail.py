"""Long-tailed classes: the references are the papers' formulas."""

from __future__ import annotations

import math

import torch

import pyloss
from pyloss.functional import (
    class_balanced_weight,
    logit_adjusted_cross_entropy,
    logit_adjustment,
)
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Sample, Spec

COUNTS = (100.0, 3.0, 0.0, 1.0)


def counts(**options) -> Sample:
    return Sample(dict(counts=torch.tensor(COUNTS, dtype=F64)), options)


def weight(counts, beta=0.999, normalize=True):
    found = []
    for n in counts.tolist():
        terms = sum(beta**i for i in range(int(max(n, 1))))  # the effective number
        found.append(1 / terms)
    total = sum(found)
    return torch.tensor([w * len(found) / total if normalize else w for w in found], dtype=F64)


def adjustment(counts, tau=1.0):
    there = [max(n, 1.0) for n in counts.tolist()]
    return torch.tensor([tau * math.log(n / sum(there)) for n in there], dtype=F64)


def loss(input, target, counts, adjustment_tau=1.0, reduction="mean"):
    pi = counts.clamp(min=1)
    pi = pi / pi.sum()
    x = input.movedim(1, -1)
    own = x.gather(-1, target.unsqueeze(-1))
    ratio = (pi / pi[target].unsqueeze(-1)) ** adjustment_tau
    each = torch.log((ratio * torch.exp(x - own)).sum(-1))
    return each if reduction == "none" else getattr(each, reduction)()


def logits(*shape: int, **options) -> Sample:
    input = make_logits(shape, F64, scale=1.5)
    target = torch.arange(math.prod(shape) // 4).view(shape[:1] + shape[2:]) % 4
    return Sample(dict(input=input, target=target, **counts().inputs), options)


SPECS = (
    Spec(
        function=class_balanced_weight,
        samples={
            "effective": lambda: counts(beta=0.9),
            "plain": lambda: counts(beta=0.0, normalize=False),
            "inverse": lambda: counts(beta=1.0, normalize=False),
            "default": counts,
        },
        reference=weight,
        dtypes=(F64, F32),
        autocast={},
        vmap=("counts",),
        nan={"counts": "any"},
        errors=(
            Bad(TypeError, "counts must be a Tensor or numbers, got str", dict(counts="12")),
            Bad(TypeError, "counts must hold numbers, got torch.bool",
                dict(counts=torch.ones(3, dtype=torch.bool))),
            Bad(ValueError, r"counts must be \(C,\), one of each class, got \[2, 3\]",
                dict(counts=torch.ones(2, 3))),
            Bad(ValueError, "counts must be >= 0, got -1", dict(counts=[1, -1])),
            Bad(ValueError, r"beta must be in \[0, 1\], got 1.5", dict(beta=1.5)),
            Bad(ValueError, "beta must be finite and >= 0, got -1", dict(beta=-1)),
            Bad(TypeError, "normalize must be a bool", dict(normalize="sum")),
        ),
    ),
    Spec(
        function=logit_adjustment,
        samples={"shares": counts, "half": lambda: counts(tau=0.5)},
        reference=adjustment,
        dtypes=(F64, F32),
        autocast={},
        vmap=("counts",),
        nan={"counts": "any"},
        errors=(
            Bad(ValueError, "tau must be finite and >= 0, got -1", dict(tau=-1)),
            Bad(ValueError, r"counts must be \(C,\), one of each class, got \[0\]",
                dict(counts=[])),
        ),
    ),
    Spec(
        function=logit_adjusted_cross_entropy,
        covers=(pyloss.nn.LogitAdjustedCrossEntropyLoss,),
        samples={
            "mean": lambda: logits(5, 4),
            "pixels": lambda: logits(2, 4, 3, adjustment_tau=1.5, reduction="none"),
        },
        reference=loss,
        gradients=("input",),
        wide=("counts",),
        vmap=("input",),
        nan={"input": "all"},
        large=lambda: logits(400, 4),
        errors=(
            Bad(ValueError, "counts must be of 4 classes, got 3", dict(counts=[1, 2, 3])),
            Bad(ValueError, "inplace is not for adjusted logits", dict(inplace=True)),
            Bad(ValueError, "tau must be finite and >= 0, got -1", dict(adjustment_tau=-1)),
            Bad(TypeError, "input must be a Tensor, got list", dict(input=[1.0])),
            Bad(IndexError, "Target 4 is out of bounds", dict(target=torch.full((5,), 4))),
        ),
    ),
)  # fmt: skip
