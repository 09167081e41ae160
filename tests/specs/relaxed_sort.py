"""NeuralSort and SoftSort, against their closed formulas, entry by entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyloss
from pyloss.functional import neural_sort, soft_sort_matrix
from pyloss.testing import make_logits
from specs._spec import F64, Bad, Empty, Sample, Spec

S = torch.zeros(2, 3)


def _matrices(scores, logit, tau, dim, descending, hard) -> Tensor:
    """softmax of the rows logit(r, j, scores of the row), r = 1 ... n, largest first."""
    s = scores.movedim(dim, -1)
    n = s.shape[-1]
    rows = []
    for v in (s if descending else -s).reshape(-1, n):
        rows += [logit(r, j, v) / tau for r in range(1, n + 1) for j in range(n)]
    p = torch.stack(rows).view(*s.shape, n).softmax(-1)
    return torch.eye(n, dtype=F64)[p.argmax(-1)] + p - p.detach() if hard else p


def neural_reference(scores, tau=1.0, *, dim=-1, descending=True, hard=False) -> Tensor:
    def logit(r, j, v):
        return (len(v) + 1 - 2 * r) * v[j] - (v[j] - v).abs().sum()

    return _matrices(scores, logit, tau, dim, descending, hard)


def soft_reference(scores, tau=1.0, pow=1.0, *, dim=-1, descending=True, hard=False) -> Tensor:
    def logit(r, j, v):
        # In the row of its own rank an element has distance 0, a constant.
        k = v.detach().argsort(descending=True)[r - 1]
        return -((v[k] - v[j]).abs() ** pow) if k != j else 0 * v[j]

    return _matrices(scores, logit, tau, dim, descending, hard)


def sample(*shape: int, **options) -> Sample:
    return Sample(dict(scores=make_logits(shape, F64, scale=1.0)), options)


def errors() -> tuple[Bad, ...]:
    return (
        Bad(TypeError, "scores must be a Tensor, got list", dict(scores=[1.0])),
        Bad(TypeError, "floating, got torch.int64", dict(scores=S.long())),
        Bad(ValueError, "0-d", dict(scores=S[0, 0])),
        Bad(TypeError, "tau must be a number", dict(tau="1")),
        *(Bad(ValueError, "tau", dict(tau=bad)) for bad in (0, -1.0, math.nan, math.inf)),
        Bad(IndexError, "dim must be in", dict(dim=-3)),
        Bad(ValueError, "empty along dim -1", dict(scores=S[:, :0])),
    )


COMMON = {
    "plain": lambda: sample(2, 5),
    "options": lambda: sample(2, 4, 2, tau=0.375, dim=1, descending=False),
    "hard": lambda: sample(2, 4, tau=0.625, hard=True),
    "one row": lambda: sample(3),
    "one element": lambda: sample(2, 1),
}

# The gradient of a hard matrix is that of the soft one: no finite difference agrees with it.
SOFT = {k: v for k, v in COMMON.items() if k != "hard"}

SPECS = (
    Spec(
        function=neural_sort,
        module=pyloss.nn.NeuralSort,
        samples=COMMON,
        derivative_samples=tuple(SOFT),
        reference=neural_reference,
        gradients=("scores",),
        thorough=True,
        empty={"no rows": Empty(lambda: sample(0, 3), 0.0, (0, 3, 3))},
        vmap=("scores",),
        nan={"scores": "row"},
        large=lambda: sample(40, 50),
        threads=False,
        errors=errors(),
    ),
    Spec(
        function=soft_sort_matrix,
        module=pyloss.nn.SoftSort,
        samples={
            **COMMON,
            "pow 2": lambda: sample(2, 4, pow=2.0),
            "pow 0.5": lambda: sample(2, 4, pow=0.5),
            "pow 1.5": lambda: sample(2, 4, pow=1.5),
        },
        derivative_samples=(*SOFT, "pow 2", "pow 0.5", "pow 1.5"),
        reference=soft_reference,
        gradients=("scores",),
        thorough=True,
        empty={"no rows": Empty(lambda: sample(0, 3), 0.0, (0, 3, 3))},
        compile_samples=("plain", "pow 0.5"),
        vmap=("scores",),
        nan={"scores": "row"},
        large=lambda: sample(40, 50),
        threads=False,
        errors=(*errors(), Bad(ValueError, "pow", dict(pow=0.0))),
    ),
)
