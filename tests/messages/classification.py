"""Losses of rows of logits."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch

import pyloss
from messages._table import accepted, refused
from pyloss.nn import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    LabelRelaxationLoss,
    Poly1Loss,
)

X, Y = torch.linspace(-1.0, 2.0, 15).reshape(3, 5), torch.tensor([0, 3, 1])
CE, FOCAL = pyloss.fused_cross_entropy, pyloss.focal_loss
MODULES = (CrossEntropyLoss, CompSumLoss, GeneralizedCrossEntropyLoss, FocalLoss)


def assigned(*args, **options) -> torch.Tensor:
    """As by F.cross_entropy = pyloss.fused_cross_entropy: what torch's module calls."""
    before, torch.nn.functional.cross_entropy = torch.nn.functional.cross_entropy, CE
    try:
        return torch.nn.CrossEntropyLoss(**options)(*args)
    finally:
        torch.nn.functional.cross_entropy = before


def both_calls(function: Callable) -> tuple:
    return (
        refused(TypeError, "ignore_index must be an integer, got None (NoneType)",
                function, X, Y, ignore_index=None),
        refused(TypeError, "ignore_index must be an integer, got -100.0 (float)",
                function, X, Y, ignore_index=-100.0),
        refused(TypeError, "ignore_index must be an integer, got True (bool)",
                function, X, Y, ignore_index=True),
        refused(ValueError, "avg is not a valid value for reduction",
                function, X, Y, reduction="avg"),
        refused(ValueError, "['mean'] is not a valid value for reduction",
                function, X, Y, reduction=["mean"]),
        refused(RuntimeError, "weight tensor should be defined either for all 5 classes or no "
                "classes but got weight tensor of shape: []",
                function, X, Y, weight=torch.tensor(1.0)),
        refused(RuntimeError, "expected scalar type Float for weight but found Double",
                function, X, Y, weight=torch.ones(5, dtype=torch.float64)),
        refused(RuntimeError, "expected scalar type Half or Float for weight but found Double",
                function, X.half(), Y, weight=torch.ones(5, dtype=torch.float64)),
        refused(TypeError, "weight must be a Tensor, got list", function, X, Y, weight=[1.0] * 5),
        refused(NotImplementedError, "not implemented for 'Long': input must be floating",
                function, X.long(), Y),
        refused(TypeError, "input must be a dense Tensor, got one of layout torch.sparse_coo",
                function, X.to_sparse(), Y),
        refused(TypeError, "target must be a Tensor or a MixUp tuple (y, y2, lam), got ndarray",
                function, X, Y.numpy()),
        refused(TypeError, "temperature must be a number, got Tensor",
                function, X, Y, temperature=torch.tensor(2.0)),
        refused(TypeError, "temperature must be a number, got str",
                function, X, Y, temperature="2"),
        refused(TypeError, "return_stats must be a sequence of names, got NoneType",
                function, X, Y, return_stats=None),
        refused(ValueError, "num_items must be one number, got shape [2]",
                function, X, Y, num_items=torch.ones(2)),
        accepted(function, X, Y, ignore_index=(numpy.int64(3), 3)),
        accepted(function, X, Y, num_items=(numpy.int64(4), 4)),
        accepted(function, X, Y, num_items=(numpy.float32(4.0), 4.0)),
        accepted(function, X, Y, temperature=(numpy.int32(2), 2), z_loss=(numpy.float64(0.1), 0.1)),
        accepted(function, X, Y, softcap=(numpy.float64(3.0), 3.0), inplace=(numpy.False_, False)),
    )  # fmt: skip


def of_module(module: type) -> tuple:
    """What a module is told when it is made; at 6750e06 it was when it was called."""
    return (
        refused(ValueError, "avg is not a valid value for reduction", module, reduction="avg"),
        refused(ValueError, "empty must be 'nan' or 'zero', got 'one'", module, empty="one"),
        refused(ValueError, "temperature must be finite and > 0, got -1.0",
                module, temperature=-1.0),
        refused(ValueError, "softcap must be finite and > 0, got 0.0", module, softcap=0.0),
        refused(ValueError, "z_loss must be finite and >= 0, got nan",
                module, z_loss=float("nan")),
        refused(TypeError, "logit_scale must be a number, got str", module, logit_scale="1"),
        refused(ValueError, "unknown statistic 'loss' in return_stats",
                module, return_stats=("loss",)),
        refused(ValueError, "loss_dtype must be a floating dtype, got torch.int64",
                module, loss_dtype=torch.int64),
        refused(TypeError, "ignore_index must be an integer, got None (NoneType)",
                module, ignore_index=None),
        refused(TypeError, "weight must be a Tensor, got list", module, weight=[1.0, 2.0]),
        refused(RuntimeError, "weight must have one entry for each class, (C), got shape []",
                module, weight=torch.tensor(1.0)),
        refused(TypeError, f"{module.__name__} got an unexpected keyword argument 'reductoin'",
                module, reductoin="sum"),
        accepted(lambda *args, **options: module(**options)(*args), X, Y,
                 ignore_index=(numpy.int64(3), 3), temperature=(numpy.float64(2.0), 2.0)),
    )  # fmt: skip


ROWS = (
    *both_calls(CE),
    *both_calls(FOCAL),
    *(row for module in MODULES for row in of_module(module)),
    refused(RuntimeError, "class labels must be integers, target.long()", CE, X, Y.float()),
    refused(RuntimeError, "class labels must be integers, target.long()",
            CE, X, Y.float()[:, None]),
    refused(ValueError, "focal_loss takes class indices or a MixUp tuple, not probabilities",
            FOCAL, X, Y.float()),
    refused(RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.2",
            CE, X, Y, label_smoothing=1.2),
    refused(TypeError, "label_smoothing must be a number, got str",
            CE, X, Y, label_smoothing="0.1"),
    refused(TypeError, "label_smoothing must be a number, got NoneType",
            CE, X, Y, label_smoothing=None),
    refused(TypeError, "gamma must be a number, got Tensor", FOCAL, X, Y, gamma=torch.tensor(2.0)),
    refused(TypeError, "lam must be a number, got str", CE, X, (Y, Y, "half")),
    refused(ValueError, "a MixUp target is (y, y2, lam), got 2 items", CE, X, (Y, Y)),
    refused(RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.2",
            CrossEntropyLoss, label_smoothing=1.2),
    refused(ValueError, "truncate must be a probability in (0, 1], got 2",
            CrossEntropyLoss, truncate=2),
    refused(ValueError, "truncate needs class indices without label smoothing",
            CrossEntropyLoss, truncate=0.5, label_smoothing=0.1),
    refused(ValueError, "tau must be finite and >= 0, got -1", CompSumLoss, tau=-1),
    refused(ValueError, "gamma must be finite and >= 0, got -1", FocalLoss, gamma=-1),
    refused(ValueError, "q must be finite and > 0, got 0", GeneralizedCrossEntropyLoss, q=0),
    refused(ValueError, "epsilon must be finite and >= -1, got -2", Poly1Loss, -2),
    refused(ValueError, "alpha must be in [0, 1), got 1", LabelRelaxationLoss, 1),
    refused(TypeError, "LabelRelaxationLoss got an unexpected keyword argument 'label_smoothing'",
            LabelRelaxationLoss, label_smoothing=0.1),
    refused(TypeError, "entropy_weight must be a number, got str", CE, X, Y, entropy_weight="1"),
    refused(ValueError, "entropy_weight must be finite",
            CrossEntropyLoss, entropy_weight=float("inf")),
    refused(ValueError, "k must be a probability in (0, 1], got 2",
            GeneralizedCrossEntropyLoss, k=2),
    refused(TypeError, "ignore_index must be an integer, got None (NoneType)",
            assigned, X, Y, ignore_index=None),
    refused(ValueError, "avg is not a valid value for reduction", assigned, X, Y, reduction="avg"),
    accepted(CE, X, Y, label_smoothing=(numpy.float64(0.1), 0.1), tau=(numpy.float32(1.5), 1.5)),
    accepted(CE, X, Y, label_smoothing=(torch.tensor(0.5), 0.5)),
    accepted(CE, X, Y, truncate=(numpy.float64(0.3), 0.3)),
    accepted(FOCAL, X, Y, gamma=(numpy.int64(2), 2)),
)  # fmt: skip
