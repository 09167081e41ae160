"""Gaussian naive Bayes."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.nn import GaussianNaiveBayes

X, Y = torch.randn(6, 2), torch.arange(6) % 3


def fitted(y=Y, **options):
    return GaussianNaiveBayes(2, 3, **options).partial_fit(X, y)(X)


ROWS = (
    refused(ValueError, "num_features must be at least 1, got 0", GaussianNaiveBayes, 0, 3),
    refused(TypeError, "num_classes must be an integer, got float", GaussianNaiveBayes, 2, 3.0),
    refused(ValueError, "var_smoothing must be finite and >= 0, got nan",
            GaussianNaiveBayes, 2, 3, float("nan")),
    refused(ValueError, "smoothing_mode must be one of absolute, relative, got 'sklearn'",
            GaussianNaiveBayes, 2, 3, smoothing_mode="sklearn"),
    refused(TypeError, "x must be a Tensor, got list",
            GaussianNaiveBayes(2, 3).partial_fit, [[1.0]], Y),
    refused(ValueError, "x must have 4 features, got [6, 2]",
            GaussianNaiveBayes(4, 3).partial_fit, X, Y),
    refused(IndexError, "y -1 is out of range for 3 classes",
            GaussianNaiveBayes(2, 3).partial_fit, X, Y - 1),
    refused(TypeError, "y must hold integers, got torch.float32",
            GaussianNaiveBayes(2, 3).partial_fit, X, Y.float()),
    refused(RuntimeError, "there are no samples yet: call partial_fit first",
            GaussianNaiveBayes(2, 3), X),
    accepted(fitted, y=(Y.to(torch.uint8), Y), shared_variance=(np.False_, False)),
)  # fmt: skip
