"""Criticality, kernel flow, critical initialisation."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from messages._table import accepted, refused
from pyloss.analysis import criticality, kernel_flow, optimal_aspect_ratio, optimal_depth
from pyloss.nn.init import critical_

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def drawn(**options):
    return critical_(torch.empty(5, 4), generator=torch.Generator().manual_seed(0), **options)


ROWS = (
    # Activations
    refused(ValueError, "activation must be one of linear, relu, tanh, sin, erf, gelu, silu, "
            "sigmoid, softplus, or a function; got 'leaky_relu'", criticality, "leaky_relu"),
    refused(TypeError, "activation must be a name or callable, got int", criticality, 3),
    refused(TypeError, "dactivation must be callable, got str", criticality, torch.tanh, "sech"),
    refused(ValueError, "dactivation goes with a function, not with 'tanh'",
            criticality, "tanh", torch.cos),
    refused(ValueError, "activation must return a tensor of the shape [25] that it gets, got []",
            kernel_flow, torch.sum, X, 3),
    refused(TypeError, "kinks must be a list of numbers, got float",
            criticality, torch.tanh, kinks=1.0),
    refused(ValueError, "kinks must be finite, got nan", criticality, torch.tanh, kinks=[math.nan]),
    refused(TypeError, "kinks must be a number, got str", criticality, torch.tanh, kinks=("0",)),
    refused(ValueError, "sigmoid has no critical point: no K in [0.01, 100] has both "
            "susceptibilities 1", criticality, "sigmoid"),
    refused(ValueError, "residual must be in [0, 1), got 1", criticality, "relu", residual=1),
    accepted(lambda activation: criticality(activation)[1:], activation=(np.str_("gelu"), "gelu")),
    # Depth
    refused(ValueError, "n_out must be >= 1, got 0", optimal_aspect_ratio, "relu", 0),
    refused(TypeError, "width must be an integer, got float", optimal_depth, "relu", 2.5),
    # Flow
    refused(TypeError, "x must be a Tensor, got list", kernel_flow, "relu", [[1.0]], 3),
    refused(TypeError, "x must be floating, got torch.int64", kernel_flow, "relu", X.long(), 3),
    refused(ValueError, "x must be (B, n0) with features, got [4]", kernel_flow, "relu", X[0], 3),
    refused(ValueError, "depth must be >= 1, got 0", kernel_flow, "relu", X, 0),
    refused(ValueError, "order must be 0 or 1, got 2", kernel_flow, "relu", X, 2, order=2),
    refused(ValueError, "C_W must be finite and >= 0, got -1.0",
            kernel_flow, "relu", X, 2, C_W=-1.0),
    refused(ValueError, "C_b must be one number, got shape [2]",
            kernel_flow, "relu", X, 2, C_b=torch.zeros(2)),
    refused(ValueError, "lam_W must be one rate or 3, one for each layer, got 2",
            kernel_flow, "relu", X, 3, lam_W=[1.0, 2.0]),
    refused(ValueError, "lam_b must be finite and >= 0, got nan",
            kernel_flow, "relu", X, 3, lam_b=math.nan),
    refused(ValueError, "softplus has no critical point", kernel_flow, "softplus", X, 3, C_W=1.0),
    accepted(lambda **o: kernel_flow("tanh", X, **o), depth=(np.int64(3), 3),
             lam_b=(np.ones(3), 1.0), C_W=(torch.tensor([1.0]), 1)),
    # Initialisation
    refused(TypeError, "module_or_tensor must be a Tensor or a Module, got list", critical_, [X]),
    refused(TypeError, "module_or_tensor must be floating, got torch.int64", critical_, X.long()),
    refused(ValueError, "a weight must have at least 2 dimensions for its fan-in, got [4]",
            critical_, X[0].clone()),
    refused(ValueError, "sigmoid has no critical point", critical_, nn.Linear(2, 2), "sigmoid"),
    refused(ValueError, "activation must be one of leaky_relu, linear, relu",
            critical_, nn.Linear(2, 2), "elu"),
    refused(ValueError, "leaky_slope goes with 'leaky_relu', not with 'relu'",
            critical_, nn.Linear(2, 2), leaky_slope=0.1),
    refused(ValueError, "leaky_slope must be finite and >= 0, got -0.1",
            critical_, nn.Linear(2, 2), "leaky_relu", leaky_slope=-0.1),
    refused(TypeError, "generator must be a torch.Generator, got int",
            critical_, nn.Linear(2, 2), generator=0),
    accepted(drawn, activation=(nn.LeakyReLU(0.0), "leaky_relu")),
    accepted(drawn, activation=(torch.tanh, "tanh"), residual=(np.float64(0.5), 0.5)),
)  # fmt: skip
