from pyloss.nn.attention import TensorAttention
from pyloss.nn.classification import (
    CompSumLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    LabelRelaxationLoss,
    Poly1Loss,
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
from pyloss.nn.grad_cache import GradCache
from pyloss.nn.groco import GroCoLoss
from pyloss.nn.ldr import ALDRLoss, LDRLoss
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
    "ALDRLoss",
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
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "GradCache",
    "GroCoLoss",
    "HardInfoNCELoss",
    "HungarianSetLoss",
    "ICNNLoss",
    "ISogCLRLoss",
    "InfoNCELoss",
    "LDRLoss",
    "LabelRelaxationLoss",
    "LambdaLoss",
    "LinearCrossEntropyLoss",
    "ListMLELoss",
    "ListNetLoss",
    "MultiSimilarityLoss",
    "NTXentLoss",
    "NeuralNDCGLoss",
    "NeuralSort",
    "OrderSearchSchedule",
    "PointerDecoder",
    "Pointers",
    "Poly1Loss",
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
