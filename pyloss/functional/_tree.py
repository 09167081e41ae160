"""A balanced binary tree over each segment, in one buffer of its elements.

The node of level l over the elements j 2^l, ... of a segment lies in the row of the first of them:
an odd last node already is where the next level looks for it, and what is left in a segment's first
row is its result. Every other row is the right child of one pair, of N - S pairs in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional._checks import can_look_at


class Tree(NamedTuple):
    """Rows of the buffer, which has one more than there are elements: what does not count."""

    roots: Tensor  # (S,); that spare row for an empty segment
    levels: list[Tensor]  # (P, 2) each: left and right of every pair


def tree_of(offsets: Tensor, total: int, max_length: int | None = None) -> Tree:
    """The pairs of all levels, without waiting for a device: where their numbers cannot be looked
    at, there are as many levels, and pairs in each, as there may be (with no segment longer than
    `max_length`), and the rest are of the spare row.

    A segment with a pair at the level of nodes of `step` elements has more than `step` of them for
    each pair, so that the bounds add up to less than 1.3 pairs an element.
    """
    known = can_look_at(offsets)
    starts, lengths = offsets[:-1].long(), offsets.diff().long()
    roots = torch.where(lengths > 0, starts, total)
    longest = total if max_length is None else min(max_length, total)
    if known:
        longest = int(lengths.max()) if lengths.numel() else 0
    levels, step = [], 1
    while step < longest:
        if known:
            more = lengths > step
            starts, lengths = starts[more], lengths[more]
        pairs = (lengths + (step - 1)).div(step, rounding_mode="floor") >> 1
        ends = pairs.cumsum(0)
        count = int(ends[-1]) if known else total // (step + 1)
        place = torch.arange(count, device=offsets.device)
        segment = torch.searchsorted(ends, place, right=True)
        if not known:
            segment = segment.clamp(max=lengths.shape[0] - 1)
        left = (starts - (ends - pairs) * (2 * step))[segment] + place * (2 * step)
        rows = torch.stack([left, left + step], 1)
        if not known:
            rows = torch.where((place < ends[-1]).unsqueeze(1), rows, total)
        levels.append(rows)
        step *= 2
    return Tree(roots, levels)


def with_spare_row(x: Tensor) -> Tensor:
    """The buffer of the elements x (N, D)."""
    return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
