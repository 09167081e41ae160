"""Groups of unequal size: one convention, the ways between it and the others, and binary trees over
them. What is computed of each segment is in ``pyloss.functional``: ``segment_reduce`` and so on.

A ragged batch of n segments is ``values`` (P, *), one segment after another, and CSR ``offsets``
(n + 1,), int32 or int64: segment s is ``values[offsets[s] : offsets[s + 1]]``, so ``offsets[0]`` is
0 and ``offsets[n]`` is P. Segments may be empty, and so may the batch (``offsets == [0]``). This is
the layout of ``torch.nested`` (``nested_tensor_from_jagged(values, offsets)``).

Everything here is vectorised plain PyTorch on any device, traces under ``torch.compile`` and passes
gradients of any order from and to the values. Nothing waits for a GPU unless its docstring says so:
what the numbers of a tensor must satisfy is checked at once on the CPU (ValueError), and by an
assertion on the device (RuntimeError) elsewhere and in compiled graphs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)

__all__ = [
    "TreeLevel",
    "check_offsets",
    "from_padded",
    "lengths_from_offsets",
    "offsets_from_index",
    "offsets_from_lengths",
    "segment_ids",
    "to_padded",
    "tree_levels",
    "unpad",
]


def check_offsets(offsets: Tensor, total: int, name: str = "offsets") -> None:
    """Checks that offsets cut ``total`` values into segments.

    Args:
        offsets: ``(n + 1,)``.
        total: number of values, P.
        name: of the argument, for the messages.

    Raises:
        TypeError: not a tensor.
        RuntimeError: neither int32 nor int64.
        ValueError: not of shape ``(n + 1,)``; not from 0 to ``total``; decreasing.
    """
    check_index(name, offsets)
    if offsets.numel() == 0:
        raise ValueError(f"{name} must hold at least one number, 0")
    ends = (offsets[0] == 0) & (offsets[-1] == total)
    require(ends, f"{name} must start at 0 and end at the number of values", total)
    require((offsets.diff() >= 0).all(), f"{name} must not decrease")


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Offsets ``(n + 1,)``, int64, of segments of the given lengths ``(n,)``, int32 or int64.

    Raises:
        TypeError, RuntimeError: as :func:`check_offsets`.
        ValueError: not of shape ``(n,)``; a negative length.
    """
    check_index("lengths", lengths)
    require((lengths >= 0).all(), "lengths must not be negative")
    return F.pad(lengths.cumsum(0, dtype=torch.int64), (1, 0))


def lengths_from_offsets(offsets: Tensor) -> Tensor:
    """Lengths ``(n,)`` of the segments, in the dtype of the offsets."""
    return offsets.diff()


def segment_ids(offsets: Tensor, total: int) -> Tensor:
    """The segment of each of the ``total`` values, ``(P,)``, int64; non-decreasing.

    Args:
        offsets: as :func:`check_offsets` takes them.
        total: number of values, P, so that no device is asked.
    """
    places = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    # The number of segments that end at or before a place: right of equals, so empty ones count.
    return torch.searchsorted(offsets[1:].contiguous(), places, right=True)


def offsets_from_index(index: Tensor, num_segments: int | None = None) -> Tensor:
    """Offsets ``(num_segments + 1,)``, int64, from the segment of each value, sorted.

    Args:
        index: ``(P,)``, int32 or int64, non-decreasing, from 0 to ``num_segments - 1``; a segment
            that is not named is empty. With ``order = index.argsort(stable=True)``,
            ``index[order]`` is sorted, and goes with ``values[order]``.
        num_segments: n. None: the last index and one more, which on a GPU waits for the device and
            in a compiled graph is not possible.

    Raises:
        TypeError, RuntimeError: as :func:`check_offsets`.
        ValueError: not of shape ``(P,)``; decreasing; out of range.

    Example:
        >>> import torch, pyloss
        >>> pyloss.segment.offsets_from_index(torch.tensor([0, 0, 2, 2, 2]), 4)
        tensor([0, 2, 2, 5, 5])
    """
    check_index("index", index)
    require(
        (index.diff() >= 0).all(),
        "index must not decrease: order = index.argsort(stable=True) sorts it, and the values, "
        "by segment",
    )
    if num_segments is None:
        num_segments = int(index[-1]) + 1 if index.numel() else 0
    inside = ((index >= 0) & (index < num_segments)).all()
    require(inside, "index must be at least 0 and less than the number of segments", num_segments)
    bounds = torch.arange(num_segments + 1, dtype=index.dtype, device=index.device)
    return torch.searchsorted(index.contiguous(), bounds)


def check_longest(offsets: Tensor, max_length: int) -> None:
    """Checks that no segment exceeds a length; ValueError."""
    fits = (offsets.diff() <= max_length).all()
    require(fits, "a segment is longer than max_length", max_length)


def to_padded(
    values: Tensor, offsets: Tensor, length: int | None = None, fill: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One row per segment, filled up to a common length.

    Args:
        values: ``(P, *)``.
        offsets: ``(n + 1,)``, see :func:`check_offsets`.
        length: of the rows, L; None: that of the longest segment, which on a GPU waits for the
            device and in a compiled graph is not possible.
        fill: what stands behind the end of a segment.

    Returns:
        ``(n, L, *)``, and a mask ``(n, L)`` that is True at values.

    Raises:
        ValueError: a segment longer than ``length``, or what :func:`check_offsets` raises.
    """
    total = values.shape[0]
    check_offsets(offsets, total)
    lengths = lengths_from_offsets(offsets)
    n = lengths.shape[0]
    if length is None:
        length = int(lengths.max()) if n else 0
    else:
        require((lengths <= length).all(), "a segment is longer than length", length)
    rest = values.shape[1:]
    empty = values.new_full((n * length, *rest), fill)
    padded = empty.index_copy(0, _places(offsets, total, length), values)
    mask = torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
    return padded.reshape(n, length, *rest), mask


def from_padded(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values and offsets of rows with a mask; the inverse of :func:`to_padded`.

    On a GPU this waits for the device, since the number of values is not known on the host;
    :func:`unpad` does not.

    Args:
        padded: ``(n, L, *)``.
        mask: ``(n, L)``, bool, True at values, which need not be the first of their row.

    Returns:
        Values ``(P, *)``, row by row, and offsets ``(n + 1,)``, int64.

    Raises:
        RuntimeError: a mask that is not bool.
        ValueError: a mask of another shape.
    """
    if mask.dtype != torch.bool:
        raise RuntimeError(f"mask must be bool, got {mask.dtype}")
    if padded.ndim < 2 or mask.shape != padded.shape[:2]:
        raise ValueError(
            f"mask must have the first two sizes of padded, {tuple(padded.shape)}; "
            f"got {tuple(mask.shape)}"
        )
    return padded[mask], offsets_from_lengths(mask.sum(1))


def unpad(padded: Tensor, offsets: Tensor, total: int) -> Tensor:
    """Values ``(P, *)`` of rows ``(n, L, *)`` whose segments are known: undoes :func:`to_padded`.

    Args:
        padded: ``(n, L, *)``; segment s is the start of row s.
        offsets: ``(n + 1,)``, see :func:`check_offsets`.
        total: number of values, P, so that no device is asked.

    Raises:
        ValueError: sizes that do not fit, or what :func:`check_offsets` raises.
    """
    check_offsets(offsets, total)
    n = offsets.shape[0] - 1
    if padded.ndim < 2 or padded.shape[0] != n:
        raise ValueError(f"padded must be ({n}, L, *), got {tuple(padded.shape)}")
    length = padded.shape[1]
    lengths = lengths_from_offsets(offsets)
    require((lengths <= length).all(), "a segment is longer than the rows", length)
    rows = padded.reshape(n * length, *padded.shape[2:])
    return rows.index_select(0, _places(offsets, total, length))


class TreeLevel(NamedTuple):
    """One level of :func:`tree_levels`: rows of the level below, whose rows are the values for the
    first, and ``[results of the pairs; carried rows]`` of the level before for the others."""

    left: Tensor  # (pairs,), int64
    right: Tensor  # (pairs,)
    carry: Tensor  # (carried,): the odd last rows, which move up unchanged


def tree_levels(
    offsets: Tensor, total: int, max_length: int | None = None
) -> tuple[list[TreeLevel], Tensor]:
    """The balanced binary tree over each segment: rows 2j and 2j + 1 are a pair, the odd last row
    moves up, and so on for ceil(log2(length of the longest)) levels.

    On the CPU the pairs are exactly the number of values less that of segments that have some.
    Elsewhere, and in compiled graphs, no size can be read: the levels are those that ``max_length``
    values may need, and their rows as many as there may be; those over are pairs of row 0 that
    nothing refers to.

    Args:
        offsets: see :func:`check_offsets`, which this does not call.
        total: number of values, P.
        max_length: that no segment exceeds; None: ``total``.

    Returns:
        The levels, and the row of each segment at the top, ``(n,)``, int64; 0 for empty ones.
    """
    exact = offsets.device.type == "cpu" and not torch.compiler.is_compiling()
    lengths = offsets.diff().long()
    n = lengths.shape[0]
    if n == 0 or total == 0:
        return [], torch.zeros_like(lengths)
    first, split, last = offsets[:-1].long(), lengths, lengths  # row j < split: first + j; or last
    most = int(lengths.max()) if exact else total if max_length is None else max_length
    rows, levels = total, []
    while most > 1:
        pairs, odd = lengths // 2, lengths % 2
        ends, odd_ends = pairs.cumsum(0), odd.cumsum(0)
        count = int(ends[-1]) if exact else rows // 2
        carried = int(odd_ends[-1]) if exact else min(n, rows)
        owner, nth = _nth(ends, pairs, count, n)
        left, right = (_row(first, split, last, owner, 2 * nth + side) for side in (0, 1))
        odd_owner, _ = _nth(odd_ends, odd, carried, n)
        carry = _row(first, split, last, odd_owner, lengths[odd_owner] - 1)
        if not exact:  # of the rows that are over
            there = torch.arange(count, device=offsets.device) < ends[-1]
            left, right = torch.where(there, left, 0), torch.where(there, right, 0)
            there = torch.arange(carried, device=offsets.device) < odd_ends[-1]
            carry = torch.where(there, carry, 0)
        levels.append(TreeLevel(left, right, carry))
        first, split, last = ends - pairs, pairs, count + odd_ends - odd
        lengths = pairs + odd
        rows, most = count + carried if exact else min(rows, (rows + n) // 2), (most + 1) // 2
    top = _row(
        first, split, last, torch.arange(n, device=offsets.device), torch.zeros_like(lengths)
    )
    return levels, torch.where(lengths > 0, top, 0)


def _nth(ends: Tensor, counts: Tensor, total: int, n: int) -> tuple[Tensor, Tensor]:
    """Of `total` things, counts[s] of them of segment s: whose each is, and its number there."""
    places = torch.arange(total, device=ends.device)
    owner = torch.searchsorted(ends, places, right=True).clamp(max=n - 1)
    return owner, places - (ends - counts)[owner]


def _row(first: Tensor, split: Tensor, last: Tensor, segment: Tensor, j: Tensor) -> Tensor:
    """Where row j of a segment stands in its level."""
    return torch.where(j < split[segment], first[segment] + j, last[segment])


def _places(offsets: Tensor, total: int, length: int) -> Tensor:
    """Where each value stands among the n * length entries of the padded rows, ``(P,)``."""
    ids = segment_ids(offsets, total)
    within = torch.arange(total, device=offsets.device) - offsets[ids]
    return ids * length + within


def check_index(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"{name} must be int32 or int64, got {t.dtype}")
    if t.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(t.shape)}")


def require(condition: Tensor, message: str, size: int | None = None) -> None:
    """Raises unless the condition holds; the size is not in the message of a compiled graph, which
    would be for this size alone."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message if size is None else f"{message}, {size}")
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)
