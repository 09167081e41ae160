"""Every module of pyloss, flat."""

from pyloss.nn.attention import TensorAttention
from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
)
from pyloss.nn.linear import LinearCrossEntropyLoss
from pyloss.nn.segmentation import DiceCELoss, SoftDiceLoss
from pyloss.nn.sorting import (
    DiffSortNet,
    DiffTopkNet,
    SortingCrossEntropyLoss,
    SpearmanLoss,
)
from pyloss.nn.topology import BettiMatchingLoss

__all__ = [
    "BettiMatchingLoss",
    "CompSumLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiffSortNet",
    "DiffTopkNet",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "SoftDiceLoss",
    "SortingCrossEntropyLoss",
    "SpearmanLoss",
    "TensorAttention",
]
