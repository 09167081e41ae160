"""How the low-rank kernels cut their sums up; the bound of the error counts by it."""

from __future__ import annotations

WIDEST = 128  # features of q and of v that the kernels take
MOST_HEADS = 65535  # batch times heads times axes: a dimension of the grid
SUMMED = 256  # tokens that are summed before they join the running sum
STATE_BYTES = 1 << 28  # of the states that the chunks of a causal call start with


def chunk_length(n: int, state_bytes: int) -> int:
    """Tokens of a chunk of n queries; by the shape alone, so that the order of sums is fixed.

    Args:
        n: queries.
        state_bytes: of one chunk, all axes and heads.
    """
    chunks = max(1, min(-(-n // SUMMED), STATE_BYTES // max(1, state_bytes)))
    return -(-n // (chunks * SUMMED)) * SUMMED
