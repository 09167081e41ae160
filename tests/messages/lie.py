"""Groups of matrices and their convolutions."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from messages._table import accepted, refused
from pyloss.nn import lie

UNIT, SO = torch.eye(2), lie.SO()
LIFT = lie.LiftConv2d(lie.SL(), 1, 1, 3, samples=2)


def lifted(group=SO, kernel_size=3, **options):
    return lie.LiftConv2d(group, 1, 1, kernel_size, **options)


def group_after(first, second, samples: int = 2):
    return nn.Sequential(
        lie.LiftConv2d(first, 1, 1, 3, samples=2), lie.GroupConv2d(second, 1, 1, 3, samples=samples)
    )


ROWS = (
    # Coordinates
    refused(ValueError, "a must have positive determinants, got one of -1",
            lie.polar, UNIT.flip(0)),
    refused(ValueError, "a must have positive determinants, got one of 0", lie.xi_inv, 0 * UNIT),
    refused(ValueError, "a must be (..., n, n), got [2, 1]", lie.polar, UNIT[:, :1]),
    refused(TypeError, "a must be a Tensor, got ndarray", lie.polar, np.eye(2)),
    refused(NotImplementedError, "log R is there for n <= 3, got n = 4", lie.xi_inv, torch.eye(4)),
    refused(ValueError, "coords must be (..., n * n), got []", lie.xi, torch.tensor(1.0)),
    refused(ValueError, "coords must be (..., 3), got [4]", lie.SL().xi, torch.zeros(4)),
    refused(ValueError, "g must be (..., 2, 2), got [3, 3]", lie.SL().xi_inv, torch.eye(3)),
    refused(NotImplementedError, "log R is there for n <= 3, got n = 4", lie.SO(4).xi_inv,
            torch.eye(4)),
    # Groups
    refused(ValueError, "n must be >= 2, got 1", lie.SL, 1),
    refused(TypeError, "n must be an integer, got float", lie.SO, 2.0),
    refused(ValueError, "variance must be finite and >= 0, got -1", lie.GL, variance=-1),
    refused(ValueError, "rotations must be one of uniform, grid, got 'haar'",
            lie.GL, rotations="haar"),
    refused(ValueError, "weighting must be one of none, haar, got True", lie.GL, weighting=True),
    refused(ValueError, "max_angle must be in [0, pi], got 4", lie.SO, max_angle=4),
    refused(ValueError, "rotations='grid' and max_angle are for n = 2, got n = 3",
            lie.SO, 3, rotations="grid"),
    refused(ValueError, "weighting='haar' needs a variance > 0, got 0",
            lie.SL, variance=0, weighting="haar"),
    refused(ValueError, "m must be >= 1, got 0", lie.SO().sample, 0),
    # Layers
    refused(TypeError, "group must be one of pyloss.nn.lie, got str", lifted, group="SO(2)"),
    refused(ValueError, "group must act on the plane, n = 2, got SO(3)", lifted, group=lie.SO(3)),
    refused(ValueError, "samples must be >= 1, got 0", lifted, samples=0),
    refused(ValueError, "kernel_size must be >= 1, got 0", lifted, kernel_size=0),
    refused(TypeError, "kernel_size must be an integer, got tuple", lifted, kernel_size=(3, 3)),
    refused(ValueError, "mask must be one of disc, bump, sigmoid, none, got 'circle'",
            lifted, mask="circle"),
    refused(TypeError, "padding must be an integer, got str", lifted, padding="full"),
    refused(ValueError, "omega must be finite and > 0, got 0", lifted, omega=0),
    refused(TypeError, "bias must be a bool, got int", lifted, bias=1),
    accepted(lambda **o: lie.resample_(lifted(**o), torch.Generator().manual_seed(0)).g,
             samples=(np.int64(4), 4), kernel_size=(np.int32(3), 3)),
    refused(ValueError, "x must be (B, 1, H, W), got [1, 5, 5]", LIFT, torch.zeros(1, 5, 5)),
    # Samples
    refused(TypeError, "model must be a Module, got list", lie.resample_, [LIFT]),
    refused(ValueError, "model must have a LiftConv2d, and has none", lie.resample_, nn.ReLU()),
    refused(ValueError, "a GroupConv2d of model has no LiftConv2d before it",
            lie.resample_, lie.GroupConv2d(lie.SL(), 1, 1, 3)),
    refused(ValueError, "layer before it, SL(2) and 2, got GL(2) and 2",
            lie.resample_, group_after(lie.SL(), lie.GL())),
    refused(ValueError, "layer before it, SL(2) and 2, got SL(2) and 5",
            lie.resample_, group_after(lie.SL(), lie.SL(), 5)),
)  # fmt: skip
