"""Every module of pyloss, flat."""

from pyloss.nn.attention import TensorAttention
from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
)
from pyloss.nn.linear import LinearCrossEntropyLoss

__all__ = [
    "CompSumLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "TensorAttention",
]
