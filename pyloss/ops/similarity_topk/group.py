"""Keys from all processes of a group."""

from __future__ import annotations

from torch import Tensor

from pyloss.ops.linear_cross_entropy.vocab_parallel.group import eager
from pyloss.ops.similarity_softmax import gather


@eager
def gathered(keys: Tensor, group) -> tuple[Tensor, int]:
    """(the keys of all ranks in their order, at which this rank's begin), of (V, B, D)."""
    rows = keys.transpose(0, 1)
    layout = gather.layout_of("views", rows, group)
    return gather.gathered(rows, layout, group).transpose(0, 1).contiguous(), layout.first
