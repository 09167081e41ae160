"""Aggregation by monoids and their penalties; aggregate responses."""

from __future__ import annotations

import math

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss import aggregate, regularizers
from pyloss.functional import aggregate_loss, segment_gru_reduce
from pyloss.nn import AggregateLoss, LCMAggregation

X, INDEX, PTR = torch.randn(5, 3), torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 2, 3, 3, 5])
LAYER = LCMAggregation(3, 3, op="sum", project=False)
PRED, Y = torch.linspace(-1, 1, 6), torch.tensor([0.5, -0.5, 0.0])

ROWS = (
    # Found when the layer is made
    refused(ValueError, "op must be one of gru, mlp, pullback, sum, max, logsumexp, prod, got "
            "'mean'", LCMAggregation, 3, 4, op="mean"),
    refused(ValueError, "project must be True where in_channels and out_channels differ, got 3 and "
            "4", LCMAggregation, 3, 4, project=False),
    refused(ValueError, "identity must be one of learnable, zero, got None",
            LCMAggregation, 3, 4, identity=None),
    refused(ValueError, "out_channels must be at least 2 with op='pullback', got 1",
            LCMAggregation, 3, 1, op="pullback"),
    refused(ValueError, "in_channels must be >= 1, got 0", LCMAggregation, 0, 4),
    refused(TypeError, "shuffle must be a bool, got str", LCMAggregation, 3, 4, shuffle="yes"),
    # Sets
    refused(ValueError, "order = index.argsort(stable=True) sorts it", LAYER, X, INDEX.flip(0)),
    refused(ValueError, "index must be (5,), got [4]", LAYER, X, INDEX[:4]),
    refused(ValueError, "less than the number of segments, 3", LAYER, X, INDEX, dim_size=3),
    refused(ValueError, "dim_size must be that of the offsets, 4, got 5",
            LAYER, X, ptr=PTR, dim_size=5),
    refused(ValueError, "give ptr or offsets, which mean the same, not both",
            LAYER, X, ptr=PTR, offsets=PTR),
    refused(ValueError, "x must be (N, 3), got [5, 2]", LAYER, X[:, :2], INDEX),
    refused(ValueError, "dim must be -2 or 0, got 1", LAYER, X, INDEX, dim=1),
    accepted(lambda index: LAYER(X, index), index=(INDEX.int(), INDEX)),
    accepted(lambda **o: LAYER(X, **o), ptr=(PTR, PTR), index=(INDEX.flip(0), None)),
    accepted(lambda dim_size: LAYER(X, INDEX, dim_size=dim_size), dim_size=(np.int64(4), 4)),
    accepted(lambda offsets: LAYER(X, offsets=offsets), offsets=(torch.tensor([0, 5]), None)),
    # Penalties
    refused(TypeError, "op must be callable, got str",
            regularizers.associativity_loss, "gru", X, PTR),
    refused(ValueError, "op must keep the shape of its arguments, [2, 3], got [2]",
            regularizers.associativity_loss, lambda a, b: a.sum(1), X, PTR),
    refused(TypeError, "generator must be a torch.Generator, got int",
            regularizers.commutativity_loss, torch.add, X, PTR, generator=0),
    refused(ValueError, "e must have the shape [3], got [5, 3]",
            regularizers.identity_loss, torch.add, X, X),
    refused(ValueError, "x must have a feature, got [2, 0]",
            segment_gru_reduce, X[:2, :0], torch.tensor([0, 2]), X[:0, :0], X[:0, :0]),
    # Bags
    refused(ValueError, "bag_size must divide the number of instances, 6, got 4",
            aggregate_loss, PRED, Y, bag_size=4),
    refused(ValueError, "there must be 3 bags, one a response, got 2",
            aggregate_loss, PRED, Y, bag_size=3),
    refused(ValueError, "every bag must have an instance; one is empty",
            aggregate_loss, PRED, Y, offsets=torch.tensor([0, 3, 3, 6])),
    refused(ValueError, "rho must be in [0, 1], got 2", AggregateLoss, rho=2),
    refused(ValueError, "loss must be one of mse, ce, bce, or a function; got 'mae'",
            AggregateLoss, loss="mae"),
    accepted(lambda **o: aggregate_loss(PRED, Y, **o), bag_size=(np.int64(2), 2),
             rho=(np.float64(0.25), 0.25)),
    refused(ValueError, "epsilon must be > 0, got 0", aggregate.dp_aggregate, PRED, None, 0, 1.0),
    refused(ValueError, "epsilon must be > 0, got nan",
            aggregate.dp_aggregate, PRED, None, math.nan, 1.0),
    refused(ValueError, "bound must be finite and > 0, got -1.0",
            aggregate.dp_aggregate, PRED, None, 1.0, -1.0),
    refused(ValueError, "k must divide n, 10, got 3", aggregate.aggregate_risk, 10, 2, 3, 0.5, 1.0),
    refused(ValueError, "give epsilon and bound, or neither, got 1.0 and None",
            aggregate.aggregate_risk, 10, 2, 5, 0.5, 1.0, epsilon=1.0),
    refused(ValueError, "sizes must hold at least one number",
            aggregate.optimal_bag_size, 10, 2, 0.5, 1.0, sizes=[]),
    refused(TypeError, "d must be an integer, got float",
            aggregate.optimal_bag_size, 10, 2.0, 0.5, 1.0),
)  # fmt: skip
