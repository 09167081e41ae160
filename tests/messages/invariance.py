"""Invariance: penalty, test, structural equation models."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.analysis import (
    Intervention,
    invariance_environments_needed,
    invariance_test,
    linear_sem,
)
from pyloss.analysis.invariance import exact_gap, sem_covariance
from pyloss.regularizers import invariance_penalty

X, Y = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 9)
OFFSETS = torch.tensor([0, 4, 9])
B, OMEGA = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.ones(2)


def sem(*interventions, B=B, omega=OMEGA, y=1, n=3):
    generator = torch.Generator().manual_seed(0)
    return linear_sem(B, omega, y=y, interventions=interventions, n=n, generator=generator)


ROWS = (
    # Penalty and test
    refused(ValueError, "kind must be one of gap, irmv1, got 'v-rex'",
            invariance_penalty, X, Y, X[0], OFFSETS, kind="v-rex"),
    refused(ValueError, "head must have the shape [2], got [2, 1]",
            invariance_penalty, X, Y, torch.ones(2, 1), OFFSETS),
    refused(ValueError, "env_offsets must start at 0 and end at the number of values, 9",
            invariance_penalty, X, Y, X[0], OFFSETS[:2]),
    refused(RuntimeError, "env_offsets must be int32 or int64, got torch.float32",
            invariance_test, X, Y, OFFSETS.float()),
    refused(ValueError, "target must be (N,), got [9, 2]", invariance_test, X, X, OFFSETS),
    refused(ValueError, "every environment, and there must be one, must have more than 2 rows",
            invariance_test, X, Y, torch.tensor([0, 2, 9])),
    refused(ValueError, "eps must be finite and >= 0, got -0.1",
            invariance_test, X, Y, OFFSETS, eps=-0.1),
    refused(ValueError, "level must be in (0, 1), got 1", invariance_test, X, Y, OFFSETS, level=1),
    accepted(lambda **o: invariance_test(X, Y, OFFSETS, **o), eps=(None, 0.0)),
    accepted(invariance_penalty, X, Y, X[0], env_offsets=(OFFSETS.int(), OFFSETS)),
    # Models
    refused(ValueError, "B must be (d, d), got [1, 2]", sem, (), B=B[:1]),
    refused(ValueError, "omega must be (2,) or (2, 2), got [3]", sem, (), omega=torch.ones(3)),
    refused(ValueError, "omega must hold variances >= 0, or be a covariance",
            sem, (), omega=torch.tensor([1.0, -1.0])),
    refused(ValueError, "omega must hold variances >= 0, or be a covariance",
            sem, (), omega=torch.tensor([[1.0, 1.0], [0.0, 1.0]])),
    refused(ValueError, "omega must be finite", sem, (), omega=OMEGA * torch.nan),
    refused(ValueError, "row of an intervention must be finite in environment 1",
            sem, (), Intervention(0, row=[0.0, torch.inf])),
    refused(IndexError, "y must be in [-2, 1], got 2", sem, (), y=2),
    refused(ValueError, "environment 1 intervenes on the response, coordinate 1",
            sem, (), Intervention(1, variance=2.0)),
    refused(IndexError, "the site of an intervention in environment 0 must be in [-2, 1], got 5",
            sem, Intervention(5)),
    refused(ValueError, "row of an intervention must be (2,), got [3] in environment 0",
            sem, Intervention(0, row=[0.0, 1.0, 2.0])),
    refused(ValueError, "variance of an intervention must be finite and >= 0, got -1.0",
            sem, Intervention(0, variance=-1.0)),
    refused(TypeError, "interventions must hold Intervention, got str in environment 0", sem, "0"),
    refused(TypeError, "interventions must hold one environment each, got int at 0", sem, 0),
    refused(ValueError, "I - B must be invertible, is not in environment 0",
            sem, Intervention(0, row=[0.0, 1.0])),
    refused(ValueError, "n must be one number or 1, one an environment, got 2", sem, (), n=[3, 4]),
    refused(ValueError, "n must be >= 0, got -1", sem, (), n=-1),
    accepted(lambda **o: sem((), (), **o), n=(np.int64(2), [2, 2]), y=(-1, 1),
             omega=(torch.eye(2), OMEGA)),
    refused(ValueError, "phi must be (k, 1), got [2, 2]",
            exact_gap, torch.eye(2)[None], torch.eye(2), y=1),
    refused(ValueError, "covariance must be (E, d, d), got [2, 2]",
            exact_gap, torch.eye(2), torch.eye(1), y=1),
    refused(ValueError, "w must be (1,), got [2]",
            exact_gap, torch.eye(2)[None], torch.eye(1), torch.ones(2), y=1),
    refused(TypeError, "B must be floating, got torch.int64",
            sem_covariance, B.long(), OMEGA, y=1, interventions=[()]),
    # How many
    refused(ValueError, "delta must be in (0, 1), got 1", invariance_environments_needed, 1, 0.1),
    refused(ValueError, "zeta must be finite and > 0, got 0",
            invariance_environments_needed, 0.1, 0),
    refused(TypeError, "p must be an integer, got float",
            invariance_environments_needed, 0.1, 0.1, 1.5),
)  # fmt: skip
