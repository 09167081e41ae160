"""Reductions over segments, and the conversions of pyloss.segment."""

from __future__ import annotations

import numpy as np
import torch

import pyloss.functional as F
from messages._table import accepted, refused
from pyloss.segment import offsets_from_index, offsets_from_lengths

X, OFFSETS = torch.linspace(-1.0, 2.0, 5), torch.tensor([0, 2, 5])
INDEX = torch.tensor([1, 0, 0, 1, 1])

ROWS = (
    refused(ValueError, "index must not decrease: order = index.argsort(stable=True) sorts it, and "
            "the values, by segment", offsets_from_index, INDEX),
    refused(RuntimeError, "index must be int32 or int64, got torch.float32",
            offsets_from_index, INDEX.float()),
    refused(ValueError, "index must be at least 0 and less than the number of segments, 1",
            offsets_from_index, INDEX.sort().values, 1),
    refused(ValueError, "lengths must not be negative", offsets_from_lengths, INDEX - 1),
    refused(ValueError, "offsets must start at 0 and end at the number of values, 5",
            F.segment_reduce, X, INDEX),
    refused(ValueError, "reduce must be one of sum, mean, min, max, prod, logsumexp, got 'amax'",
            F.segment_reduce, X, OFFSETS, "amax"),
    refused(ValueError, "op must be callable or one of sum, max, logsumexp, prod, got 'mean'",
            F.segment_tree_reduce, X, OFFSETS, "mean"),
    refused(TypeError, "x must be a dense Tensor, got one of layout torch.sparse_coo",
            F.segment_softmax, X.to_sparse(), OFFSETS),
    refused(NotImplementedError, "\"segment_moments\" not implemented for 'Long'",
            F.segment_moments, INDEX, OFFSETS),
    accepted(F.segment_tree_reduce, X, OFFSETS, torch.add, identity=(np.float32(0.5), 0.5),
             max_length=(np.int64(3), 3)),
)  # fmt: skip
