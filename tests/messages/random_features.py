"""Random-feature regression and inductive bias."""

from __future__ import annotations

import math

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.analysis import (
    chi2_mixture_logcdf,
    gp_inductive_bias,
    inductive_bias,
    kernel_eigensystem,
    ncx2_logcdf,
    optimal_ridge,
    powerlaw_fit_ratio,
    rf_risk,
)

LAM, COEFFS = torch.tensor([1.0, 0.5, 0.1]), torch.tensor([0.5, 0.2, 0.3])
LOSSES = torch.linspace(0.5, 2, 9)
X, Y = torch.linspace(0, 1, 4).unsqueeze(1), torch.linspace(0, 1, 4)


def risk_of(**options):
    return rf_risk(LAM, COEFFS, **options).test


def rbf(a, b):
    return torch.exp(-torch.cdist(a, b).square())


ROWS = (
    refused(TypeError, "eigvals must be a Tensor, got list", rf_risk, [1.0], COEFFS, 5),
    refused(TypeError, "coeffs_sq must be floating, got torch.int64", rf_risk, LAM, X.long(), 5),
    refused(ValueError, "eigvals must be (M,), M > 0, got [0]", rf_risk, LAM[:0], COEFFS[:0], 5),
    refused(ValueError, "must have the same length, got 3 and 2", rf_risk, LAM, COEFFS[:2], 5),
    refused(ValueError, "eigvals must be finite and >= 0, got -1", rf_risk, -LAM, COEFFS, 5),
    refused(ValueError, "n must be finite and > 0, got 0", rf_risk, LAM, COEFFS, 0),
    refused(ValueError, "k must be > 0, got -2", rf_risk, LAM, COEFFS, 5, -2),
    refused(ValueError, "ridge must be >= 0, got -0.5",
            rf_risk, LAM, COEFFS, 5, ridge=torch.tensor([1.0, -0.5])),
    refused(ValueError, "noise must be finite and >= 0, got inf",
            optimal_ridge, LAM, COEFFS, 5, noise=math.inf),
    refused(RuntimeError, "on the same device, but ridge is on meta and others on cpu",
            rf_risk, LAM, COEFFS, 5, ridge=torch.ones(2, device="meta")),
    refused(TypeError, "ridge must be a number, got str", rf_risk, LAM, COEFFS, 5, ridge="small"),
    accepted(risk_of, n=(np.int64(5), 5.0), k=(torch.tensor(7), 7), ridge=(np.float32(0.5), 0.5)),
    refused(ValueError, "alpha must be > 1, got 1", powerlaw_fit_ratio, 1.0, 1.5, 0.1),
    refused(ValueError, "beta must be in (1, 2 alpha + 1), got 4.5",
            powerlaw_fit_ratio, 1.5, 4.5, 0.1),
    refused(ValueError, "s_rel must be >= 0, got -1", powerlaw_fit_ratio, 1.5, 2.0, -1.0),
    refused(ValueError, "K must be (n, n), got [2, 3]", kernel_eigensystem, torch.ones(2, 3), Y),
    refused(ValueError, "K must be symmetric", kernel_eigensystem, torch.ones(4, 4).triu(), Y),
    refused(ValueError, "K must be finite", kernel_eigensystem, torch.eye(4) * math.nan, Y),
    refused(ValueError, "got an eigenvalue of -1", kernel_eigensystem, -torch.eye(4), Y),
    refused(ValueError, "y must be (3,) or (3, c), got [4]", kernel_eigensystem, torch.eye(3), Y),
    refused(ValueError, "losses must be (S,), S >= 8, got [7]", inductive_bias, LOSSES[:7], 0.1),
    refused(TypeError, "kernel must be callable, got float",
            gp_inductive_bias, X, Y, X, Y, 1.0, 0.1),
    refused(ValueError, "losses must be >= 0, got -2", inductive_bias, -LOSSES, 0.1),
    refused(ValueError, "losses must be finite", inductive_bias, LOSSES / 0, 0.1),
    refused(ValueError, "losses must be positive and differ for method='ncx2', got 1 to 1",
            inductive_bias, torch.ones(9), 0.1),
    refused(ValueError, "method must be one of ncx2, empirical, got 'normal'",
            inductive_bias, LOSSES, 0.1, method="normal"),
    refused(ValueError, "df must be finite and > 0, got 0", ncx2_logcdf, 1.0, 0.0, 1.0),
    refused(ValueError, "nc must be one number, got shape [3]", ncx2_logcdf, 1.0, 1.0, LAM),
    refused(ValueError, "weights must be finite and >= 0", chi2_mixture_logcdf, 1.0, -LAM),
    refused(ValueError, "weights must be (d,), got [4, 1]", chi2_mixture_logcdf, 1.0, X),
    refused(ValueError, "shift must be a number or of the shape of weights, [3], got [2]",
            chi2_mixture_logcdf, 1.0, LAM, LAM[:2]),
    refused(ValueError, "not positive definite with jitter=0: raise it",
            gp_inductive_bias, X * 0, Y, X, Y, rbf, 0.1, jitter=0.0),
    refused(ValueError, "kernel must give [4, 4] for that many inputs, got [4]",
            gp_inductive_bias, X, Y, X, Y, lambda a, b: a[:, 0], 0.1),
    refused(ValueError, "y must be (4,) or (4, c) as x, got [3]",
            gp_inductive_bias, X, Y[:3], X, Y, rbf, 0.1),
    refused(ValueError, "y and y_test must have the same outputs, got [4] and [4, 1]",
            gp_inductive_bias, X, Y, X, X, rbf, 0.1),
    refused(ValueError, "samples must be >= 8, got 2",
            gp_inductive_bias, X, Y, X, Y, rbf, 0.1, samples=2),
    refused(TypeError, "generator must be a torch.Generator, got int",
            gp_inductive_bias, X, Y, X, Y, rbf, 0.1, generator=0),
)  # fmt: skip
