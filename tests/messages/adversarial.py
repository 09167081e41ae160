"""Attacks and adversarial training."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.adversarial import (
    AdvCompSum,
    DoublyRobustATLoss,
    mart_loss,
    pgd_attack,
    pgd_maximise,
    trades_loss,
)

G = torch.Generator().manual_seed(0)
MODEL = torch.nn.Linear(6, 4)
X, Y = torch.rand(5, 6, generator=G), torch.arange(5) % 4

ROWS = (
    refused(ValueError, "eps must be finite and >= 0, got -1", pgd_attack, MODEL, X, Y, -1),
    refused(TypeError, "eps must be a number, got str", pgd_attack, MODEL, X, Y, "8/255"),
    refused(ValueError, "norm must be one of linf, l2, got 'l1'",
            pgd_attack, MODEL, X, Y, 0.1, "l1"),
    refused(ValueError, "steps must be at least 1, got 0", pgd_attack, MODEL, X, Y, 0.1, steps=0),
    refused(TypeError, "steps must be an integer, got float",
            pgd_attack, MODEL, X, Y, 0.1, steps=2.0),
    refused(ValueError, "step must be finite and > 0, got 0",
            pgd_attack, MODEL, X, Y, 0.1, step=0),
    refused(ValueError, "clip must be (low, high) with low < high, got (1, 0)",
            pgd_attack, MODEL, X, Y, 0.1, clip=(1, 0)),
    refused(TypeError, "clip must be a pair (low, high), got 1.0",
            pgd_attack, MODEL, X, Y, 0.1, clip=1.0),
    refused(ValueError, "restarts=3 without random_start would all be the same",
            pgd_attack, MODEL, X, Y, 0.1, restarts=3, random_start=False),
    refused(ValueError, "loss must be one of cross_entropy, margin, got 'hinge'",
            pgd_attack, MODEL, X, Y, 0.1, loss="hinge"),
    refused(TypeError, "loss must be a name or a callable, got int",
            pgd_attack, MODEL, X, Y, 0.1, loss=3),
    refused(TypeError, "generator must be a torch.Generator, got int",
            pgd_attack, MODEL, X, Y, 0.1, generator=3),
    refused(ValueError, "objective must be one of margin_shift, kl, cross_entropy, got 'mse'",
            pgd_maximise, MODEL, X, Y, 0.1, objective="mse"),
    refused(ValueError, "start='clean' with objective='kl': its gradient is 0 there",
            pgd_maximise, MODEL, X, Y, 0.1, objective="kl", start="clean"),
    refused(TypeError, "x must be floating, got torch.int64",
            pgd_attack, MODEL, X.long(), Y, 0.1),
    refused(TypeError, "y must be a Tensor, got NoneType", pgd_maximise, MODEL, X, None, 0.1),
    refused(ValueError, "y must have a row for each of the 5 of x, got [4]",
            pgd_attack, MODEL, X, Y[:4], 0.1),
    refused(IndexError, "Target 6 is out of bounds", pgd_attack, MODEL, X, Y + 6, 0.1),
    refused(TypeError, "model must be callable, got Tensor", pgd_attack, X, X, Y, 0.1),
    refused(TypeError, "model must return a Tensor of logits, got tuple",
            pgd_attack, lambda x: (x, x), X, Y, 0.1),
    refused(ValueError, "model must return logits (N, C, ...) for the 5 rows of x, got [5]",
            pgd_attack, lambda x: x.sum(1), X, Y, 0.1),
    refused(ValueError, "an objective must give a value for each of the 5 rows, got []",
            pgd_attack, MODEL, X, Y, 0.1, loss=torch.nn.functional.cross_entropy),
    refused(RuntimeError, "the objective does not depend on x",
            pgd_attack, lambda x: MODEL(x.detach()).detach(), X, Y, 0.1),
    refused(ValueError, "beta must be finite and >= 0, got -1",
            trades_loss, MODEL, X, Y, 0.1, beta=-1),
    refused(ValueError, "avg is not a valid value for reduction",
            mart_loss, MODEL, X, Y, 0.1, reduction="avg"),
    # Found when the module is made
    refused(ValueError, "rho must be finite and > 0, got 0", AdvCompSum, rho=0),
    refused(ValueError, "steps must be at least 1, got 0", AdvCompSum, steps=0),
    refused(ValueError, "r must be finite and > 0, got 0", DoublyRobustATLoss, 0),
    refused(ValueError, "implicit needs norm='linf', whose barrier it has, got 'l2'",
            DoublyRobustATLoss, norm="l2", implicit=True),
    refused(ValueError, "barrier must be finite and > 0, got 0", DoublyRobustATLoss, barrier=0),
    refused(ValueError, "cg_steps must be finite and >= 0, got -1",
            DoublyRobustATLoss, cg_steps=-1),
    # Unusual, and taken
    accepted(lambda **o: pgd_attack(MODEL, X, Y, 0.1, **o), steps=(np.int64(3), 3),
             targeted=(np.True_, True), clip=([0, 1], (0.0, 1.0)), step=(np.float32(0.5), 0.5)),
    accepted(lambda eps: pgd_attack(MODEL, X, Y, eps, clip=(0.0, 1.0)), eps=(0, 0.0)),
)  # fmt: skip
