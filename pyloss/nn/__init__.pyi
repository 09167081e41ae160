from pyloss.nn.attention import TensorAttention
from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
)
from pyloss.nn.groco import GroCoLoss
from pyloss.nn.linear import LinearCrossEntropyLoss
from pyloss.nn.relaxed_sort import NeuralSort, SoftSort
from pyloss.nn.segmentation import DiceCELoss, SoftDiceLoss
from pyloss.nn.sorting import (
    DiffSortNet,
    DiffTopkNet,
    SortingCrossEntropyLoss,
    SpearmanLoss,
)
from pyloss.nn.topk import TopKCrossEntropyLoss
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
    "GroCoLoss",
    "LinearCrossEntropyLoss",
    "NeuralSort",
    "SoftDiceLoss",
    "SoftSort",
    "SortingCrossEntropyLoss",
    "SpearmanLoss",
    "TensorAttention",
    "TopKCrossEntropyLoss",
]
