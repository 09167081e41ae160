"""What the Specs of labelled embeddings share: inputs, and bad ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.testing import make_logits
from specs._spec import F64, Bad

LABELS = torch.tensor([4, -1, 4, 7, -1, 4])
CLASSES = torch.tensor([2, 0, 1, 2, 2, 0])


def embeddings(rows: int = 6, dim: int = 3, seed: int = 0) -> Tensor:
    return make_logits((rows, dim), F64, scale=1.0, seed=seed)


def unit(x: Tensor, normalize: bool) -> Tensor:
    return torch.nn.functional.normalize(x, dim=1) if normalize else x


def reduced(each: Tensor, reduction: str) -> Tensor:
    return {"none": each, "mean": each.mean(), "sum": each.sum()}[reduction]


X = embeddings()
BAD_X = (
    Bad(TypeError, "embeddings must be a Tensor, got list", dict(embeddings=[1.0])),
    Bad(TypeError, "embeddings must be floating, got torch.int64", dict(embeddings=X.long())),
    Bad(ValueError, r"embeddings must be \(N, D\), got \[6\]", dict(embeddings=X[:, 0])),
    Bad(TypeError, "embeddings must be a dense", dict(embeddings=X.to_sparse())),
)
BAD_LABELS = (
    Bad(TypeError, "labels must be a Tensor, got list", dict(labels=[1])),
    Bad(TypeError, "labels must hold integers, got torch.float64", dict(labels=X[:, 0])),
    Bad(ValueError, r"labels must have the shape \[6\], got \[5\]", dict(labels=LABELS[:5])),
    Bad(RuntimeError, "same device, but labels is on meta", dict(labels=LABELS.to("meta"))),
)
BAD_REDUCTION = Bad(ValueError, "avg is not a valid value for reduction", dict(reduction="avg"))
BAD_NORMALIZE = Bad(TypeError, "normalize must be a bool", dict(normalize="l2"))
