"""Every differentiable function of pyloss, flat."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "attention": (
            "TensorAttentionCost",
            "tensor_attention",
            "tensor_attention_cost",
            "tensor_attention_error",
            "tensor_attention_n",
        ),
        "classification": ("RowStats", "comp_sum_loss", "focal_loss", "fused_cross_entropy"),
        "distillation": ("linear_distillation_loss",),
        "groco": ("groco_from_scores", "groco_loss"),
        "linear": ("fused_linear_cross_entropy", "token_logprobs"),
        "metric_learning": (
            "contrastive_pair_loss",
            "multi_similarity_loss",
            "tcm_loss",
            "triplet_margin_loss",
        ),
        "metric_learning_episodes": (
            "icnn_loss",
            "icnn_score",
            "proto_triplet_loss",
            "prototypes",
        ),
        "metric_learning_margins": ("arcface_loss", "cosface_loss"),
        "permutahedron": ("permutahedron_rank", "permutahedron_sort"),
        "preference": (
            "DPOMetrics",
            "GRPOMetrics",
            "dpo_loss",
            "group_advantages",
            "grpo_loss",
            "sequence_logprobs",
        ),
        "ranking": (
            "approx_ndcg_loss",
            "lambda_loss",
            "list_mle",
            "list_net",
            "neural_ndcg_loss",
        ),
        "relaxed_sort": ("neural_sort", "soft_sort_matrix"),
        "segmentation": ("dice_cross_entropy_loss", "soft_dice_loss"),
        "sets": (
            "chamfer_set_loss",
            "hungarian_set_loss",
            "order_search_loss",
            "order_search_loss_from_table",
            "sinkhorn_set_loss",
        ),
        "sorting": (
            "soft_argsort",
            "soft_permutation",
            "soft_permute",
            "soft_rank",
            "soft_sort",
            "soft_topk",
            "sorting_cross_entropy",
            "spearman_loss",
        ),
        "topk": ("topk_cross_entropy",),
        "topology": (
            "BettiMatching",
            "BettiTarget",
            "PersistencePairs",
            "betti_matching",
            "betti_matching_loss",
            "persistence_pairs",
        ),
    },
)
