"""Gaussian naive Bayes: the reference has the densities as they stand."""

from __future__ import annotations

import math

import torch

import pyloss
from pyloss.testing import make_logits
from specs._spec import F32, F64, Bad, Empty, Sample, Spec, beside


def head(x, y, input, classes=3, **options):
    """log p(c | x) of a head that has seen x in two batches."""
    module = pyloss.nn.GaussianNaiveBayes(x.shape[1], classes, **options)
    module, half = beside(module, x), len(x) // 2
    return module.partial_fit(x[:half], y[:half]).partial_fit(x[half:], y[half:]).log_prob(input)


def reference(
    x, y, input, classes=3, var_smoothing=1e-9, shared_variance=True, smoothing_mode="absolute",
    prior="empirical",
):  # fmt: skip
    parts = [x[y == c].detach().double() for c in range(classes)]
    if smoothing_mode == "relative":
        var_smoothing = var_smoothing * x.detach().double().var(0, unbiased=False).max()
    variances = [p.var(0, unbiased=False) if len(p) else p.new_zeros(x.shape[1]) for p in parts]
    shared = sum(len(p) / len(x) * v for p, v in zip(parts, variances))
    found = []
    for part, variance in zip(parts, variances):
        if not len(part):
            found.append(torch.full((len(input),), -torch.inf, dtype=F64))
            continue
        there = sum(len(p) > 0 for p in parts)
        share = len(part) / len(x) if prior == "empirical" else 1 / there
        v = (shared if shared_variance else variance) + var_smoothing
        normal = torch.distributions.Normal(part.mean(0), v.sqrt())
        found.append(normal.log_prob(input.double()).sum(1) + math.log(share))
    return torch.stack(found, 1).log_softmax(1)


def sample(count: int = 12, missing: bool = False, offset: float = 0.0, **options) -> Sample:
    x, input = make_logits((count, 2), F64, scale=1.0), make_logits((4, 2), F64, scale=1.0, seed=1)
    y = torch.arange(count) % (2 if missing else 3)
    return Sample(dict(x=x + offset, y=y, input=input + offset), dict(var_smoothing=0.1) | options)


def no_queries() -> Sample:
    found = sample()
    return found.replace(dict(input=found.inputs["input"][:0]))


S = sample().inputs
SPECS = (
    Spec(
        function=head,
        name="gaussian_naive_bayes",
        covers=(pyloss.nn.GaussianNaiveBayes,),
        samples={
            "shared": sample,
            "each": lambda: sample(shared_variance=False, prior="uniform"),
            "relative": lambda: sample(smoothing_mode="relative", var_smoothing=0.3),
            "a class without samples": lambda: sample(missing=True, shared_variance=False),
        },
        derivative_samples=("shared", "each", "relative"),  # no finite differences of infinity
        reference=reference,
        gradients=("input",),
        empty={"no queries": Empty(no_queries, 0.0, (0, 3))},
        wide=("x",),
        nan={"input": "row", "x": "any"},
        large=lambda: sample(3000),
        tolerances={F32: (1e-4, 1e-5)},
        errors=(
            Bad(ValueError, r"y must have the shape \[6\], got \[3\]", dict(y=S["y"][:9])),
            Bad(TypeError, "y must hold integers, got torch.float32", dict(y=torch.ones(12))),
            Bad(IndexError, "y 3 is out of range for 3 classes", dict(y=S["y"] + 1)),
            Bad(ValueError, r"input must have 2 features, got \[4, 3\]",
                dict(input=torch.ones(4, 3))),
            Bad(ValueError, r"input must be \(N, D\), got \[2\]", dict(input=torch.ones(2))),
            Bad(ValueError, "var_smoothing must be finite and >= 0, got -1",
                dict(var_smoothing=-1)),
            Bad(ValueError, "smoothing_mode must be one of absolute, relative, got 'rel'",
                dict(smoothing_mode="rel")),
            Bad(ValueError, "prior must be one of empirical, uniform, got None", dict(prior=None)),
            Bad(TypeError, "shared_variance must be a bool", dict(shared_variance="yes")),
        ),
    ),
)  # fmt: skip
