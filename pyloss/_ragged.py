"""Groups of unequal size: one convention, and the ways between it and the others.

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

import torch
import torch.nn.functional as F
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)


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
    _check_index(offsets, name)
    if offsets.numel() == 0:
        raise ValueError(f"{name} must hold at least one number, 0")
    ends = (offsets[0] == 0) & (offsets[-1] == total)
    _require(ends, f"{name} must start at 0 and end at the number of values", total)
    _require((offsets.diff() >= 0).all(), f"{name} must not decrease")


def offsets_from_lengths(lengths: Tensor) -> Tensor:
    """Offsets ``(n + 1,)``, int64, of segments of the given lengths ``(n,)``, int32 or int64.

    Raises:
        TypeError, RuntimeError: as :func:`check_offsets`.
        ValueError: not of shape ``(n,)``; a negative length.
    """
    _check_index(lengths, "lengths")
    _require((lengths >= 0).all(), "lengths must not be negative")
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


def offsets_from_segment_ids(ids: Tensor, segments: int) -> Tensor:
    """Offsets ``(segments + 1,)``, int64, from the segment of each value, ``(P,)``, int32 or int64.

    Args:
        ids: non-decreasing, from 0 to ``segments - 1``; a segment that is not named is empty.
        segments: n.

    Raises:
        TypeError, RuntimeError: as :func:`check_offsets`.
        ValueError: not of shape ``(P,)``; decreasing; out of range.
    """
    _check_index(ids, "ids")
    _require((ids.diff() >= 0).all(), "ids must not decrease: sort the values by segment first")
    inside = ((ids >= 0) & (ids < segments)).all()
    _require(inside, "ids must be at least 0 and less than the number of segments", segments)
    bounds = torch.arange(segments + 1, dtype=ids.dtype, device=ids.device)
    return torch.searchsorted(ids.contiguous(), bounds)


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
        _require((lengths <= length).all(), "a segment is longer than length", length)
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
    _require((lengths <= length).all(), "a segment is longer than the rows", length)
    rows = padded.reshape(n * length, *padded.shape[2:])
    return rows.index_select(0, _places(offsets, total, length))


def _places(offsets: Tensor, total: int, length: int) -> Tensor:
    """Where each value stands among the n * length entries of the padded rows, ``(P,)``."""
    ids = segment_ids(offsets, total)
    within = torch.arange(total, device=offsets.device) - offsets[ids]
    return ids * length + within


def _check_index(t: Tensor, name: str) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if t.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"{name} must be int32 or int64, got {t.dtype}")
    if t.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(t.shape)}")


def _require(condition: Tensor, message: str, size: int | None = None) -> None:
    """Raises unless the condition holds; the size is not in the message of a compiled graph, which
    would be for this size alone."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message if size is None else f"{message}, {size}")
    elif condition.device.type != "meta":
        torch._assert_async(condition, message)
