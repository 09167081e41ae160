"""The penalty of environments; the reference takes the gradient of each risk by torch."""

from __future__ import annotations

import math

import torch

from pyloss.regularizers import invariance_penalty
from pyloss.testing import make_logits
from specs._spec import F64, Bad, Empty, Sample, Spec

OFFSETS = torch.tensor([0, 3, 4, 8])


def reference(features, target, head, env_offsets, *, kind="gap", reduction="mean"):
    ends = env_offsets.tolist()
    each = []
    for a, b in zip(ends, ends[1:]):
        phi, y = features[a:b], target[a:b]
        off = phi @ head - y
        slope = phi.mT @ off * 2 / (b - a)  # of the risk
        if kind == "gap":
            each.append((slope / 2).square().sum())
        else:  # d/ds mean (s f - y)^2 at 1
            each.append(((phi @ head) * off * 2 / (b - a)).sum().square())
    nothing = 0 * (features.sum() + target.sum() + head.sum())
    each = torch.stack(each) + nothing if each else features.new_zeros(0) + nothing
    return {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]


def sample(offsets=OFFSETS, responses=(), **options) -> Sample:
    n, k = int(offsets[-1]), 2
    shapes = dict(features=(n, k), target=(n, *responses), head=(k, *responses))
    drawn = {k: make_logits(s, F64, scale=1.0, seed=i) for i, (k, s) in enumerate(shapes.items())}
    return Sample(drawn, dict(env_offsets=offsets, **options))


X = sample().inputs

SPECS = (
    Spec(
        function=invariance_penalty,
        reference=reference,
        samples={
            "plain": sample,
            "irmv1": lambda: sample(OFFSETS.int(), kind="irmv1", reduction="sum"),
            "responses": lambda: sample(responses=(2,), reduction="none"),
        },
        gradients=("features", "target", "head"),
        derivative_samples=("plain", "irmv1"),
        result="wide",
        rounded=False,
        vmap=("features", "target", "head"),
        exhaustive=("compiled",),  # segment_reduce, and products
        empty={
            "no environments": Empty(lambda: sample(OFFSETS[:1]), math.nan),
            "no rows": Empty(lambda: sample(OFFSETS[[0, 0]], reduction="none"), math.nan, (1,)),
        },
        nan={"features": "all", "target": "all", "head": "all"},
        errors=(
            Bad(TypeError, "features must be a Tensor, got list", dict(features=[1.0])),
            Bad(TypeError, "features must be floating", dict(features=X["features"].long())),
            Bad(ValueError, r"features must be \(N, k\), got \[8\]",
                dict(features=X["features"][:, 0])),
            Bad(ValueError, r"target must be \(N,\) or .* N = 8 rows .* got \[7\]",
                dict(target=X["target"][:7])),
            Bad(TypeError, "target must be floating", dict(target=X["target"].long())),
            Bad(ValueError, r"head must have the shape \[2\], got \[3\]", dict(head=torch.ones(3))),
            Bad(TypeError, "env_offsets must be a Tensor", dict(env_offsets=[0, 8])),
            Bad(ValueError, "env_offsets must start at 0 and end", dict(env_offsets=OFFSETS + 1)),
            Bad(ValueError, "kind must be one of gap, irmv1, got 'irm'", dict(kind="irm")),
            Bad(ValueError, "avg is not a valid value", dict(reduction="avg")),
        ),
    ),
)  # fmt: skip
