"""What persistence and Betti matching give back: bars of a batch of images, and their matching."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional import _cycles
from pyloss.functional import _images as images
from pyloss.functional._images import check_choice
from pyloss.ops import betti_matching as op
from pyloss.ops._launch import constants
from pyloss.ops._shards import beside

UNMATCHED = ("diagonal", "extreme")
_KINDS = ("matched", "unmatched_input", "unmatched_target")


class PersistencePairs:
    """Bars of a batch of images, from :func:`pyloss.persistence_pairs`.

    Attributes:
        index: ``(P, 4)`` int64: batch item, dimension, flat index of the voxel of birth and of
            death, -1 for a class that never dies; sorted.
        values: ``(P, 2)``: values of the image there, differentiable; a missing death is infinite.
            Exact: float64 for int32 and int64 images, float32 for the smaller integers and bool.
        counts: ``(N, D)`` number of bars per item and dimension.
        filtration: ``"sublevel"`` or ``"superlevel"``.

    Example:
        >>> import torch, pyloss
        >>> pairs = pyloss.persistence_pairs(torch.tensor([[0.0, 2.0, 1.0, 3.0]]), spatial_dims=1)
        >>> pairs.index.tolist(), pairs.values.tolist()
        ([[0, 0, 2, 1]], [[1.0, 2.0]])
    """

    def __init__(self, image: Tensor, index: Tensor, superlevel: bool, shape: tuple) -> None:
        self.index = index
        self._shape, self._superlevel = shape, superlevel
        item, birth, death = index[:, 0], index[:, 2], index[:, 3]
        b = images.values_at(image, item, birth, 0.0)
        d = images.values_at(image, item, death, -math.inf if superlevel else math.inf)
        self.values = torch.stack([b, d], 1)
        self._items = image.shape[0]

    def __repr__(self) -> str:
        by_dim = enumerate(self.counts.sum(0).tolist())
        found = ", ".join(f"{count} of dimension {d}" for d, count in by_dim)
        return f"PersistencePairs({found}; {_of_images(self._items, self._shape, self.filtration)})"

    @property
    def filtration(self) -> str:
        return images.FILTRATIONS[self._superlevel]

    @property
    def counts(self) -> Tensor:
        return images.counts_of(self.index, self._items, len(self._shape))

    def split(self) -> list[list[Tensor]]:
        """Per item and dimension the voxels ``(bars, 2, spatial dims)``: births and deaths."""
        found = []
        for item in range(self._items):
            rows = self.index[self.index[:, 0] == item]
            per_dim = [rows[rows[:, 1] == d] for d in range(len(self._shape))]
            found.append([images.unravelled(r[:, 2:], self._shape) for r in per_dim])
        return found

    def betti(self, threshold: float) -> Tensor:
        """``(N, D)`` number of bars alive at a threshold: born, and not dead, at that value.

        Counts the oldest component only if the pairs were asked for with ``essential=True``.
        """
        b, d = self.values.detach().unbind(1)
        checks.check_number("threshold", threshold)
        if math.isnan(threshold):
            raise ValueError("threshold must be a number, got nan")
        # What never dies is alive at an infinite threshold too, which is no less than its death.
        endless = self.index[:, 3] < 0
        if self._superlevel:
            alive = (b >= threshold) & (endless | (threshold > d))
        else:
            alive = (b <= threshold) & (endless | (threshold < d))
        return images.counts_of(self.index[alive], self._items, len(self._shape))


class BettiMatching:
    """The matching of a batch of image pairs, from :func:`pyloss.betti_matching`.

    Voxels are flat indices into the image; -1 is a voxel of the padding.

    Attributes:
        matched: ``(M, 6)`` int64: item, dimension, voxels of birth and death in the input, in the
            target; sorted.
        unmatched_input: ``(U, 4)``: item, dimension, voxels of birth and death.
        unmatched_target: ``(V, 4)``, likewise.
        counts: ``(N, D, 3)`` number of matched bars, of unmatched ones of the input, of the target.
        filtration: ``"sublevel"`` or ``"superlevel"``.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7]])
        >>> y = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
        >>> m = pyloss.betti_matching(x, y, spatial_dims=1)
        >>> m.matched.tolist(), m.unmatched_input.tolist()
        ([[0, 0, 4, 3, 4, 3]], [[0, 0, 2, 1]])
    """

    def __init__(self, input, target, tables, superlevel, frame, dims) -> None:
        self._input, self._target = input, target  # (N, *spatial), padded
        self._tables, self._superlevel, self._frame = tables, superlevel, frame
        self._dims = dims  # those that were asked for
        shape = tuple(input.shape[1:])
        self._shape = tuple(s - 2 * frame for s in shape)
        public = [t[:, :6] if i == 0 else t[:, :4] for i, t in enumerate(tables)]
        if frame:
            public = [images.unpadded(t, shape) for t in public]
        self.matched, self.unmatched_input, self.unmatched_target = public

    def __repr__(self) -> str:
        tables = (self.matched, self.unmatched_input, self.unmatched_target)
        names = ("matched", "of the input alone", "of the target alone")
        found = ", ".join(f"{len(rows)} {name}" for rows, name in zip(tables, names))
        pairs = _of_images(self._input.shape[0], self._shape, self.filtration, "pair")
        return f"BettiMatching({found}; {pairs})"

    @property
    def filtration(self) -> str:
        return images.FILTRATIONS[self._superlevel]

    @property
    def counts(self) -> Tensor:
        items, dims = self._input.shape[0], len(self._shape)
        tables = (self.matched, self.unmatched_input, self.unmatched_target)
        return torch.stack([images.counts_of(t, items, dims) for t in tables], 2)

    def coordinates(self, kind: str, item: int, dim: int) -> Tensor:
        """Voxels of the bars of one item and dimension as coordinates.

        Args:
            kind: ``"matched"``, ``"unmatched_input"`` or ``"unmatched_target"``.

        Returns:
            ``(bars, 2, spatial dims)``; matched ``(bars, 4, spatial dims)``: birth and death in the
            input, then in the target. -1 for a voxel of the padding.

        Raises:
            ValueError: an unknown ``kind``, a ``dim`` that the image does not have.
            IndexError: an ``item`` outside the batch.
        """
        table = getattr(self, check_choice("kind", kind, _KINDS))
        self._check_place(item, dim)
        rows = table[(table[:, 0] == item) & (table[:, 1] == dim)]
        return images.unravelled(rows[:, 2:], self._shape)

    def essential(self, item: int) -> Tensor:
        """Voxels of birth of the components of one item that never die, ``(2, spatial dims)``: in
        the input, in the target; -1 for a voxel of the padding.

        Raises:
            IndexError: an ``item`` outside the batch.
        """
        self._check_place(item, 0)
        pair = (t[item : item + 1] for t in (self._input, self._target))
        rows = op.essential_rows(*pair, self._superlevel)
        if self._frame:
            rows = images.unpadded(rows[:, :6], tuple(self._input.shape[1:]))
        return images.unravelled(rows[0, [2, 4]], self._shape)

    def _check_place(self, item: int, dim: int) -> None:
        if checks.checked_integer("dim", dim) not in range(len(self._shape)):
            raise ValueError(f"dim must be in 0..{len(self._shape) - 1}, got {dim}")
        images.check_item(item, self._input.shape[0])

    def loss(
        self,
        *,
        weight: Sequence[float] | None = None,
        matched_weight: float = 1.0,
        unmatched_weight: float = 1.0,
        target_weight: float = 1.0,
        unmatched: str = "diagonal",
        min_persistence: float = 0.0,
        include_essential: bool = False,
    ) -> Tensor:
        """Loss of each item ``(N)``, differentiable by both images; arguments of the loss.

        ``include_essential`` is its ``essential``: the components that never die, by their birth,
        where dimension 0 was asked for.
        """
        check_choice("unmatched", unmatched, UNMATCHED)
        spatial = len(self._shape)
        images.check_not_negative(
            matched_weight=matched_weight, unmatched_weight=unmatched_weight,
            target_weight=target_weight, min_persistence=min_persistence,
        )  # fmt: skip
        of_terms = (matched_weight, unmatched_weight, target_weight)
        by_dim = images.checked_weight(weight, list(range(spatial)), spatial)
        tables = list(self._tables)
        if include_essential and 0 in self._dims:
            rows = op.essential_rows(self._input, self._target, self._superlevel)
            tables[0] = torch.cat([tables[0], rows.to(tables[0].device)])
        # Without the rows of weight 0, which may be infinite.
        tables = [t if w != 0 else t[:0] for t, w in zip(tables, of_terms)]
        for d in (d for d, w in enumerate(by_dim) if w == 0):
            tables = [t[t[:, 1] != d] for t in tables]
        terms = op.loss_terms(
            self._input.flatten(1), self._target.flatten(1), *tables, dim_count=spatial,
            superlevel=self._superlevel, unmatched=unmatched, min_persistence=min_persistence,
        )  # fmt: skip
        factors = constants([d * t for d in by_dim for t in of_terms], terms.dtype, terms.device)
        return (terms * beside(factors.view(spatial, -1), terms)).sum((1, 2))

    def representative_cycles(
        self,
        item: int,
        which: str = "input",
        dim: int = 0,
        kind: str = "matched",
        index: int | None = None,
    ) -> list[Tensor]:
        """For each bar the voxels of a cycle that stands for it, as coordinates ``(voxels, D)``.

        Dimension 0: the component that dies, just before it does. The last dimension: the border of
        the hole, just before the loop around it breaks up; in 3D of the cavity. Dimension 1 of 3D:
        a loop, closed by the birth and filled by the death, of the many around the same tunnel; it
        need not be the shortest. The voxel of death comes last.

        Args:
            which: ``"input"``, ``"target"``, or ``"comparison"`` (matched bars only).
            kind: ``"matched"`` or ``"unmatched"``.
            index: only this bar, a row of ``coordinates(...)``.

        Raises:
            ValueError: an unknown ``which`` or ``kind``, a ``dim`` that the image does not have.
            IndexError: an ``item`` outside the batch, an ``index`` that is no bar.

        The work per bar grows with the size of the component, loops take one reduction of the
        image; on the CPU.
        """
        check_choice("which", which, ("input", "target", "comparison"))
        check_choice("kind", kind, ("matched", "unmatched"))
        if which == "comparison" and kind == "unmatched":
            raise ValueError("which='comparison' knows matched bars only, got kind='unmatched'")
        self._check_place(item, dim)
        if kind == "matched":
            table, cell = self._tables[0], {"input": 6, "target": 8, "comparison": 10}[which]
        else:
            table, cell = self._tables[1 if which == "input" else 2], 4
        rows = table[(table[:, 0] == item) & (table[:, 1] == dim)]
        if index is not None:
            index = checks.checked_integer("index", index)
            if index not in range(len(rows)):
                raise IndexError(f"index must be that of one of {len(rows)} bars, got {index}")
            rows = rows[index : index + 1]
        images = [x[item].detach().double() for x in (self._input, self._target)]
        images = [-x if self._superlevel else x for x in images]
        image = torch.minimum(*images) if which == "comparison" else images[which == "target"]
        cycles = _cycles.representatives(image, dim, rows[:, cell : cell + 2].tolist())
        frame = self._frame
        return [c - frame for c in cycles]


def _of_images(items: int, shape: tuple, filtration: str, what: str = "image") -> str:
    size = "x".join(map(str, shape))
    return f"{items} {what}{'' if items == 1 else 's'} {size}, {filtration} sets"


# Public there, and shown there.
PersistencePairs.__module__ = BettiMatching.__module__ = "pyloss.functional.topology"
