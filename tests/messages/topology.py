"""Persistence, Betti matching, its loss and metrics."""

from __future__ import annotations

import math

import numpy as np
import torch

import pyloss
from messages._table import accepted, refused
from pyloss.metrics import BettiMatchingError, BettiNumberError

G = torch.Generator().manual_seed(0)
X, MASK = torch.rand(2, 1, 6, 5, generator=G), torch.rand(2, 1, 6, 5, generator=G) > 0.5
LABELS = torch.randint(3, (2, 6, 5), generator=G)
MATCHING = pyloss.betti_matching(X, MASK)
LOSS = pyloss.betti_matching_loss


def loss_of_a_matching(**options):
    return MATCHING.loss(**options)


def values(**options):
    return pyloss.persistence_pairs(X, **options).values


def cycle(**options):
    return MATCHING.representative_cycles(kind="unmatched", **options)


def prepared(**options):
    target = pyloss.BettiTarget.precompute(LABELS, **options)
    return LOSS(X.expand(-1, 3, -1, -1), target, ignore_index=target.ignore_index)


ROWS = (
    refused(TypeError, "threshold must be a number, got NoneType",
            pyloss.betti_number_error, X, MASK, None),
    refused(TypeError, "threshold must be a number, got NoneType",
            pyloss.betti_matching_error, X, MASK, threshold=None),
    refused(TypeError, "threshold must be a number, got NoneType", BettiNumberError, None),
    refused(TypeError, "threshold must be a number, got str", BettiMatchingError, "otsu"),
    refused(ValueError, "normalize needs binarize=True",
            BettiMatchingError, normalize=True, binarize=False),
    refused(ValueError, "spatial_dims must be 1, 2 or 3, got 4", BettiNumberError, spatial_dims=4),
    refused(IndexError, "item must be in 0..1, got 2", MATCHING.coordinates, "matched", 2, 0),
    refused(IndexError, "item must be in 0..1, got -1", MATCHING.essential, -1),
    refused(TypeError, "dims must be a sequence of integers or None, got 0",
            pyloss.betti_matching, X, MASK, dims=0),
    refused(TypeError, "weight must be a sequence of numbers or None, got 2.0",
            loss_of_a_matching, weight=2.0),
    refused(ValueError, "padding must not be NaN", pyloss.BettiTarget.precompute, MASK,
            padding=math.nan),
    refused(TypeError, "unexpected keyword argument 'reduction'", BettiNumberError, reduction="x"),
    refused(IndexError, "index must be that of one of", cycle, item=0, index=99),
    refused(IndexError, "bars, got -1", cycle, item=0, index=-1),
    refused(TypeError, "index must be an integer", cycle, item=0, index=0.0),
    refused(TypeError, "item must be an integer", cycle, item=0.0),
    refused(TypeError, "dim must be an integer", MATCHING.coordinates, "matched", 0, 1.0),
    refused(UserWarning, "(2, 6, 5) is taken for (N, C, length)", LOSS, X[:, 0], MASK[:, 0]),
    refused(UserWarning, "give spatial_dims=2", pyloss.BettiMatchingLoss(), X[:, 0], MASK[:, 0]),
    refused(UserWarning, "for logits give activation='sigmoid'", LOSS, 6 * X - 3, MASK),
    refused(UserWarning, "a mask of 0 and 255 must be divided by 255",
            LOSS, X, MASK.to(torch.uint8) * 255),
    refused(UserWarning, "target is a mask of 0 and 255",
            pyloss.BettiTarget.precompute, MASK.float() * 255),
    refused(ValueError, "ignore_index needs class indices or a mask of one channel, got a target "
            "of shape (2, 3, 6, 5)",
            LOSS, X.expand(-1, 3, -1, -1), MASK.expand(-1, 3, -1, -1), ignore_index=255),
    refused(TypeError, "ignore_index must be an integer", LOSS, X, MASK, ignore_index=255.0),
    # At construction
    refused(ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'average'",
            pyloss.BettiMatchingLoss, reduction="average"),
    refused(ValueError, "activation must be one of 'sigmoid', 'softmax', got 'relu'",
            pyloss.BettiMatchingLoss, activation="relu"),
    refused(ValueError, "padding must be None, one of", pyloss.BettiMatchingLoss, padding="zeros"),
    refused(ValueError, "min_persistence must be finite and at least 0, got -1",
            pyloss.BettiMatchingLoss, min_persistence=-1),
    refused(TypeError, "ignore_index must be an integer",
            pyloss.BettiMatchingLoss, ignore_index="255"),
    refused(TypeError, "dims must be a sequence of integers or None, got 1",
            pyloss.BettiMatchingLoss, dims=1),
    refused(ValueError, "dims must be integers in 0..2, got [3]", pyloss.BettiMatchingLoss,
            dims=[3]),
    refused(ValueError, "dims must be integers in 0..1, got [2]", pyloss.BettiMatchingLoss,
            dims=[2], spatial_dims=2),
    refused(ValueError, "weight must be finite and at least 0, got -1", pyloss.BettiMatchingLoss,
            weight=[1, -1]),
    refused(ValueError, "weight must have one entry per entry of dims [0], got [1.0, 2.0]",
            pyloss.BettiMatchingLoss, dims=[0], weight=[1, 2]),
    refused(ValueError, "weight must have one entry per entry of dims [0, 1, 2], got",
            pyloss.BettiMatchingLoss, weight=4 * [1]),
    refused(TypeError, "weight must be a sequence of numbers or None, got ['a']",
            pyloss.BettiMatchingLoss, weight=["a"]),
    refused(ValueError, "alpha must be finite and >= 0, got -1", pyloss.BettiMatchingLoss,
            alpha=-1),
    refused(TypeError, "alpha must be a number, got str", pyloss.BettiMatchingLoss, alpha="x"),
    refused(ValueError, "activation must keep the shape [2, 1, 6, 5], got [2, 6, 5]",
            LOSS, X, MASK, activation=lambda t: t[:, 0]),
    # Numbers and bools of numpy
    accepted(LOSS, X, MASK, min_persistence=(np.float32(0.25), 0.25), weight=(np.ones(2), None),
             matched_weight=(np.int64(2), 2), unmatched_weight=(np.float64(0.5), 0.5),
             essential=(np.True_, True), include_target_unmatched=(np.False_, False),
             include_background=(np.False_, False), dims=(np.array([1, 0]), [1, 0]),
             padding=(np.float32(0.25), 0.25), spatial_dims=(np.int64(2), 2)),
    accepted(LOSS, X, MASK, ignore_index=(np.uint8(1), 1)),
    accepted(values, essential=(np.True_, True), min_persistence=(np.float32(0.25), 0.25),
             spatial_dims=(np.int32(2), 2)),
    accepted(loss_of_a_matching, include_essential=(np.True_, True),
             matched_weight=(np.float32(0.5), 0.5), weight=(np.array([1, 2]), [1.0, 2.0]),
             min_persistence=(np.float16(0.25), 0.25)),
    accepted(cycle, item=(np.int64(0), 0), dim=(np.int8(0), 0), index=(np.int64(0), 0)),
    accepted(prepared, num_classes=(np.int64(3), 3), spatial_dims=(np.int64(2), 2),
             ignore_index=(np.int64(2), 2)),
    accepted(pyloss.betti_number_error, X, MASK, threshold=(np.float32(0.5), 0.5),
             include_background=(np.False_, False)),
    accepted(pyloss.betti_matching_error, X, MASK, normalize=(np.True_, True),
             binarize=(np.True_, True), threshold=(np.float64(0.5), 0.5)),
)  # fmt: skip
