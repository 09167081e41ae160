"""The equivariance regulariser and the groups that it knows."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from messages._table import accepted, refused
from pyloss.functional import equivariance_error
from pyloss.regularizers import EquivarianceRegularizer, SymmetryType

LAYER = nn.Linear(3, 3)
V = [(1, "vector")]
SO3 = SymmetryType.SO(3)
EYE = torch.eye(3)


def made(rep_in=V, rep_out=V, types=(SO3,), layer=LAYER, **options):
    return EquivarianceRegularizer([(layer, rep_in, rep_out)], types, **options)


ROWS = (
    # Groups
    refused(ValueError, "flip must have a generator, lie or discrete", SymmetryType, "flip"),
    refused(TypeError, "name must be a str, got list", SymmetryType, [EYE]),
    refused(ValueError, "lie must hold square matrices, got the shape [2, 3]",
            SymmetryType, "x", [EYE[:2]]),
    refused(ValueError, "discrete must hold square matrices, got the shape [3]",
            SymmetryType, "x", discrete=EYE),
    refused(ValueError, "discrete must be finite, and holds NaN",
            SymmetryType, "x", discrete=[EYE * np.nan]),
    refused(TypeError, "lie must hold matrices of numbers, got 'turn'",
            SymmetryType, "x", ["turn"]),
    refused(ValueError, "lie holds a matrix of zeros", SymmetryType, "x", [0 * EYE]),
    refused(ValueError, "a discrete generator of x has no inverse",
            SymmetryType, "x", discrete=[torch.ones(2, 2)]),
    refused(ValueError, "generators of x must have one size, got [2, 3]",
            SymmetryType, "x", [EYE], [EYE[:2, :2]]),
    refused(ValueError, "plane must name two axes of x, y, z, got 'xw'", SymmetryType.O2, "xw"),
    refused(ValueError, "n must be >= 2, got 1", SymmetryType.SO, 1),
    refused(ValueError, "is not clear: a singular value of", SymmetryType(
        "half a turn in float32", discrete=[torch.tensor([[0.8, -0.6], [0.6, 0.8]])]
    ).rank, [(1, "scalar")], [(1, "tensor2")]),
    # Representations
    refused(TypeError, "rep_in must be a list of pairs (count, type), got 'vector'",
            SO3.rank, "vector", V),
    refused(TypeError, "rep_out must be a list of pairs (count, type), got 'vector' in it",
            SO3.rank, V, ["vector"]),
    refused(ValueError, "a type in rep_in must be one of scalar, vector, covector, tensor2, got "
            "'spinor'", SO3.rank, [(1, "spinor")], V),
    refused(TypeError, "a type in rep_in must be a name or a pair (p, q), got 2",
            SO3.rank, [(1, 2)], V),
    refused(ValueError, "the count in rep_in must be >= 1, got 0", SO3.rank, [(0, "vector")], V),
    refused(ValueError, "rep_in must hold a pair (count, type), and is empty", SO3.rank, [], V),
    accepted(lambda a: SO3.projector(a, V), a=([(np.int64(1), (1, 0))], V)),
    # The regulariser, when it is made
    refused(ValueError, "rep_in of layer 0 must have its 3 features, and has 6 with vectors of 3",
            made, [(2, "vector")]),
    refused(ValueError, "rep_out of layer 0 must have its 3 features, and has 1",
            made, V, [(1, "scalar")]),
    refused(TypeError, "layer 0 must have a weight (out, in), as nn.Linear, got ReLU",
            made, layer=nn.ReLU()),
    refused(TypeError, "layers must hold (layer, rep_in, rep_out), got",
            EquivarianceRegularizer, [LAYER], [SO3]),
    refused(ValueError, "layers must hold a (layer, rep_in, rep_out), and is empty",
            EquivarianceRegularizer, [], [SO3]),
    refused(TypeError, "types must hold SymmetryType, got str", made, types=["SO(3)"]),
    refused(ValueError, "types must hold a SymmetryType, and is empty", made, types=[]),
    refused(ValueError, "types must act on vectors of one size, got [3, 2]",
            made, types=[SO3, SymmetryType.SO(2)]),
    refused(ValueError, "strength must be finite and >= 0, got -1", made, strength=-1),
    refused(ValueError, "strength must be one number or 1, got [2]", made, strength=[1.0, 2.0]),
    refused(TypeError, "strength must be a number or one for each type, got 'strong'",
            made, strength="strong"),
    refused(ValueError, "avg is not a valid value for reduction", made, reduction="avg"),
    refused(TypeError, "include_bias must be a bool, got int", made, include_bias=1),
    refused(ValueError, "warmup must be >= 0, got -1", made, warmup=-1),
    accepted(lambda **o: made(**o)(), strength=(np.float64(2.0), 2.0), types=(SO3, [SO3])),
    # and later
    refused(RuntimeError, "retune_ needs more than 50 calls of observe_ (warmup) before it, and "
            "had 0", made().retune_),
    refused(ValueError, "power must be finite and >= 0, got -1", made().retune_, -1),
    refused(ValueError, "symmetry must be one of SO(3), got 'O(3)'", made().project_, "O(3)"),
    refused(IndexError, "symmetry must be in [0, 1), got 1", made().project_, 1),
    refused(ValueError, "amount must be in [0, 1], got 2", made().project_, 0, 2),
    refused(RuntimeError, "the weight of layer 0 is on cpu and the regularizer on meta",
            made().to("meta")),
    refused(ValueError, "f must return (2, out), and returned [2]", equivariance_error,
            lambda x: x.sum(1), EYE[:2], EYE[None], EYE[None]),
)  # fmt: skip
