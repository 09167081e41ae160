"""Contrastive losses."""

from __future__ import annotations

import numpy
import torch

import pyloss
from messages._table import accepted, refused
from pyloss import functional as F
from pyloss import nn

Q, K = torch.arange(24.0).cos().view(2, 4, 3)
QUEUE, IDS = torch.arange(15.0).sin().view(5, 3), torch.tensor([0, 1, 0, 2])
LABELS = torch.tensor([1, 0, 1, 0])

ROWS = (
    refused(ValueError, "key must have as many rows as query, 4, got 3", pyloss.info_nce, Q, K[:3]),
    refused(ValueError, "key must have as many features as query, 3, got [4, 2]",
            pyloss.info_nce, Q, K[:, :2]),
    refused(ValueError, "query must be (N, D), got [1, 4, 3]", pyloss.info_nce, Q[None], K[None]),
    refused(ValueError, "in_batch=False needs a queue: there are no other negatives",
            pyloss.info_nce, Q, K, in_batch=False),
    refused(ValueError, "symmetric needs one key for each query, without queue and target",
            pyloss.info_nce, Q, K, QUEUE, symmetric=True),
    refused(ValueError, "symmetric needs one key for each query, without queue and target",
            pyloss.info_nce, Q, K, target=LABELS, symmetric=True),
    accepted(pyloss.info_nce, Q, K, QUEUE, ids=(IDS, IDS),
             queue_ids=(None, torch.full((5,), 9))),
    refused(ValueError, "queue_ids needs a queue", pyloss.info_nce, Q, K, ids=IDS, queue_ids=IDS),
    refused(ValueError, "key_ids and queue_ids need ids, those of the queries",
            pyloss.info_nce, Q, K, key_ids=IDS),
    refused(ValueError, "ids with target needs key_ids, those of the keys",
            pyloss.info_nce, Q, K, target=LABELS, ids=IDS),
    refused(IndexError, "Target 4 is out of bounds", pyloss.info_nce, Q, K,
            target=torch.tensor([0, 1, 4, 2])),
    refused(ValueError, "ids must have the shape [4], got [3]", pyloss.info_nce, Q, K, ids=IDS[:3]),
    refused(TypeError, "ids must hold integers, got torch.float32",
            pyloss.info_nce, Q, K, ids=IDS.float()),
    accepted(pyloss.info_nce, Q, K, ids=(IDS.int(), IDS), temperature=(numpy.float64(0.2), 0.2)),
    accepted(pyloss.info_nce, Q, K, temperature=(torch.tensor([0.25]), torch.tensor(0.25))),
    # A model's parameter is most often the logarithm.
    refused(ValueError, "logit_scale must be finite and > 0, got -2.3",
            pyloss.clip_loss, Q, K, -2.3),
    refused(TypeError, "logit_scale must be a number, got Tensor",
            nn.CLIPLoss, torch.tensor(14.0)),
    refused(TypeError, "learnable must be a bool, got str", nn.NTXentLoss, learnable="yes"),
    refused(TypeError, "got an unexpected keyword argument 'tau'", nn.InfoNCELoss, tau=0.1),
    refused(TypeError, "logit_bias must be a number, got NoneType", pyloss.siglip_loss, Q, K, 10.0,
            None),
    refused(ValueError, "labels must have the shape [4], got [4, 1]",
            pyloss.supervised_contrastive, Q, LABELS[:, None]),
    accepted(pyloss.supervised_contrastive, Q, labels=(LABELS.to(torch.uint8), LABELS)),
    accepted(pyloss.supervised_contrastive, torch.stack([Q, K], 1), labels=(LABELS, LABELS)),
    refused(ValueError, "hard_fraction must be at most 1, got 10", F.hard_info_nce, Q, K,
            hard_fraction=10),
)  # fmt: skip
