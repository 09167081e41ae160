"""Plain PyTorch versions of every op: slow, on any device, and the definition of what is right."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "betti_matching": ("betti_matching_loss",),
        "linear_cross_entropy": ("linear_cross_entropy", "token_logprobs"),
        "linear_distillation": ("linear_distillation",),
        "permutahedron": ("permutahedron_projection",),
        "row_softmax": ("row_softmax",),
        "sorting_network": (
            "sorting_network_apply",
            "sorting_network_loss",
            "sorting_network_permutation",
            "sorting_network_sort",
        ),
        "tensor_attention": ("tensor_attention",),
        "tensor_attention_lowrank": ("tensor_attention_lowrank",),
    },
)
