"""Frames of clouds and graphs, and averages over them."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.functional import laplacian_sort_frame, pca_frames
from pyloss.nn import FrameAverage

X = torch.arange(30.0).reshape(2, 5, 3).sin()
LINE = torch.arange(4.0).reshape(1, 4, 1).expand(1, 4, 3)
PATH = torch.tensor([[0, 1], [1, 2]])


def invariant(p):
    return p.square().sum((1, 2))


ROWS = (
    refused(TypeError, "x must be a Tensor, got ndarray", pca_frames, X.numpy()),
    refused(NotImplementedError, '"pca_frames" not implemented for',
            pca_frames, X.to(torch.float8_e4m3fn)),
    refused(ValueError, "x must be (P, d) beside offsets, got shape [2, 5, 3]",
            pca_frames, X, offsets=torch.tensor([0, 5, 10])),
    refused(ValueError, "group must be one of O, SO, E, SE, got 'se'", pca_frames, X, group="se"),
    refused(ValueError, "weight must have a number for each point, [2, 5], got shape [2, 5, 1]",
            pca_frames, X, weight=X[..., :1]),
    refused(ValueError, "a cloud without points has no frame; degenerate='random' lets it have any",
            pca_frames, X[0], offsets=torch.tensor([0, 0, 5])),
    refused(ValueError, "offsets must not decrease",
            pca_frames, X[0], offsets=torch.tensor([0, 3, 1, 5])),
    refused(ValueError, "the principal axes of cloud 0 are not unique: two eigenvalues",
            pca_frames, LINE, degenerate="raise"),
    refused(UserWarning, "degenerate='random' draws such axes", pca_frames, LINE),
    refused(UserWarning, "some clouds are not unique", FrameAverage(invariant), LINE),
    refused(TypeError, "gap_tol must be a number, got str", pca_frames, X, gap_tol="1e-4"),
    refused(TypeError, "detach must be a bool, got str", pca_frames, X, detach="no"),
    refused(TypeError, "generator must be a torch.Generator, got int", pca_frames, X, generator=3),
    refused(TypeError, "generator must be a torch.Generator, got int",
            laplacian_sort_frame, PATH, 3, generator=3),
    refused(TypeError, "backbone must be callable, got NoneType", FrameAverage, None),
    refused(TypeError, "dim must be an integer, got float", FrameAverage, invariant, dim=3.0),
    refused(ValueError, "group must be one of O, SO, E, SE, got 3", FrameAverage, invariant, 3),
    refused(ValueError, "x must be (B, N, 2), got shape [2, 5, 3]",
            FrameAverage(invariant, dim=2), X),
    refused(ValueError, "extra argument 0 must have the 2 clouds in its first dimension, or none; "
            "got shape [3]", FrameAverage(lambda p, a: p), X, torch.ones(3)),
    refused(ValueError, "extra argument 1 must have the 2 clouds or the 5 points in its first "
            "dimension, or none; got shape [3]", FrameAverage(lambda p, a, b, offsets: p), X[0],
            1, torch.ones(3), offsets=torch.tensor([0, 3, 5])),
    refused(ValueError, "the backbone must return 16 entries in the first dimension, for 8 frames; "
            "got shape [2]", FrameAverage(lambda p: p[:2, 0, 0]), X),
    refused(ValueError, "the backbone must return [3] in the last dimensions for "
            "out_type='vector', got shape [16, 5]",
            FrameAverage(lambda p: p[..., 0], out_type="vector"), X),
    refused(ValueError, "the backbone must return [3, 3] in the last dimensions for "
            "out_type='tensor2', got shape [16, 5, 3]",
            FrameAverage(lambda p: p, out_type="tensor2"), X),
    refused(TypeError, "the result of the backbone must be a Tensor, got tuple",
            FrameAverage(lambda p: (p, p)), X),
    refused(ValueError, "edge_index must name nodes from 0 to num_nodes - 1 = 1, got 0 to 2",
            laplacian_sort_frame, PATH, 2),
    refused(ValueError, "edge_index must be (2, E), got shape [3, 2]",
            laplacian_sort_frame, torch.cat([PATH, PATH[:1]]), 3),
    refused(TypeError, "max_frames must be an integer, got float",
            laplacian_sort_frame, PATH, 3, max_frames=2.5),
    accepted(pca_frames, X, gap_tol=(np.float32(0.01), float(np.float32(0.01)))),
    accepted(pca_frames, X.flatten(0, 1), offsets=(torch.tensor([0, 5, 10], dtype=torch.int32),
                                                   torch.tensor([0, 5, 10]))),
    accepted(pca_frames, X, weight=(torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 5))),
    accepted(lambda **o: FrameAverage(invariant, **o)(X), dim=(np.int64(3), 3),
             stochastic=(np.False_, False)),
    accepted(laplacian_sort_frame, PATH, num_nodes=(np.int32(3), 3), decimals=(np.int64(2), 2)),
)  # fmt: skip
