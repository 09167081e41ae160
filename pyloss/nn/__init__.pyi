from pyloss.nn import init as init
from pyloss.nn import lie as lie
from pyloss.nn.aggregate import AggregateLoss
from pyloss.nn.aggregation import LCMAggregation
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
from pyloss.nn.dcdm import (
    PoissonNet2d,
    PoissonNet3d,
)
from pyloss.nn.dro import KLDROLoss
from pyloss.nn.ensemble import EnsLoss
from pyloss.nn.frames import FrameAverage
from pyloss.nn.gating import DynamicGate, GatedConv, GatedFlops, gated_flops
from pyloss.nn.grad_cache import GradCache
from pyloss.nn.groco import GroCoLoss
from pyloss.nn.ldr import ALDRLoss, LDRLoss
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
from pyloss.nn.physics import (
    CausalResidualLoss,
    LagrangianPINN,
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
    DiceFocalLoss,
    GeneralizedDiceFocalLoss,
    GeneralizedDiceLoss,
    SegmentationFocalLoss,
    SoftclDiceLoss,
    SoftDiceclDiceLoss,
    SoftDiceLoss,
    TverskyLoss,
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
from pyloss.nn.spherical import (
    OneHotMSELoss,
    SphericalLoss,
    SphericalSoftmaxLoss,
    SphericalZLoss,
    TaylorSoftmaxLoss,
)
from pyloss.nn.spherical_linear import SphericalLinear
from pyloss.nn.topk import TopKCrossEntropyLoss
from pyloss.nn.topology import BettiMatchingLoss

__all__ = [
    "ALDRLoss",
    "AggregateLoss",
    "ApproxNDCGLoss",
    "ArcFaceLoss",
    "BettiMatchingLoss",
    "CLIPLoss",
    "CausalResidualLoss",
    "ChamferSetLoss",
    "CompSumLoss",
    "ContrastivePairLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "DCLLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiffSortNet",
    "DiffTopkNet",
    "DynamicGate",
    "EnsLoss",
    "FocalLoss",
    "FrameAverage",
    "GatedConv",
    "GatedFlops",
    "GaussianNaiveBayes",
    "GeneralizedCrossEntropyLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "GradCache",
    "GroCoLoss",
    "HardInfoNCELoss",
    "HungarianSetLoss",
    "ICNNLoss",
    "ISogCLRLoss",
    "InfoNCELoss",
    "KLDROLoss",
    "LCMAggregation",
    "LDRLoss",
    "LabelRelaxationLoss",
    "LagrangianPINN",
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
    "OneHotMSELoss",
    "OrderSearchSchedule",
    "PointerDecoder",
    "Pointers",
    "PoissonNet2d",
    "PoissonNet3d",
    "Poly1Loss",
    "ProtoTripletLoss",
    "ReadProcess",
    "ReadProcessWrite",
    "SegmentationFocalLoss",
    "SigLIPLoss",
    "SimpleContrastiveLoss",
    "SinkhornSetLoss",
    "SoftDiceLoss",
    "SoftDiceclDiceLoss",
    "SoftSort",
    "SoftclDiceLoss",
    "SogCLRLoss",
    "SortingCrossEntropyLoss",
    "SpearmanLoss",
    "SphericalLinear",
    "SphericalLoss",
    "SphericalSoftmaxLoss",
    "SphericalZLoss",
    "SupervisedContrastiveLoss",
    "TaylorSoftmaxLoss",
    "TensorAttention",
    "ThresholdConsistentMarginLoss",
    "TopKCrossEntropyLoss",
    "TripletMarginLoss",
    "TverskyLoss",
    "gated_flops",
]
