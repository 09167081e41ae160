"""Cross entropy and its relatives, of logits or of a linear layer's output.

The functions of pyloss, from the same sources; its documentation is theirs.
"""

from . import layers
from .functional.classification import (
    RowStats,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
    label_relaxation_loss,
    poly1_loss,
)
from .functional.linear import fused_linear_cross_entropy, token_logprobs

__all__ = [
    "RowStats",
    "comp_sum_loss",
    "focal_loss",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "label_relaxation_loss",
    "layers",
    "poly1_loss",
    "token_logprobs",
]
