"""Label distributionally robust losses."""

from __future__ import annotations

import numpy
import torch

import pyloss
from messages._table import accepted, refused

X, Y = torch.linspace(-1.0, 2.0, 15).reshape(3, 5), torch.tensor([0, 3, 1])
LDR, ALDR = pyloss.ldr_loss, pyloss.aldr_loss

ROWS = (
    refused(TypeError, "lam must be a number, got Tensor", LDR, X, Y, lam=torch.tensor(1.0)),
    refused(ValueError, "lam must be finite and > 0, got 0", LDR, X, Y, lam=0),
    refused(ValueError, "lam must be finite and > 0, got inf", pyloss.nn.LDRLoss, float("inf")),
    refused(ValueError, "topk must be at most the 5 classes, got 6", LDR, X, Y, topk=6),
    refused(TypeError, "topk must be an integer, got float", LDR, X, Y, topk=2.0),
    refused(TypeError, "margin must be a number, got list", LDR, X, Y, margin=[0.1] * 5),
    refused(ValueError, "margin must be a table of the 5 classes, got shape [3, 3]",
            LDR, X, Y, margin=torch.ones(3, 3)),
    refused(RuntimeError, "not differentiable with respect to margin",
            LDR, X, Y, margin=torch.ones(5, 5, requires_grad=True)),
    refused(ValueError, "ldr_loss takes class indices, not probabilities", LDR, X, X.softmax(1)),
    refused(TypeError, "target must be a Tensor, got tuple", LDR, X, (Y, Y, 0.5)),
    refused(ValueError, "alpha must be finite and > 1, got 1", ALDR, X, Y, alpha=1),
    refused(ValueError, "alpha must be finite and > 1, got 0.5", pyloss.nn.ALDRLoss, alpha=0.5),
    refused(ValueError, "lam must have the shape of target, [3], got [2]",
            ALDR, X, Y, lam=torch.ones(2)),
    refused(TypeError, "lam must be floating, got torch.int64", ALDR, X, Y, lam=Y),
    refused(ValueError, "num_samples must be at least 1, got 0",
            pyloss.nn.ALDRLoss, num_samples=0),
    refused(ValueError, "sync must be", pyloss.nn.ALDRLoss, sync="epoch"),
    refused(TypeError, "index must hold integers, got torch.float32",
            pyloss.nn.ALDRLoss(num_samples=3), X, Y, torch.ones(3)),
    accepted(LDR, X, Y, lam=(numpy.float32(2.0), 2.0)),
    accepted(ALDR, X, Y, lam0=(2, 2.0)),
)  # fmt: skip
