from pyloss.nn.attention import TensorAttention
from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
)
from pyloss.nn.contrastive import (
    CLIPLoss,
    DCLLoss,
    HardInfoNCELoss,
    InfoNCELoss,
    NTXentLoss,
    SigLIPLoss,
    SimpleContrastiveLoss,
    SupervisedContrastiveLoss,
)
from pyloss.nn.dro import KLDROLoss
from pyloss.nn.ensemble import EnsLoss
from pyloss.nn.grad_cache import GradCache
from pyloss.nn.groco import GroCoLoss
from pyloss.nn.linear import LinearCrossEntropyLoss
from pyloss.nn.long_tail import LogitAdjustedCrossEntropyLoss
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
from pyloss.nn.naive_bayes import GaussianNaiveBayes
from pyloss.nn.normalized import NormalizedLogisticLoss
from pyloss.nn.ranking import (
    ApproxNDCGLoss,
    LambdaLoss,
    ListMLELoss,
    ListNetLoss,
    NeuralNDCGLoss,
)
from pyloss.nn.relaxed_sort import (
    NeuralSort,
    SoftSort,
)
from pyloss.nn.segmentation import (
    DiceCELoss,
    SoftDiceLoss,
)
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
from pyloss.nn.sogclr import (
    ISogCLRLoss,
    SogCLRLoss,
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
    "CLIPLoss",
    "ChamferSetLoss",
    "CompSumLoss",
    "ContrastivePairLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "DCLLoss",
    "DiceCELoss",
    "DiffSortNet",
    "DiffTopkNet",
    "EnsLoss",
    "FocalLoss",
    "GaussianNaiveBayes",
    "GeneralizedCrossEntropyLoss",
    "GradCache",
    "GroCoLoss",
    "HardInfoNCELoss",
    "HungarianSetLoss",
    "ICNNLoss",
    "ISogCLRLoss",
    "InfoNCELoss",
    "KLDROLoss",
    "LambdaLoss",
    "LinearCrossEntropyLoss",
    "ListMLELoss",
    "ListNetLoss",
    "LogitAdjustedCrossEntropyLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NeuralNDCGLoss",
    "NeuralSort",
    "NormalizedLogisticLoss",
    "OrderSearchSchedule",
    "PointerDecoder",
    "Pointers",
    "ProtoTripletLoss",
    "ReadProcess",
    "ReadProcessWrite",
    "SigLIPLoss",
    "SimpleContrastiveLoss",
    "SinkhornSetLoss",
    "SoftDiceLoss",
    "SoftSort",
    "SogCLRLoss",
    "SortingCrossEntropyLoss",
    "SpearmanLoss",
    "SupervisedContrastiveLoss",
    "TensorAttention",
    "ThresholdConsistentMarginLoss",
    "TopKCrossEntropyLoss",
    "TripletMarginLoss",
]
