"""SogCLR, iSogCLR, and gradients in chunks."""

from __future__ import annotations

import numpy as np
import torch

import pyloss
from messages._table import accepted, refused
from pyloss.functional import sogclr_loss
from pyloss.nn import ISogCLRLoss, SogCLRLoss

G = torch.Generator().manual_seed(0)
Z1, Z2 = torch.randn(2, 4, 3, generator=G)
INDEX, LOG_U = torch.arange(4), torch.zeros(4)
ENCODER = torch.nn.Linear(3, 2)

ROWS = (
    # Found when the module is made
    refused(TypeError, "num_samples must be an integer, got float", SogCLRLoss, 10.0),
    refused(ValueError, "num_samples must be at least 1, got 0", ISogCLRLoss, 0),
    refused(ValueError, "gamma must be in (0, 1], got 2", SogCLRLoss, 10, gamma=2),
    refused(ValueError, "gamma_schedule must be one of constant, cosine, got 'linear'",
            SogCLRLoss, 10, gamma_schedule="linear"),
    refused(ValueError, "decay_epochs is for gamma_schedule='cosine', which needs it, got None",
            SogCLRLoss, 10, gamma_schedule="cosine"),
    refused(ValueError, "got 5 and 'constant'", SogCLRLoss, 10, decay_epochs=5),
    refused(ValueError, "decay_epochs must be finite and > 0, got 0",
            SogCLRLoss, 10, gamma_schedule="cosine", decay_epochs=0),
    refused(TypeError, "temperature must be a number, got Tensor",
            SogCLRLoss, 10, temperature=torch.tensor(0.1)),
    refused(ValueError, "temperature must be in [tau_min, tau_max] = [0.05, 0.7], got 0.01",
            ISogCLRLoss, 10, 0.01),
    refused(ValueError, "tau_max must be finite and >= 0.2, got 0.1",
            ISogCLRLoss, 10, tau_min=0.2, tau_max=0.1),
    refused(ValueError, "eta must be finite and > 0, got 0", ISogCLRLoss, 10, eta=0),
    refused(ValueError, "beta must be in (0, 1], got 1.5", ISogCLRLoss, 10, beta=1.5),
    refused(ValueError, "grad_clip must be finite and > 0, got 0", ISogCLRLoss, 10, grad_clip=0),
    refused(UserWarning, "rho = 6.0 is above log(num_samples) = 4.61",
            ISogCLRLoss, 100, bimodal=True),
    # Indices
    refused(IndexError, "index 10 is out of range for 10 samples",
            SogCLRLoss(10), Z1, Z2, INDEX + 7),
    refused(IndexError, "index -1 is out of range for 10 samples",
            ISogCLRLoss(10), Z1, Z2, INDEX - 1),
    refused(IndexError, "index 10 is out of range", ISogCLRLoss(10).temperature_of, INDEX + 7),
    refused(ValueError, "index must have the shape [4], got [3]",
            SogCLRLoss(10), Z1, Z2, INDEX[:3]),
    refused(TypeError, "index must hold integers, got torch.float32",
            SogCLRLoss(10), Z1, Z2, INDEX.float()),
    refused(TypeError, "z1 must be a Tensor, got list", SogCLRLoss(10), [1.0], Z2, INDEX),
    refused(ValueError, "epoch must be finite and >= 0, got -1", SogCLRLoss(10).step_epoch, -1),
    # Numbers and bools of numpy
    accepted(lambda **o: sogclr_loss(Z1, Z2, LOG_U, **o)[0], gamma=(np.float32(0.5), 0.5),
             temperature=(np.float64(0.25), 0.25), center_positive=(np.False_, False)),
    accepted(lambda index: SogCLRLoss(np.int64(10))(Z1, Z2, index), index=(INDEX.int(), INDEX)),
    # Chunks
    refused(TypeError, "DistributedDataParallel(GradCache(encoder, ...))", pyloss.nn.GradCache,
            torch.nn.parallel.DistributedDataParallel.__new__(
                torch.nn.parallel.DistributedDataParallel
            ), chunk_size=2),
    accepted(lambda chunk_size: pyloss.nn.GradCache(ENCODER, chunk_size=chunk_size)(Z1),
             chunk_size=(np.int64(2), 2)),
)  # fmt: skip
