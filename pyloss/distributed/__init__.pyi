from pyloss.distributed.gather import all_gather_with_grad
from pyloss.distributed.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)

__all__ = [
    "all_gather_with_grad",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
