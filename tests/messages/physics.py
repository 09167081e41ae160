"""Physics-informed losses, deep conjugate directions, distillation of data sets."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import (
    balanced_loss_weight,
    causal_residual_loss,
    causal_weights,
    clip_schedule,
    conjugate_direction_loss,
    dcdm_solve,
    lagrangian_residual_loss,
    lanczos_ritz_dataset,
    periodic_embedding,
    perturb_weights,
    representative_indices,
    trajectory_matching_loss,
)
from pyloss.nn import CausalResidualLoss, LagrangianPINN, PoissonNet2d

L, B = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
LABELS = torch.tensor([0, 0, 1])
NET = torch.nn.Linear(2, 1)


def still(labels, times):
    return labels, labels + 0 * times


def twice(v):
    return 2 * v


ROWS = (
    # Causal
    refused(ValueError, "losses must be >= 0, got -1", causal_weights, -L, 1.0),
    refused(TypeError, "eps must be a number, got Tensor", causal_weights, L, torch.tensor(1.0)),
    refused(TypeError, "eps must be a number, got list", causal_residual_loss, L, [0.1, 1.0]),
    refused(ValueError, "eps must hold one number at least, got none", CausalResidualLoss, []),
    refused(ValueError, "eps must be finite and > 0, got 0", CausalResidualLoss, [1.0, 0]),
    refused(ValueError, "threshold must be in (0, 1), got 1.0", CausalResidualLoss, 1.0, 1.0),
    refused(TypeError, "include_ic must be a bool, got str", CausalResidualLoss, include_ic="no"),
    accepted(causal_residual_loss, L, eps=(np.float64(0.5), 0.5),
             include_ic=(np.bool_(True), True)),
    accepted(periodic_embedding, L, L, period=(np.float32(2.0), 2), modes=(np.int64(3), 3)),
    # Lagrangian
    refused(TypeError, "velocity must be a number, got NoneType",
            lagrangian_residual_loss, still, L, L, velocity=None),
    refused(TypeError, "u_net must be a Module, got function", LagrangianPINN, still, NET),
    refused(ValueError, "velocity_scale must be finite and > 0, got 0",
            LagrangianPINN, NET, NET, 0),
    refused(ValueError, "period must be finite and > 0, got -1", LagrangianPINN, NET, NET, 1, -1),
    refused(TypeError, "initial must be callable, got float",
            LagrangianPINN, NET, NET, initial=0.0),
    # Deep conjugate directions
    refused(TypeError, "matvec must be callable, got Tensor", conjugate_direction_loss, B, B, B),
    refused(TypeError, "b must be float32 or float64, got torch.bfloat16",
            dcdm_solve, twice, B.bfloat16(), twice),
    refused(TypeError, "x0 must be a Tensor, got list", dcdm_solve, twice, B, twice, [0.0]),
    refused(TypeError, "check_symmetric must be a bool, got int",
            dcdm_solve, twice, B, twice, check_symmetric=1),
    refused(ValueError, "matvec must keep the shape of its argument, [2, 2], got [2]",
            dcdm_solve, lambda v: v.sum(1), B, twice),
    refused(RuntimeError, "call it outside of torch.compile and torch.func",
            torch.func.vmap(lambda b: dcdm_solve(twice, b, twice).x), B),
    accepted(lambda **o: dcdm_solve(twice, B, twice, **o).x, maxiter=(np.int64(5), 5),
             tol=(np.float64(1e-3), 1e-3), n_orth=(np.int32(1), 1)),
    refused(TypeError, "shape must be a tuple of integers, got int",
            lanczos_ritz_dataset, twice, 5, 2),
    refused(ValueError, "shape must hold sizes >= 1, got [3, 0]",
            lanczos_ritz_dataset, twice, (3, 0), 2),
    refused(ValueError, "size must be >= 0, got -1", lanczos_ritz_dataset, twice, (3,), -1),
    refused(ValueError, "steps must be in [1, 3], the size of a vector, got 4",
            lanczos_ritz_dataset, twice, (3,), 2, steps=4),
    refused(TypeError, "dtype must be a floating dtype, got torch.int64",
            lanczos_ritz_dataset, twice, (3,), 2, dtype=torch.int64),
    refused(ValueError, "boost must be finite and > 0, got 0",
            lanczos_ritz_dataset, twice, (3,), 2, boost=0),
    refused(ValueError, "channels must be >= 1, got 0", PoissonNet2d, 0),
    refused(TypeError, "blocks must be an integer, got float", PoissonNet2d, 4, 1.5),
    refused(ValueError, "levels must be >= 0, got -1", PoissonNet2d, 4, 1, -1),
    # Distillation of data sets
    refused(ValueError, "target equals start: an expert that has not moved has no scale",
            trajectory_matching_loss, [L + 1], [L], [L]),
    refused(ValueError, "theta must hold one Tensor at least, got none",
            trajectory_matching_loss, [], [], []),
    refused(TypeError, "params must be several Tensors, got one", perturb_weights, B),
    refused(TypeError, "params must be a Tensor or several, got int", perturb_weights, 3),
    accepted(lambda alpha: perturb_weights(NET.parameters(), alpha), alpha=(np.float64(0.0), 0)),
    refused(ValueError, "epoch must be >= 0, got -1", clip_schedule, -1),
    refused(TypeError, "epoch must be an integer, got float", clip_schedule, 0.5),
    refused(ValueError, "first must be in (0, 1], got 2", clip_schedule, 0, first=2),
    refused(ValueError, "start must be in [0, 5], got 6", balanced_loss_weight, 6, 5),
    refused(ValueError, "max_start must be > 0, got 0", balanced_loss_weight, 0, 0),
    refused(ValueError, "base must be finite and > 1, got 1", balanced_loss_weight, 0, 5, base=1),
    refused(TypeError, "labels must hold integers, got torch.float32",
            representative_indices, torch.ones(3, 2), L, 1),
    refused(ValueError, "class 1 has 1 samples, fewer than per_class, 2",
            representative_indices, torch.ones(3, 2), LABELS, 2),
    accepted(representative_indices, torch.eye(3), torch.arange(3), per_class=(np.int64(1), 1),
             iterations=(np.int64(0), 0)),
)  # fmt: skip
