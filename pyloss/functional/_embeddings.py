"""What losses and metrics of labelled embeddings share, above all which pairs are positive."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._row_checks import check_integers as check_integers
from pyloss.functional._row_checks import check_labels, check_rows
from pyloss.functional._sums import log_summed as log_summed
from pyloss.functional._sums import summed as summed
from pyloss.ops._launch import accumulator_dtype
from pyloss.ops._launch import without_autocast as without_autocast
from pyloss.ops.similarity_softmax import similarity_counts as near_pairs  # noqa: F401
from pyloss.ops.similarity_softmax import similarity_softmax as similarity_softmax

DISTANCES = ("euclidean", "squared", "cosine")


def alike(x: Tensor, like: Tensor) -> bool:
    """Whether their dtypes may be compared: under autocast what is kept is in float32, such as
    the directions of classes, and what a network gives in a half type."""
    if checks.autocast_on(like):
        return accumulator_dtype(x.dtype) == accumulator_dtype(like.dtype)
    return x.dtype == like.dtype


def prepared(x: Tensor, normalize: bool) -> Tensor:
    """In float32 at least, of length 1 if asked for; a row of zeros stays."""
    x = x.to(accumulator_dtype(x.dtype))
    return F.normalize(x, dim=1) if normalize else x


class Labelled(NamedTuple):
    """Embeddings that are compared: anchors, and what each of them is compared with."""

    x: Tensor  # (N, D), float32 at least
    y: Tensor  # (M, D): the same tensor where the anchors are compared with each other
    labels: Tensor  # (N,), int64
    others: Tensor  # (M,), int64
    dtype: torch.dtype  # of the result

    def first(self) -> int:
        """Of the anchors in y, as the op has it; -1: they are not in it."""
        return 0 if self.y is self.x else -1

    def kinds(self) -> tuple[Tensor, Tensor]:
        """Which pairs are positive, which negative, (N, M)."""
        same = self.labels[:, None] == self.others
        if self.y is not self.x:
            return same, ~same
        own = torch.eye(self.x.shape[0], dtype=torch.bool, device=self.x.device)
        return same & ~own, ~same

    def distances(self, kind: str) -> Tensor:
        """(N, M)."""
        s = self.x @ self.y.mT
        if kind == "cosine":
            return 1 - s
        square = (self.x * self.x).sum(1)[:, None] + (self.y * self.y).sum(1) - 2 * s
        # Of equal embeddings the distance is 0, and so is its gradient, as in torch.cdist. Not
        # "square > 0", which a NaN would not be.
        none = square <= 0
        square = torch.where(none, 0.0, square)
        if kind == "squared":
            return square
        return torch.where(none, 0.0, torch.where(none, 1.0, square).sqrt())


def labelled(embeddings, labels, ref_emb, ref_labels, normalize: bool = True) -> Labelled:
    """Checked; to be compared under ``without_autocast``."""
    check_rows("embeddings", embeddings)
    check_labels(labels, embeddings)
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("give both ref_emb and ref_labels, or neither")
    dtype = checks.result_dtype(embeddings.dtype, embeddings)
    own = ref_emb is None or (ref_emb is embeddings and ref_labels is labels)
    x, labels = prepared(embeddings, normalize), labels.long()
    if own:
        return Labelled(x, x, labels, labels, dtype)
    check_rows("ref_emb", ref_emb)
    if not alike(ref_emb, embeddings) or ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"ref_emb must be {embeddings.dtype} (M, {embeddings.shape[1]}) as embeddings, got "
            f"{ref_emb.dtype} {list(ref_emb.shape)}"
        )
    checks.check_device("ref_emb", ref_emb, embeddings, "embeddings")
    check_labels(ref_labels, ref_emb, "ref_labels", "ref_emb")
    return Labelled(x, prepared(ref_emb, normalize), labels, ref_labels.long(), dtype)
