"""Distributionally robust losses."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import kl_dro_loss
from pyloss.nn import KLDROLoss

LOSSES = torch.tensor([0.1, 0.2, 3.0])

ROWS = (
    refused(ValueError, "r must be finite and > 0, got 0.0", KLDROLoss, 0.0),
    refused(ValueError, "eta must be in (0, 1], got 2", KLDROLoss, eta=2),
    refused(TypeError, "eta must be a number, got str", KLDROLoss, eta="0.9"),
    refused(TypeError, "losses must be a Tensor, got float", KLDROLoss(), 3.0),
    refused(TypeError, "losses must be floating, got torch.int64", KLDROLoss(), LOSSES.long()),
    accepted(lambda **o: kl_dro_loss(LOSSES, **o)[0], r=(np.float32(0.5), 0.5),
             eta=(np.float64(1), 1.0)),
    # A loss that was reduced already: the plain value.
    accepted(lambda losses: KLDROLoss()(losses), losses=(LOSSES[2], LOSSES[2:])),
)  # fmt: skip
