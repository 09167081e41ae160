"""Every module of pyloss, flat."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "attention": ("TensorAttention",),
        "classification": (
            "CompSumLoss",
            "CrossEntropyLoss",
            "FocalLoss",
            "GeneralizedCrossEntropyLoss",
        ),
        "contrastive": (
            "CLIPLoss",
            "DCLLoss",
            "HardInfoNCELoss",
            "InfoNCELoss",
            "NTXentLoss",
            "SigLIPLoss",
            "SimpleContrastiveLoss",
            "SupervisedContrastiveLoss",
        ),
        "dro": ("KLDROLoss",),
        "grad_cache": ("GradCache",),
        "groco": ("GroCoLoss",),
        "linear": ("LinearCrossEntropyLoss",),
        "metric_learning": (
            "ArcFaceLoss",
            "ContrastivePairLoss",
            "CosFaceLoss",
            "ICNNLoss",
            "MultiSimilarityLoss",
            "ProtoTripletLoss",
            "ThresholdConsistentMarginLoss",
            "TripletMarginLoss",
        ),
        "ranking": (
            "ApproxNDCGLoss",
            "LambdaLoss",
            "ListMLELoss",
            "ListNetLoss",
            "NeuralNDCGLoss",
        ),
        "relaxed_sort": ("NeuralSort", "SoftSort"),
        "segmentation": ("DiceCELoss", "SoftDiceLoss"),
        "sets": (
            "ChamferSetLoss",
            "HungarianSetLoss",
            "OrderSearchSchedule",
            "PointerDecoder",
            "Pointers",
            "ReadProcess",
            "ReadProcessWrite",
            "SinkhornSetLoss",
        ),
        "sogclr": ("ISogCLRLoss", "SogCLRLoss"),
        "sorting": ("DiffSortNet", "DiffTopkNet", "SortingCrossEntropyLoss", "SpearmanLoss"),
        "topk": ("TopKCrossEntropyLoss",),
        "topology": ("BettiMatchingLoss",),
    },
)
