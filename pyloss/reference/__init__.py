"""Plain PyTorch versions of every op: slow, on any device, and the definition of what is right."""

from pyloss.reference.betti_matching import betti_matching_loss
from pyloss.reference.linear_cross_entropy import linear_cross_entropy, token_logprobs
from pyloss.reference.linear_distillation import linear_distillation
from pyloss.reference.lion_k import lion_k
from pyloss.reference.margin_shift import margin_shift
from pyloss.reference.permutahedron import permutahedron_projection
from pyloss.reference.row_moments import row_moments
from pyloss.reference.row_softmax import row_softmax
from pyloss.reference.segment import (
    segment_moments,
    segment_reduce,
    segment_softmax,
    segment_softmax_stats,
)
from pyloss.reference.similarity_softmax import similarity_softmax
from pyloss.reference.similarity_topk import similarity_topk
from pyloss.reference.sorting_network import (
    sorting_network_apply,
    sorting_network_loss,
    sorting_network_permutation,
    sorting_network_sort,
)
from pyloss.reference.tensor_attention import tensor_attention
from pyloss.reference.tensor_attention_lowrank import tensor_attention_lowrank

__all__ = [
    "betti_matching_loss",
    "linear_cross_entropy",
    "linear_distillation",
    "lion_k",
    "margin_shift",
    "permutahedron_projection",
    "row_moments",
    "row_softmax",
    "segment_moments",
    "segment_reduce",
    "segment_softmax",
    "segment_softmax_stats",
    "similarity_softmax",
    "similarity_topk",
    "sorting_network_apply",
    "sorting_network_loss",
    "sorting_network_permutation",
    "sorting_network_sort",
    "tensor_attention",
    "tensor_attention_lowrank",
    "token_logprobs",
]
