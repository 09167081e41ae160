"""Metric learning: pairs, triplets, episodes, margins of the softmax, metrics of embeddings."""

from __future__ import annotations

import numpy
import torch

from messages._table import accepted, refused
from pyloss import functional as F
from pyloss import metrics, nn

X = torch.arange(24.0).cos().view(8, 3)
Y = torch.arange(8) // 2
W = torch.arange(12.0).sin().view(4, 3)

ROWS = (
    # Labels that are none
    refused(TypeError, "labels must hold integers, got torch.float32",
            F.triplet_margin_loss, X, Y.float()),
    refused(ValueError, "labels must have the shape [8], got [8, 1]", F.tcm_loss, X, Y[:, None]),
    # Triplets, as torch's loss of this name is given them
    refused(TypeError, "labels must hold integers, got torch.float32",
            nn.TripletMarginLoss(), X, X.flip(0), X.roll(1, 0)),
    # Found when the module is made
    refused(ValueError, "mining must be one of all, hard, semihard, batch_hard, got 'semi-hard'",
            nn.TripletMarginLoss, mining="semi-hard"),
    refused(TypeError, "unexpected keyword argument 'margin_plus'",
            nn.ThresholdConsistentMarginLoss, margin_plus=0.9),
    refused(ValueError, "distance must be one of euclidean, squared, cosine, got 'l2'",
            nn.ContrastivePairLoss, distance="l2"),
    refused(ValueError, "epsilon must be finite and >= 0, got -1", nn.MultiSimilarityLoss,
            epsilon=-1),
    refused(ValueError, "neighbours must be at least k = 5, got 4", nn.ICNNLoss, k=5,
            neighbours=4),
    refused(ValueError, "margin must be finite and >= 0, got -0.5", nn.ProtoTripletLoss, -0.5),
    # Degrees, as pytorch-metric-learning has them
    refused(ValueError, "margin must be an angle of at most pi, got 28.6", nn.ArcFaceLoss, 10, 4,
            margin=28.6),
    refused(ValueError, "num_classes must be at least 1, got 0", nn.CosFaceLoss, 0, 4),
    refused(ValueError, "weight must have the shape [10], got [4]", nn.CosFaceLoss, 10, 4,
            weight=torch.ones(4)),
    refused(IndexError, "Target 4 is out of bounds", F.arcface_loss, X, W, Y + 2),
    # Episodes
    refused(ValueError, "labels must name every class, but class 4 is not there",
            F.prototypes, X, Y, 5),
    refused(ValueError, "prototypes must hold at least 2 rows, got [1, 3]",
            F.proto_triplet_loss, X, Y, X[:1]),
    # Metrics
    refused(ValueError, "embeddings must hold at least 2 rows, got [1, 3]",
            metrics.uniformity, X[:1]),
    refused(ValueError, "far must be 0 < low < high <= 1, got (1, 10)", metrics.opis, X, Y,
            far=(1, 10)),
    # Numbers and bools of numpy
    accepted(F.triplet_margin_loss, X, Y, margin=(numpy.float32(0.5), 0.5),
             normalize=(numpy.False_, False)),
    accepted(F.icnn_loss, X, Y, k=(numpy.int64(3), 3), neighbours=(numpy.int32(5), 5)),
    accepted(F.prototypes, X, Y, num_classes=(numpy.int64(4), 4)),
    accepted(F.cosface_loss, X, W, Y, margin=(numpy.float64(0.25), 0.25),
             scale=(numpy.float32(8), 8.0)),
    accepted(metrics.uniformity, X, t=(numpy.float32(2), 2.0), max_pairs=(numpy.int64(99), 99)),
    accepted(metrics.opis, X, Y, num_thresholds=(numpy.int64(11), 11),
             bounds_samples=(numpy.int64(100), 100)),
    # Labels of any integer type
    accepted(F.tcm_loss, X, labels=(Y.int(), Y)),
    accepted(metrics.tolerance, X, labels=(Y.to(torch.uint8), Y)),
)  # fmt: skip
