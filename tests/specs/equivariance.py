"""Soft symmetries: the penalty of linear layers, and the error of a function."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import functional_call

from pyloss.functional import equivariance_error
from pyloss.regularizers import EquivarianceRegularizer, SymmetryType
from pyloss.testing import make_logits
from specs._spec import BF16, F32, F64, Bad, Empty, Sample, Spec, beside

IN, OUT = [(1, "scalar"), (2, "vector")], [(1, "tensor2")]
VECTOR = [(1, "vector")]
TYPES = (SymmetryType.SO(2), SymmetryType.scaling(2))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_logits(shape, F64, scale=1.0, seed=seed)


# --------------------------------------------------------------------------------------------------
# The penalty, of a layer's weight and bias


class Holder(nn.Module):
    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(5, 4), nn.Linear(2, 2, bias=False)
        layers = [(self.layer, IN, OUT), (self.last, VECTOR, VECTOR)]
        self.penalty = EquivarianceRegularizer(
            layers, TYPES, strength=(0.5, 2.0), reduction=reduction
        )

    def forward(self):
        return self.penalty()


# Made beforehand: Dynamo makes no modules.
HOLDERS = {name: Holder(name) for name in ("sum", "none", "mean")}


def penalty(weight, bias, last, *, reduction="sum"):
    state = {"layer.weight": weight, "layer.bias": bias, "last.weight": last}
    return functional_call(beside(HOLDERS[reduction], weight), state, ())


def penalty_reference(weight, bias, last, *, reduction="sum"):
    """With the dense projectors."""
    maps = [(weight, IN, OUT), (bias[:, None], [(1, "scalar")], OUT), (last, VECTOR, VECTOR)]
    found = []
    for w, into, out in maps:
        total = 0.0
        for strength, symmetry in zip((0.5, 2.0), TYPES):
            p = symmetry.projector(into, out)
            total = total + strength * (w.flatten() - p @ w.flatten()).square().sum() / 2
        found.append(total)
    each = [found[0] + found[1], found[2]]
    each = torch.stack(each)
    return each if reduction == "none" else getattr(each, reduction)()


def layers(**options) -> Sample:
    inputs = dict(weight=normal(4, 5), bias=normal(4, seed=1), last=normal(2, 2, seed=2))
    return Sample(inputs, options)


def zeros() -> Sample:
    return layers().map(lambda _, t: torch.zeros_like(t))


# --------------------------------------------------------------------------------------------------
# The error of a map x -> x w + |x|^2 v


def error(x, rho_in, rho_out, w, **options):
    return equivariance_error(
        lambda z: z @ w.to(z.dtype) + z.square().sum(1, keepdim=True), x, rho_in, rho_out, **options
    )


def error_reference(x, rho_in, rho_out, w, reduction="mean"):
    def f(z):
        return z @ w + z.square().sum(1, keepdim=True)

    rows = []
    for into, out in zip(rho_in, rho_out):
        a, b = f(x @ into.t()), f(x) @ out.t()
        rows.append((a - b).norm(dim=1) / (a.norm(dim=1) + b.norm(dim=1)))
    each = torch.stack(rows) if rows else x.new_zeros(0, len(x))
    return each if reduction == "none" else getattr(each, reduction)()


def moved(batch: int = 3, **options) -> Sample:
    inputs = dict(x=normal(batch, 3), rho_in=normal(2, 3, 3, seed=1),
                  rho_out=normal(2, 2, 2, seed=2), w=normal(3, 2, seed=3))  # fmt: skip
    return Sample(inputs, options)


X = moved().inputs
SPECS = (
    Spec(
        function=penalty,
        name="EquivarianceRegularizer",
        covers=(EquivarianceRegularizer,),
        samples={
            "sum": layers,
            "by layer": lambda: layers(reduction="none"),
            "mean": lambda: layers(reduction="mean"),
        },
        derivative_samples=("sum",),
        reference=penalty_reference,
        gradients=("weight", "bias", "last"),
        result="wide",
        dtypes=(F64, F32, BF16),
        autocast={BF16: F32, F32: F32, F64: F64},
        vmap=("weight", "bias"),
        empty={"zeros": Empty(zeros, 0.0)},
        nan={"weight": "all", "bias": "all"},
        errors=(Bad(KeyError, "avg", dict(reduction="avg")),),
    ),
    Spec(
        function=error,
        name="equivariance_error",
        covers=(equivariance_error,),
        samples={"mean": moved, "each": lambda: moved(reduction="none")},
        reference=error_reference,
        gradients=("x", "rho_in", "rho_out", "w"),
        result="wide",
        dtypes=(F64, F32),
        autocast={F32: F32, F64: F64},
        autocast_rounds=True,  # f is the caller's, and autocast rounds its products
        vmap=("x",),
        empty={"no samples": Empty(lambda: moved(0), math.nan)},
        nan={"x": "all", "rho_in": "all", "rho_out": "all", "w": "all"},
        errors=(
            Bad(TypeError, "x must be floating, got torch.int64", dict(x=X["x"].long())),
            Bad(ValueError, r"x must be \(B, in\), got \[3\]", dict(x=X["x"][0])),
            Bad(ValueError, r"rho_in must be \(n, 3, 3\), got \[3, 3\]",
                dict(rho_in=X["rho_in"][0])),
            Bad(ValueError, r"rho_out must be \(n, 2, 2\), got \[2, 3, 3\]",
                dict(rho_out=X["rho_in"])),
            Bad(ValueError, "rho_out must have as many matrices as rho_in, 2, got 1",
                dict(rho_out=X["rho_out"][:1])),
            Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg")),
        ),
    ),
)  # fmt: skip
