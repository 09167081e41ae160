"""Rows of unequal length: each as if it stood alone, by one call for each length that occurs.

A network of n wires is not one of more wires with infinities on some of them, so padding cannot be
left to the kernels: rows of one length are taken out, and their results put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._sorting_rows import broadcast_steepness, check_dim, check_target, fold
from pyloss.ops._transforms import functorch_active


class Padding:
    """Which elements of rows (b, n) count. Reads the lengths: a GPU is waited for."""

    def __init__(self, x: Tensor, dim: int, mask: Tensor | None, lengths: Tensor | None) -> None:
        checks.check_tensor("x", x)
        checks.check_has_dimension("x", x)
        check_dim(x, dim)
        if hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting():  # torch 2.7
            raise NotImplementedError(
                "the numbers of mask or lengths are read, which a graph of torch.export cannot "
                "hold: export without them, for rows of one length"
            )
        rows, self.lead = fold(x, dim % x.dim())
        self.b, self.n = rows.shape
        self.order = None  # the elements that count first, and where they stood
        if mask is None:
            counts = self._checked_lengths(lengths, x)
        elif lengths is not None:
            raise ValueError("give mask or lengths, not both")
        else:
            checks.check_mask(mask, x)
            mask, _ = fold(mask, dim % x.dim())
            counts = mask.sum(1)
            self.order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        self.counts = counts
        rows_of: dict[int, list[int]] = {}
        # Under torch.func.grad a tensor has no list of its numbers before torch 2.10.
        listed = [int(n) for n in counts] if functorch_active() else counts.tolist()
        for row, count in enumerate(listed):
            rows_of.setdefault(count, []).append(row)
        self.groups = [
            (count, torch.tensor(rows, device=x.device)) for count, rows in sorted(rows_of.items())
        ]

    def _checked_lengths(self, lengths, x: Tensor) -> Tensor:
        checks.check_tensor("lengths", lengths)
        if lengths.dtype not in checks.INTEGERS or tuple(lengths.shape) != self.lead:
            raise ValueError(
                f"lengths must hold integers, of the shape {list(self.lead)} of x without the "
                f"sorted dimension; got {lengths.dtype} of shape {list(lengths.shape)}"
            )
        counts = lengths.reshape(-1).long()
        if bool(((counts < 0) | (counts > self.n)).any()):
            raise ValueError(f"lengths must be in [0, {self.n}], the size of x along dim")
        return counts

    def compact(self, t: Tensor) -> Tensor:
        """(b, n, ...) with the elements that count in front."""
        if self.order is None:
            return t
        index = self.order.view(*self.order.shape, *[1] * (t.dim() - 2))
        return t.gather(1, index.expand(-1, -1, *t.shape[2:]))

    def _restored(self, y: Tensor, axis: int) -> Tensor:
        """The axis of elements as it was before `compact`."""
        if self.order is None:
            return y
        place = self.order.argsort(1)
        place = place.view(self.b, *(self.n if i == axis else 1 for i in range(1, y.dim())))
        return y.gather(axis, place.expand_as(y))

    def combined(
        self, parts: Sequence[Tensor], axes: Sequence[str | int], like: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """One result (b, ...) of those of the groups that have elements; 0 elsewhere."""
        shape = [a if isinstance(a, int) else self.n for a in axes]
        filled = []
        for part in parts:
            missing = [size - have for size, have in zip(shape, part.shape[1:])]
            filled.append(F.pad(part, [p for m in reversed(missing) for p in (0, m)]))
        rows = [rows for count, rows in self.groups if count]
        empty = (self.counts == 0).nonzero().squeeze(1)
        # An empty sum, so that nothing at all still has a gradient.
        zeros = like.new_zeros((len(empty), *shape), dtype=dtype) + like[:0].sum().to(dtype)
        y = torch.cat([zeros, *filled]).index_select(0, torch.cat([empty, *rows]).argsort())
        for axis, kind in enumerate(axes, 1):
            y = self._restored(y, axis) if kind == "element" else y
        return y


def by_length(
    function: Callable,
    axes: Sequence[str | int] | Sequence[Sequence[str | int]],
    x: Tensor,
    dim: int,
    mask: Tensor | None,
    lengths: Tensor | None,
    *others: Tensor,
    dtype: torch.dtype | None = None,
    padding: Padding | None = None,
    **options,
):
    """function(rows (k, m), *others, dim=-1, **options), once for each length m.

    Args:
        axes: of a result behind the rows: "element" or "rank", of m entries, or another size. A
            list of such lists for a tuple of results.
        others: (b, n, ...), handed over as (k, m, ...) in the way of x.
        dtype: of the results; default: as that of x.
    """
    padding = Padding(x, dim, mask, lengths) if padding is None else padding
    steepness = options.get("steepness")
    if isinstance(steepness, Tensor):
        options["steepness"] = broadcast_steepness(steepness, padding.lead).reshape(-1)
    rows = [padding.compact(t) for t in (fold(x, dim % x.dim())[0], *others)]
    several = bool(axes) and isinstance(axes[0], tuple)
    all_axes = axes if several else (axes,)
    found: list[list[Tensor]] = [[] for _ in all_axes]
    for count, index in padding.groups:
        if count == 0:
            continue
        part = dict(options)
        if isinstance(steepness, Tensor):
            part["steepness"] = options["steepness"].index_select(0, index)
        y = function(*(t.index_select(0, index)[:, :count] for t in rows), dim=-1, **part)
        for collected, one in zip(found, y if several else (y,)):
            collected.append(one)
    dtype = checks.result_dtype(x.dtype, x) if dtype is None else dtype
    results = []
    for parts, kinds in zip(found, all_axes):
        y = padding.combined(parts, kinds, rows[0], dtype)
        y = y.view((*padding.lead, *y.shape[1:]))
        results.append(y.movedim(-1, dim) if len(kinds) == 1 else y)
    return tuple(results) if several else results[0]


def loss_by_length(
    function, x, target, dim, mask, lengths, *, reduction, target_is=None, **options
) -> Tensor:
    """A loss of items, each of its own elements alone; an item without elements counts as none."""
    padding = Padding(x, dim, mask, lengths)
    check_target(x, padding.lead, padding.n, target, target_is or "values")
    if target_is is not None:
        options["target_is"] = target_is
    if target_is == "permutation":
        target = target.reshape(padding.b, padding.n, padding.n)
        function = _with_square_target(function)
    else:
        target, _ = fold(target, dim % x.dim())
    each = by_length(
        function, (), x, dim, mask, lengths, target, padding=padding, reduction="none", **options
    )
    if reduction == "none":
        return each
    total = each.sum()
    return total if reduction == "sum" else total / (padding.counts > 0).sum()


def _with_square_target(function: Callable) -> Callable:
    """Of an item's permutation matrix also the columns of its own ranks."""
    return lambda x, target, **options: function(x, target[:, :, : x.shape[1]], **options)
