"""Losses over a torch.distributed process group."""

from pyloss import _lazy

__getattr__, __dir__, __all__ = _lazy.exports(
    __name__,
    {
        "gather": ("all_gather_with_grad",),
        "vocab_parallel": ("vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"),
    },
)
