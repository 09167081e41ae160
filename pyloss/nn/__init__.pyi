from pyloss.nn.attention import TensorAttention
from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
)
from pyloss.nn.groco import GroCoLoss
from pyloss.nn.linear import LinearCrossEntropyLoss
from pyloss.nn.metric_learning import (
    ArcFaceLoss,
    ContrastivePairLoss,
    CosFaceLoss,
    ICNNLoss,
    MultiSimilarityLoss,
    ProtoTripletLoss,
    ThresholdConsistentMarginLoss,
    TripletMarginLoss,
)
from pyloss.nn.ranking import (
    ApproxNDCGLoss,
    LambdaLoss,
    ListMLELoss,
    ListNetLoss,
    NeuralNDCGLoss,
)
from pyloss.nn.relaxed_sort import NeuralSort, SoftSort
from pyloss.nn.segmentation import DiceCELoss, SoftDiceLoss
from pyloss.nn.sets import (
    ChamferSetLoss,
    HungarianSetLoss,
    OrderSearchSchedule,
    PointerDecoder,
    Pointers,
    ReadProcess,
    ReadProcessWrite,
    SinkhornSetLoss,
)
from pyloss.nn.sorting import (
    DiffSortNet,
    DiffTopkNet,
    SortingCrossEntropyLoss,
    SpearmanLoss,
)
from pyloss.nn.topk import TopKCrossEntropyLoss
from pyloss.nn.topology import BettiMatchingLoss

__all__ = [
    "ApproxNDCGLoss",
    "ArcFaceLoss",
    "BettiMatchingLoss",
    "ChamferSetLoss",
    "CompSumLoss",
    "ContrastivePairLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiffSortNet",
    "DiffTopkNet",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "GroCoLoss",
    "HungarianSetLoss",
    "ICNNLoss",
    "LambdaLoss",
    "LinearCrossEntropyLoss",
    "ListMLELoss",
    "ListNetLoss",
    "MultiSimilarityLoss",
    "NeuralNDCGLoss",
    "NeuralSort",
    "OrderSearchSchedule",
    "PointerDecoder",
    "Pointers",
    "ProtoTripletLoss",
    "ReadProcess",
    "ReadProcessWrite",
    "SinkhornSetLoss",
    "SoftDiceLoss",
    "SoftSort",
    "SortingCrossEntropyLoss",
    "SpearmanLoss",
    "TensorAttention",
    "ThresholdConsistentMarginLoss",
    "TopKCrossEntropyLoss",
    "TripletMarginLoss",
]
