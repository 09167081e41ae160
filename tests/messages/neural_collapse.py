"""Neural collapse: closed forms, the perturbed model, metrics."""

from __future__ import annotations

import numpy as np
import torch

from messages._table import accepted, refused
from pyloss.analysis import (
    central_path,
    gof,
    linear_ufm_optimum,
    perturbed_ufm,
    simplex_etf,
    ufm_minimizer,
)
from pyloss.functional import ufm_loss
from pyloss.metrics import NeuralCollapse, NeuralCollapseMetrics, equiangle, nc1

X, Y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2


def minimum(class_sizes=(5, 3), lam_w=1e-3, **options):
    return ufm_minimizer(class_sizes, lam_w, 1e-3, **options)


def measured(y=Y, weight=None, **options) -> NeuralCollapse:
    metrics = NeuralCollapseMetrics(2, 3, **options)
    metrics.update(X, y)
    return [t.nan_to_num(9.0) for t in metrics.compute(weight)]


ROWS = (
    refused(TypeError, "class_sizes must be numbers of samples, got 'many'", minimum, "many"),
    refused(ValueError, "class_sizes must be (K,), got []", minimum, 5),
    refused(ValueError, "class_sizes must be finite and > 0, got [5.0, 0.0]", minimum, [5, 0]),
    refused(ValueError, "depth must be >= 1, got 0", minimum, depth=0),
    refused(ValueError, "lam_w must be a number or one for each of 3 layers, got [0.1, 0.1]",
            minimum, lam_w=[0.1, 0.1], depth=3),
    refused(ValueError, "lam_w must be finite and > 0, got 0.0", minimum, lam_w=0.0),
    refused(ValueError, "loss must be one of mse, ce, got 'hinge'", minimum, loss="hinge"),
    refused(TypeError, "bias must be a bool", minimum, bias=torch.zeros(2)),
    refused(ValueError, "cross entropy has a closed form for depth 1 alone, got 2",
            minimum, [4, 4], depth=2, loss="ce"),
    refused(ValueError, "cross entropy has a closed form for equal class sizes alone, got [5.0",
            minimum, loss="ce"),
    refused(ValueError, "counts must be (K,), got []", linear_ufm_optimum, 3, 0.1, 0.1),
    refused(ValueError, "layers must be >= 1, got 0", linear_ufm_optimum, [3], 0.1, 0.1, 0),
    refused(ValueError, "lambda_w must be finite and > 0", linear_ufm_optimum, [3], -0.1, 0.1),
    refused(TypeError, "lambda_h must be a number, got str", linear_ufm_optimum, [3], 0.1, "x"),
    refused(ValueError, "num_classes must be >= 2, got 1", simplex_etf, 1),
    refused(ValueError, "dim must be >= 3, got 2", simplex_etf, 4, 2),
    refused(ValueError, "lengths must be >= 0, got [1.0, -1.0]", gof, [1.0, -1.0]),
    refused(ValueError, "lengths must be (K,), got [8, 3]", gof, X),
    refused(TypeError, "lengths must be numbers, got 'long'", gof, "long"),
    refused(ValueError, "dim must be >= 2, got 1", gof, [1.0, 2.0], 1),
    refused(ValueError, "beta must be finite and > 0, got 0.0", perturbed_ufm, X, Y, 0.1, 0.0),
    refused(ValueError, "lam_w must be finite and > 0", perturbed_ufm, X, Y, 0.0, 1.0),
    refused(ValueError, "lam_h must be finite and >= 0", perturbed_ufm, X, Y, 0.1, 1.0, -1.0),
    refused(ValueError, "max_iter must be >= 1, got 0", perturbed_ufm, X, Y, 0.1, 1, max_iter=0),
    refused(ValueError, "features must hold samples, each with a class",
            perturbed_ufm, X, 0 * Y - 100, 0.1, 1.0, num_classes=2),
    refused(ValueError, "features must hold samples, each with a class",
            central_path, X[:0], Y[:0], 0.1),
    refused(ValueError, "step_size must be finite and > 0", central_path, X, Y, 0.1, 3, 0.0),
    refused(ValueError, "steps must be >= 0, got -1", central_path, X, Y, 0.1, -1),
    refused(IndexError, "label 1 is out of range for 1 classes",
            central_path, X, Y, 0.1, num_classes=1),
    refused(ValueError, "target must be 'etf', 'of', or three targets for classifier, means and "
            "product, got Tensor", NeuralCollapseMetrics, 2, 3, X),
    refused(TypeError, "target must be a Tensor, got float",
            NeuralCollapseMetrics, 2, 3, (1.0, 2.0, 3.0)),
    accepted(minimum, class_sizes=(np.array([5, 3]), [5, 3]), depth=(np.int64(2), 2),
             lam_w=(np.array([0.1, 0.2]), [0.1, 0.2]), bias=(np.True_, True)),
    accepted(minimum, class_sizes=(torch.tensor([5, 3]), [5, 3]), lam_w=(np.float32(0.5), 0.5)),
    accepted(simplex_etf, 3, dim=(np.int64(4), 4)),
    accepted(nc1, X, Y, num_classes=(np.int64(2), None), ignore_index=(np.int64(-1), -100)),
    accepted(equiangle, X[:2], center=(torch.zeros(3), None)),
    accepted(measured, y=(Y.to(torch.uint8), Y), ignore_index=(np.int64(-100), -100),
             weight=(X[:2].double(), X[:2])),
    accepted(measured, y=(torch.where(Y > 0, 1, -100), Y), ignore_index=(-100, 0)),
    accepted(ufm_loss, X[:2], X, Y, lam_w=(np.float64(0.5), [0.5]), lam_h=(np.float32(0.5), 0.5)),
)  # fmt: skip
