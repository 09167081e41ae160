"""How the low-rank kernels cut their sums up; the bound of the error counts by it."""

from __future__ import annotations

from typing import NamedTuple

WIDEST = 128  # features of q and of v that the kernels take
SUMMED = 256  # tokens that are summed before they join the running sum
STATE_BYTES = 1 << 28  # of the states that the chunks of a causal call start with


class Shift(NamedTuple):
    """Which keys move with a query at position p; None: none does."""

    enters: int | None  # key p + enters comes into sight
    leaves: int | None  # key p - leaves goes out of sight

    @property
    def span(self) -> int:
        """Keys in sight, at most; 0 without a window."""
        return 0 if self.leaves is None else self.leaves + self.enters


def shift(n: int, queries: int, causal: bool, window: int, q_offset: int) -> Shift:
    """Of an axis of n keys; a window of 0 is none."""
    if not window:
        return Shift(0 if causal else None, None)
    window = min(window, n + queries + abs(q_offset))  # a longer one shows no more
    return Shift(0 if causal else window - 1, window)


def chunk_length(n: int, state_bytes: int, span: int = 0, most_bytes: int | None = None) -> int:
    """Tokens of a chunk of n queries; by the shape alone, so that the order of sums is fixed.

    Args:
        n: queries.
        state_bytes: of one chunk, all axes and heads.
        span: of the longest window, which a chunk is not shorter than.
        most_bytes: of the states of all chunks; None: STATE_BYTES.
    """
    most_bytes = STATE_BYTES if most_bytes is None else most_bytes
    chunks = max(1, min(-(-n // SUMMED), most_bytes // max(1, state_bytes)))
    return -(-max(n, span * chunks) // (chunks * SUMMED)) * SUMMED
