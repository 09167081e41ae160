from pyloss.functional.adversarial import margin_shift, smooth_adversarial_comp_sum
from pyloss.functional.aggregate import aggregate_loss
from pyloss.functional.aggregation import segment_gru_reduce
from pyloss.functional.attention import (
    TensorAttentionCost,
    tensor_attention,
    tensor_attention_cost,
    tensor_attention_error,
    tensor_attention_n,
)
from pyloss.functional.classification import (
    RowStats,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
    label_relaxation_loss,
    poly1_loss,
)
from pyloss.functional.contrastive import (
    clip_loss,
    dcl,
    hard_info_nce,
    info_nce,
    nt_xent,
    siglip_loss,
    simple_contrastive,
    supervised_contrastive,
)
from pyloss.functional.dataset_distillation import (
    balanced_loss_weight,
    clip_schedule,
    lipschitz_gradient_penalty,
    perturb_weights,
    representative_indices,
    trajectory_matching_loss,
)
from pyloss.functional.dcdm import (
    DCDMResult,
    conjugate_direction_loss,
    dcdm_solve,
    lanczos_ritz_dataset,
)
from pyloss.functional.distillation import linear_distillation_loss
from pyloss.functional.dro import kl_dro_loss
from pyloss.functional.ensemble import (
    ens_loss,
    ens_loss_derivatives,
)
from pyloss.functional.equivariance import equivariance_error
from pyloss.functional.frames import Frames, laplacian_sort_frame, pca_frames
from pyloss.functional.gating import mask_prediction_loss, mass_topk_mask
from pyloss.functional.groco import (
    groco_from_scores,
    groco_loss,
)
from pyloss.functional.ldr import aldr_loss, ldr_loss
from pyloss.functional.linear import (
    fused_linear_cross_entropy,
    token_logprobs,
)
from pyloss.functional.long_tail import (
    class_balanced_weight,
    logit_adjusted_cross_entropy,
    logit_adjustment,
)
from pyloss.functional.metric_learning import (
    contrastive_pair_loss,
    multi_similarity_loss,
    tcm_loss,
    triplet_margin_loss,
)
from pyloss.functional.metric_learning_episodes import (
    icnn_loss,
    icnn_score,
    proto_triplet_loss,
    prototypes,
)
from pyloss.functional.metric_learning_margins import (
    arcface_loss,
    cosface_loss,
)
from pyloss.functional.neural_collapse import ufm_loss
from pyloss.functional.normalized import normalized_logistic_loss
from pyloss.functional.permutahedron import (
    permutahedron_rank,
    permutahedron_sort,
)
from pyloss.functional.physics import (
    causal_residual_loss,
    causal_weights,
    lagrangian_residual_loss,
    periodic_embedding,
)
from pyloss.functional.preference import (
    DPOMetrics,
    GRPOMetrics,
    dpo_loss,
    group_advantages,
    grpo_loss,
    sequence_logprobs,
)
from pyloss.functional.ranking import (
    approx_ndcg_loss,
    lambda_loss,
    list_mle,
    list_net,
    neural_ndcg_loss,
)
from pyloss.functional.relaxed_sort import (
    neural_sort,
    soft_sort_matrix,
)
from pyloss.functional.row_stats import (
    RowSoftmaxStats,
    row_softmax_stats,
)
from pyloss.functional.segment import (
    SegmentMoments,
    SegmentSoftmaxStats,
    segment_moments,
    segment_reduce,
    segment_softmax,
    segment_softmax_stats,
    segment_tree_reduce,
)
from pyloss.functional.segmentation import (
    dice_cross_entropy_loss,
    soft_dice_loss,
)
from pyloss.functional.segmentation_cldice import (
    cldice_loss,
    dice_cldice_loss,
    soft_skeleton,
)
from pyloss.functional.segmentation_focal import (
    dice_focal_loss,
    generalized_dice_focal_loss,
    segmentation_focal_loss,
    sigmoid_focal_loss,
)
from pyloss.functional.segmentation_overlap import (
    generalized_dice_loss,
    tversky_loss,
)
from pyloss.functional.sets import (
    chamfer_set_loss,
    hungarian_set_loss,
    order_search_loss,
    order_search_loss_from_table,
    sinkhorn_set_loss,
)
from pyloss.functional.sogclr import (
    SogCLRStats,
    sogclr_loss,
)
from pyloss.functional.sorting import (
    soft_argsort,
    soft_permutation,
    soft_permute,
    soft_rank,
    soft_sort,
    soft_topk,
    sorting_cross_entropy,
    spearman_loss,
)
from pyloss.functional.spherical import (
    one_hot_mse_loss,
    spherical_loss,
    spherical_softmax_loss,
    spherical_z_loss,
    taylor_softmax_loss,
)
from pyloss.functional.surrogate import target_surrogate_loss
from pyloss.functional.topk import topk_cross_entropy
from pyloss.functional.topology import (
    BettiMatching,
    BettiTarget,
    PersistencePairs,
    betti_matching,
    betti_matching_loss,
    persistence_pairs,
)

__all__ = [
    "BettiMatching",
    "BettiTarget",
    "DCDMResult",
    "DPOMetrics",
    "Frames",
    "GRPOMetrics",
    "PersistencePairs",
    "RowSoftmaxStats",
    "RowStats",
    "SegmentMoments",
    "SegmentSoftmaxStats",
    "SogCLRStats",
    "TensorAttentionCost",
    "aggregate_loss",
    "aldr_loss",
    "approx_ndcg_loss",
    "arcface_loss",
    "balanced_loss_weight",
    "betti_matching",
    "betti_matching_loss",
    "causal_residual_loss",
    "causal_weights",
    "chamfer_set_loss",
    "class_balanced_weight",
    "cldice_loss",
    "clip_loss",
    "clip_schedule",
    "comp_sum_loss",
    "conjugate_direction_loss",
    "contrastive_pair_loss",
    "cosface_loss",
    "dcdm_solve",
    "dcl",
    "dice_cldice_loss",
    "dice_cross_entropy_loss",
    "dice_focal_loss",
    "dpo_loss",
    "ens_loss",
    "ens_loss_derivatives",
    "equivariance_error",
    "focal_loss",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "generalized_dice_focal_loss",
    "generalized_dice_loss",
    "groco_from_scores",
    "groco_loss",
    "group_advantages",
    "grpo_loss",
    "hard_info_nce",
    "hungarian_set_loss",
    "icnn_loss",
    "icnn_score",
    "info_nce",
    "kl_dro_loss",
    "label_relaxation_loss",
    "lagrangian_residual_loss",
    "lambda_loss",
    "lanczos_ritz_dataset",
    "laplacian_sort_frame",
    "ldr_loss",
    "linear_distillation_loss",
    "lipschitz_gradient_penalty",
    "list_mle",
    "list_net",
    "logit_adjusted_cross_entropy",
    "logit_adjustment",
    "margin_shift",
    "mask_prediction_loss",
    "mass_topk_mask",
    "multi_similarity_loss",
    "neural_ndcg_loss",
    "neural_sort",
    "normalized_logistic_loss",
    "nt_xent",
    "one_hot_mse_loss",
    "order_search_loss",
    "order_search_loss_from_table",
    "pca_frames",
    "periodic_embedding",
    "permutahedron_rank",
    "permutahedron_sort",
    "persistence_pairs",
    "perturb_weights",
    "poly1_loss",
    "proto_triplet_loss",
    "prototypes",
    "representative_indices",
    "row_softmax_stats",
    "segment_gru_reduce",
    "segment_moments",
    "segment_reduce",
    "segment_softmax",
    "segment_softmax_stats",
    "segment_tree_reduce",
    "segmentation_focal_loss",
    "sequence_logprobs",
    "siglip_loss",
    "sigmoid_focal_loss",
    "simple_contrastive",
    "sinkhorn_set_loss",
    "smooth_adversarial_comp_sum",
    "soft_argsort",
    "soft_dice_loss",
    "soft_permutation",
    "soft_permute",
    "soft_rank",
    "soft_skeleton",
    "soft_sort",
    "soft_sort_matrix",
    "soft_topk",
    "sogclr_loss",
    "sorting_cross_entropy",
    "spearman_loss",
    "spherical_loss",
    "spherical_softmax_loss",
    "spherical_z_loss",
    "supervised_contrastive",
    "target_surrogate_loss",
    "taylor_softmax_loss",
    "tcm_loss",
    "tensor_attention",
    "tensor_attention_cost",
    "tensor_attention_error",
    "tensor_attention_n",
    "token_logprobs",
    "topk_cross_entropy",
    "trajectory_matching_loss",
    "triplet_margin_loss",
    "tversky_loss",
    "ufm_loss",
]
