"""Soft rank and sort by projection onto the permutahedron."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from pyloss.functional import permutahedron_rank, permutahedron_sort
from pyloss.reference import permutahedron_projection
from pyloss.testing import make_logits
from specs._spec import F64, Bad, Empty, Sample, Spec

X = torch.zeros(2, 3)


def reference(
    values, regularization="l2", regularization_strength=1.0, *, rank, dim=-1, descending=False
) -> Tensor:
    x = values.movedim(dim, -1)
    x = -x if descending else x
    rows = permutahedron_projection(
        x.reshape(-1, x.shape[-1]),
        rank=rank,
        regularization=regularization,
        strength=regularization_strength,
    )
    rows = -rows if descending and not rank else rows
    return rows.view(x.shape).movedim(-1, dim)


def sample(*shape: int, **options) -> Sample:
    return Sample(dict(values=make_logits(shape, F64, scale=1.0)), options)


def spec(function, rank: bool) -> Spec:
    return Spec(
        function=function,
        samples={
            "l2": lambda: sample(3, 6, regularization="l2", regularization_strength=0.2),
            "l2 pooled": lambda: sample(3, 6, regularization_strength=2.0),
            "kl": lambda: sample(3, 6, regularization="kl", regularization_strength=0.2),
            "kl pooled": lambda: sample(3, 6, regularization="kl", regularization_strength=2.0),
            "dim": lambda: sample(2, 5, 2, dim=1, descending=True),
            "one row": lambda: sample(5),
        },
        reference=partial(reference, rank=rank),
        gradients=("values",),
        thorough=True,
        empty={
            "no rows": Empty(lambda: sample(0, 5), 0.0, (0, 5)),
            "no rows along another dim": Empty(lambda: sample(0, 7, 2, dim=1), 0.0, (0, 7, 2)),
        },
        compile_samples=("dim", "kl"),
        vmap=("values",),
        nan={"values": "row"},
        large=lambda: sample(300, 60, regularization_strength=0.7),
        errors=(
            Bad(TypeError, "values must be a Tensor, got list", dict(values=[1.0])),
            Bad(TypeError, "floating, got torch.int64", dict(values=X.long())),
            Bad(TypeError, "floating, got torch.complex64", dict(values=X.cfloat())),
            Bad(ValueError, "0-d", dict(values=X[0, 0])),
            Bad(ValueError, "'l2' or 'kl', got 'l1'", dict(regularization="l1")),
            Bad(TypeError, "regularization_strength.* got Tensor",
                dict(regularization_strength=torch.tensor(1.0))),
            *(Bad(ValueError, "regularization_strength", dict(regularization_strength=bad))
              for bad in (0, -1.0, math.nan, math.inf)),
            Bad(IndexError, r"dim must be in \[-2, 1\].* got 2", dict(dim=2)),
            Bad(ValueError, r"empty along dim 0, got \[0, 3\]", dict(values=X[:0], dim=0)),
        ),
    )  # fmt: skip


SPECS = (spec(permutahedron_rank, True), spec(permutahedron_sort, False))
