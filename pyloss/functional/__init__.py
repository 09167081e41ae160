"""Every differentiable function of pyloss, flat."""

from pyloss.functional.attention import (
    TensorAttentionCost,
    tensor_attention,
    tensor_attention_cost,
    tensor_attention_n,
)
from pyloss.functional.classification import (
    RowStats,
    comp_sum_loss,
    focal_loss,
    fused_cross_entropy,
)
from pyloss.functional.distillation import linear_distillation_loss
from pyloss.functional.linear import fused_linear_cross_entropy, token_logprobs
from pyloss.functional.preference import (
    DPOMetrics,
    GRPOMetrics,
    dpo_loss,
    group_advantages,
    grpo_loss,
    sequence_logprobs,
)

__all__ = [
    "DPOMetrics",
    "GRPOMetrics",
    "RowStats",
    "TensorAttentionCost",
    "comp_sum_loss",
    "dpo_loss",
    "focal_loss",
    "fused_cross_entropy",
    "fused_linear_cross_entropy",
    "group_advantages",
    "grpo_loss",
    "linear_distillation_loss",
    "sequence_logprobs",
    "tensor_attention",
    "tensor_attention_cost",
    "tensor_attention_n",
    "token_logprobs",
]
