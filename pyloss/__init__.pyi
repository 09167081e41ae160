from pyloss import adversarial as adversarial
from pyloss import aggregate as aggregate
from pyloss import analysis as analysis
from pyloss import demo as demo
from pyloss import distributed as distributed
from pyloss import functional as functional
from pyloss import integrations as integrations
from pyloss import metrics as metrics
from pyloss import nn as nn
from pyloss import ops as ops
from pyloss import optim as optim
from pyloss import reference as reference
from pyloss import regularizers as regularizers
from pyloss import segment as segment
from pyloss import testing as testing
from pyloss import visualize as visualize
from pyloss.backends import backend, show_config
from pyloss.functional import (
    BettiMatching,
    BettiTarget,
    PersistencePairs,
    RowStats,
    aldr_loss,
    betti_matching,
    betti_matching_loss,
    clip_loss,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
    fused_linear_cross_entropy,
    groco_loss,
    info_nce,
    ldr_loss,
    nt_xent,
    persistence_pairs,
    siglip_loss,
    soft_argsort,
    soft_permutation,
    soft_permute,
    soft_rank,
    soft_sort,
    soft_topk,
    sorting_cross_entropy,
    spearman_loss,
    supervised_contrastive,
    tensor_attention,
    tensor_attention_cost,
    tensor_attention_error,
    tensor_attention_n,
    token_logprobs,
    topk_cross_entropy,
)
from pyloss.metrics import betti_matching_error, betti_number_error, betti_numbers
from pyloss.nn import (
    ALDRLoss,
    BettiMatchingLoss,
    CompSumLoss,
    CrossEntropyLoss,
    DiffSortNet,
    DiffTopkNet,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    GroCoLoss,
    LDRLoss,
    LinearCrossEntropyLoss,
    SortingCrossEntropyLoss,
    TopKCrossEntropyLoss,
)

__version__: str

__all__ = [
    "ALDRLoss",
    "BettiMatching",
    "BettiMatchingLoss",
    "BettiTarget",
    "CompSumLoss",
    "CrossEntropyLoss",
    "DiffSortNet",
    "DiffTopkNet",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "GroCoLoss",
    "LDRLoss",
    "LinearCrossEntropyLoss",
    "PersistencePairs",
    "RowStats",
    "SortingCrossEntropyLoss",
    "TopKCrossEntropyLoss",
    "aldr_loss",
    "backend",
    "betti_matching",
    "betti_matching_error",
    "betti_matching_loss",
    "betti_number_error",
    "betti_numbers",
    "clip_loss",
    "comp_sum_loss",
    "focal_loss",
    "functional",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "groco_loss",
    "info_nce",
    "ldr_loss",
    "metrics",
    "nn",
    "nt_xent",
    "persistence_pairs",
    "show_config",
    "siglip_loss",
    "soft_argsort",
    "soft_permutation",
    "soft_permute",
    "soft_rank",
    "soft_sort",
    "soft_topk",
    "sorting_cross_entropy",
    "spearman_loss",
    "supervised_contrastive",
    "tensor_attention",
    "tensor_attention_cost",
    "tensor_attention_error",
    "tensor_attention_n",
    "token_logprobs",
    "topk_cross_entropy",
]
