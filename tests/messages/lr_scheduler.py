"""Schedules and the recorder of norms."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.optim.lr_scheduler import (
    GradNormRecorder,
    LinearDecay,
    RefinedSchedule,
    refine_schedule,
)

WEIGHT = torch.zeros(2, requires_grad=True)


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([WEIGHT], lr=0.5)


def linear(*args, **options) -> torch.Tensor:
    return table(LinearDecay(optimizer(), *args, **options))


def refined(*args, **options) -> torch.Tensor:
    return table(RefinedSchedule(optimizer(), *args, **options))


def table(schedule) -> torch.Tensor:
    return torch.tensor([schedule.multiplier(t) for t in range(8)])


NORMS = [3.0, 1.0, 1.0, 2.0]
ROWS = (
    refused(TypeError, "list is not an Optimizer", LinearDecay, [WEIGHT], 10),
    refused(TypeError, "optimizer must be an Optimizer, got list", GradNormRecorder, [WEIGHT]),
    refused(ValueError, "norm must be one of l1, l2, got 2", GradNormRecorder, optimizer(), 2),
    refused(TypeError, "warmup_steps must be an integer, got float", linear, 10, 0.1),
    refused(ValueError, "warmup_steps must be in [0, total_steps), total_steps 10, got -1",
            linear, 10, -1),
    refused(TypeError, "final must be a number, got str", linear, 10, final="0"),
    refused(ValueError, "final must be finite and >= 0, got -0.1", linear, 10, final=-0.1),
    refused(TypeError, "total_steps must be an integer, got NoneType", refined, NORMS, None),
    refused(ValueError, "total_steps must be at least 1, got 0", refined, NORMS, 0),
    refused(ValueError, "norm must be one of l1, l2, got 'L2'", refined, NORMS, 5, norm="L2"),
    refused(TypeError, "smoothing must be a number, got bool", refined, NORMS, 5, smoothing=True),
    refused(TypeError, "grad_norms must be a Tensor or numbers, got int", refined, 5, 5),
    refused(TypeError, "grad_norms must be a Tensor or numbers, got str", refine_schedule, "norms"),
    refused(ValueError, "grad_norms must hold two finite numbers or more, got 0",
            refine_schedule, []),
    refused(ValueError, "grad_norms must be >= 0, got -1", refine_schedule, [1.0, -1.0]),
    refused(ValueError, "grad_norms or weights are too far apart", refine_schedule,
            [1e200, 1e200, 1.0], smoothing=0),
    refused(ValueError, "grad_norms or weights are too far apart", refine_schedule,
            [1e200, 1.0, 1.0], smoothing=0, mode="optimal"),
    refused(UserWarning, "1 of 3 grad_norms are 0", refine_schedule, [1.0, 0.0, 2.0]),
    # Numbers of numpy, sequences
    accepted(linear, total_steps=(np.int64(6), 6), warmup_steps=(np.int32(2), 2),
             final=(np.float64(0.5), 0.5)),
    accepted(refine_schedule, grad_norms=(NORMS, torch.tensor(NORMS))),
    accepted(refine_schedule, grad_norms=(np.array(NORMS), torch.tensor(NORMS))),
    accepted(refine_schedule, grad_norms=((4, 2, 1), torch.tensor([4.0, 2.0, 1.0]))),
)  # fmt: skip
