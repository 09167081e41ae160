"""Persistence pairs, Betti matching and the losses made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _cycles
from pyloss.ops import betti_matching as op

_FILTRATIONS = ("sublevel", "superlevel")
_DIRECTIONS = {"sublevel": (False,), "superlevel": (True,), "both": (False, True)}
_UNMATCHED = ("diagonal", "extreme")
_PADDINGS = ("foreground", "background")
_ACTIVATIONS = ("sigmoid", "softmax")
_REDUCTIONS = ("none", "mean", "sum")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PersistencePairs:
    """Bars of a batch of images, from :func:`pyloss.persistence_pairs`.

    Attributes:
        index: ``(P, 4)`` int64: batch item, dimension, flat index of the voxel of birth and of
            death, -1 for a class that never dies; sorted.
        values: ``(P, 2)``: values of the image there, differentiable; a missing death is infinite.
        counts: ``(N, D)`` number of bars per item and dimension.

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
        b = _gather(image, item, birth, 0.0)
        d = _gather(image, item, death, -math.inf if superlevel else math.inf)
        self.values = torch.stack([b, d], 1)
        self._items = image.shape[0]

    @property
    def counts(self) -> Tensor:
        return _counts(self.index, self._items, len(self._shape))

    def split(self) -> list[list[Tensor]]:
        """Per item and dimension the voxels ``(bars, 2, spatial dims)``: births and deaths."""
        found = []
        for item in range(self._items):
            rows = self.index[self.index[:, 0] == item]
            per_dim = [rows[rows[:, 1] == d] for d in range(len(self._shape))]
            found.append([_unravelled(r[:, 2:], self._shape) for r in per_dim])
        return found

    def betti(self, threshold: float) -> Tensor:
        """``(N, D)`` number of bars alive at a threshold: born, and not dead, at that value.

        Counts the oldest component only if the pairs were asked for with ``essential=True``.
        """
        b, d = self.values.detach().unbind(1)
        if self._superlevel:
            alive = (b >= threshold) & (threshold > d)
        else:
            alive = (b <= threshold) & (threshold < d)
        return _counts(self.index[alive], self._items, len(self._shape))


class BettiMatching:
    """The matching of a batch of image pairs, from :func:`pyloss.betti_matching`.

    Voxels are flat indices into the image; -1 is a voxel of the padding.

    Attributes:
        matched: ``(M, 6)`` int64: item, dimension, voxels of birth and death in the input, in the
            target; sorted.
        unmatched_input: ``(U, 4)``: item, dimension, voxels of birth and death.
        unmatched_target: ``(V, 4)``, likewise.
        counts: ``(N, D, 3)`` number of matched bars, of unmatched ones of the input, of the target.

    Example:
        >>> import torch, pyloss
        >>> x = torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7]])
        >>> y = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
        >>> m = pyloss.betti_matching(x, y, spatial_dims=1)
        >>> m.matched.tolist(), m.unmatched_input.tolist()
        ([[0, 0, 4, 3, 4, 3]], [[0, 0, 2, 1]])
    """

    def __init__(self, input, target, tables, superlevel, frame) -> None:
        self._input, self._target = input, target  # (N, *spatial), padded
        self._tables, self._superlevel, self._frame = tables, superlevel, frame
        shape = tuple(input.shape[1:])
        self._shape = tuple(s - 2 * frame for s in shape)
        public = [t[:, :6] if i == 0 else t[:, :4] for i, t in enumerate(tables)]
        if frame:
            public = [_unpadded(t, shape) for t in public]
        self.matched, self.unmatched_input, self.unmatched_target = public

    @property
    def counts(self) -> Tensor:
        items, dims = self._input.shape[0], len(self._shape)
        tables = (self.matched, self.unmatched_input, self.unmatched_target)
        return torch.stack([_counts(t, items, dims) for t in tables], 2)

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
        table = getattr(self, _one_of("kind", kind, _KINDS))
        if dim not in range(len(self._shape)):
            raise ValueError(f"dim must be in 0..{len(self._shape) - 1}, got {dim}")
        if item not in range(self._input.shape[0]):
            raise IndexError(f"item must be in 0..{self._input.shape[0] - 1}, got {item}")
        rows = table[(table[:, 0] == item) & (table[:, 1] == dim)]
        return _unravelled(rows[:, 2:], self._shape)

    def loss(
        self,
        *,
        weight: Sequence[float] | None = None,
        matched_weight: float = 1.0,
        unmatched_weight: float = 1.0,
        target_weight: float = 1.0,
        unmatched: str = "diagonal",
        min_persistence: float = 0.0,
    ) -> Tensor:
        """Loss of each item ``(N)``, differentiable by both images; arguments of the loss."""
        _one_of("unmatched", unmatched, _UNMATCHED)
        spatial = len(self._shape)
        _check_numbers(
            matched_weight=matched_weight, unmatched_weight=unmatched_weight,
            target_weight=target_weight, min_persistence=min_persistence,
        )  # fmt: skip
        terms = op.loss_terms(
            self._input.flatten(1), self._target.flatten(1), *self._tables, dim_count=spatial,
            superlevel=self._superlevel, unmatched=unmatched, min_persistence=min_persistence,
        )  # fmt: skip
        factors = terms.new_tensor([matched_weight, unmatched_weight, target_weight])
        by_dim = terms.new_tensor(_checked_weight(weight, list(range(spatial)), spatial))
        factors = factors * by_dim[:, None]
        return torch.where(factors == 0, 0.0, terms * factors).sum((1, 2))  # 0 times infinity

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
        the hole, just before the loop around it breaks up. The voxel of death comes last.

        Args:
            which: ``"input"``, ``"target"``, or ``"comparison"`` (matched bars only).
            kind: ``"matched"`` or ``"unmatched"``.
            index: only this bar, a row of ``coordinates(...)``.

        The work per bar grows with the size of the component; on the CPU.
        """
        _one_of("which", which, ("input", "target", "comparison"))
        _one_of("kind", kind, ("matched", "unmatched"))
        if which == "comparison" and kind == "unmatched":
            raise ValueError("which='comparison' knows matched bars only, got kind='unmatched'")
        if dim not in range(len(self._shape)):
            raise ValueError(f"dim must be in 0..{len(self._shape) - 1}, got {dim}")
        if kind == "matched":
            table, cell = self._tables[0], {"input": 6, "target": 8, "comparison": 10}[which]
        else:
            table, cell = self._tables[1 if which == "input" else 2], 4
        rows = table[(table[:, 0] == item) & (table[:, 1] == dim)]
        rows = rows if index is None else rows[index : index + 1]
        images = [x[item].detach().double() for x in (self._input, self._target)]
        images = [-x if self._superlevel else x for x in images]
        image = torch.minimum(*images) if which == "comparison" else images[which == "target"]
        cycles = _cycles.representatives(image, dim, rows[:, cell : cell + 2].tolist())
        frame = self._frame
        return [c - frame for c in cycles]


_KINDS = ("matched", "unmatched_input", "unmatched_target")


class BettiTarget:
    """A target made ready once for many calls, from :meth:`precompute`.

    Takes the place of ``target`` in :func:`pyloss.betti_matching_loss`, in
    :class:`pyloss.nn.BettiMatchingLoss` and in :func:`pyloss.betti_matching`, with the same
    results bit for bit. Saved per call: the check and expansion of class indices, the conversion to
    the kernel's dtype and layout, the frame of ``padding``: 1 to 3 % of loss and gradient, measured
    on the CPU. Not saved: sorting the target and its bars, which the kernel does beside the
    input's; on CUDA likewise.

    ``len(t)`` is the batch size; ``t[i]``, ``t[2:5]`` and ``t.select(indices)`` are targets of
    these items, ``t[i]`` as a batch of one. Can be pickled.

    Attributes:
        target: the tensor that it was made of, which must not change afterwards.
        shape: of the input that it goes with.
        filtration, dims, padding: what it was made for.

    Example:
        >>> import torch, pyloss
        >>> x, labels = torch.rand(4, 3, 16, 16), torch.randint(3, (4, 16, 16))
        >>> target = pyloss.BettiTarget.precompute(labels, num_classes=3)
        >>> batch = torch.tensor([2, 0])
        >>> loss = pyloss.betti_matching_loss(x[batch], target.select(batch))
        >>> bool(loss == pyloss.betti_matching_loss(x[batch], labels[batch]))
        True
    """

    def __init__(self, target, images, spatial_dims, filtration, dims, padding, num_classes):
        self.target = target
        self.spatial_dims, self.filtration, self.dims = spatial_dims, filtration, dims
        self.padding, self.num_classes = padding, num_classes
        self._images = images  # one per direction of the filtration, framed; without a frame, one

    @classmethod
    def precompute(
        cls,
        target: Tensor,
        spatial_dims: int | None = None,
        *,
        filtration: str = "superlevel",
        dims: Sequence[int] | None = None,
        padding: str | float | None = None,
        num_classes: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> BettiTarget:
        """Makes a target ready for calls with these options.

        Args:
            target: ``(*batch, *spatial)`` as for the functions, ``(N, C, *spatial)`` for the loss;
                or with ``num_classes`` class indices ``(N, *spatial)``.
            spatial_dims: number of trailing spatial dimensions, 1 or 2; default: all but the two
                of ``(N, C, *spatial)``, with ``num_classes`` all but the first.
            filtration, dims, padding: as in the later calls.
            num_classes: number of channels of the input, for class indices.
            dtype: of the input, where it is float64 and the target is not: else each call converts.

        Raises:
            TypeError: ``target`` is no tensor.
            ValueError: ``target`` requires a gradient, has a spatial size of 0, or does not fit
                ``num_classes``; an unknown option. A later call with another shape, filtration,
                padding or other dims.
            IndexError: a class index out of range (CPU).
            NotImplementedError: three spatial dimensions.

        NaN is found by the later calls.
        """
        _check_tensor("target", target)
        if target.requires_grad:
            raise ValueError("target must not require a gradient to be computed in advance")
        if num_classes is not None:
            _check_class_indices(target, num_classes)
            if spatial_dims is None:
                spatial_dims = target.dim() - 1
        spatial_dims = _checked_spatial_dims(target, spatial_dims, "target")
        if num_classes is not None and spatial_dims != target.dim() - 1:
            raise ValueError(
                f"class indices must be (N, *spatial), got shape {tuple(target.shape)} and "
                f"spatial_dims={spatial_dims}"
            )
        if dtype is not None and dtype not in _FLOATS:
            raise ValueError(f"dtype must be a floating point dtype, got {dtype}")
        _one_of("filtration", filtration, (*_FILTRATIONS, "both"))
        dims = sorted(_checked_dims(dims, spatial_dims))
        made = cls(target, (), spatial_dims, filtration, dims, padding, num_classes)
        made._images = made._prepared(dtype)
        return made

    def _prepared(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        x = self.target
        if self.num_classes is not None:
            x = _one_hot(x, self.num_classes)
        x = _computed(x)
        if dtype is not None:
            x = x.to(torch.promote_types(x.dtype, _computed_dtype(dtype)))
        x = x.contiguous()
        if self.padding is None:
            return (x,)
        directions = _DIRECTIONS[self.filtration]
        return tuple(_framed(x, self.spatial_dims, self.padding, d) for d in directions)

    @property
    def shape(self) -> torch.Size:
        if self.num_classes is None:
            return self.target.shape
        n, *spatial = self.target.shape
        return torch.Size((n, self.num_classes, *spatial))

    @property
    def device(self) -> torch.device:
        return self.target.device

    def __len__(self) -> int:
        return self.target.shape[0]

    def __getitem__(self, item: int | slice) -> BettiTarget:
        if isinstance(item, slice):
            return self._map(lambda t: t[item])
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"an index must be an integer or a slice, got {item!r}; see select")
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of a target of {len(self)} items")
        item %= len(self)
        return self._map(lambda t: t[item : item + 1])

    def select(self, indices: Tensor | Sequence[int]) -> BettiTarget:
        """The target of these items of the batch, a 1-d tensor or a list of integers."""
        indices = torch.as_tensor(indices, dtype=torch.int64, device=self.device)
        return self._map(lambda t: t.index_select(0, indices))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BettiTarget:
        """The same on another device."""
        return self._map(lambda t: t.to(torch.device(device), non_blocking=non_blocking))

    def _map(self, f) -> BettiTarget:
        target = f(self.target)
        images = tuple(target if t is self.target else f(t) for t in self._images)
        return type(self)(
            target, images, self.spatial_dims, self.filtration, self.dims, self.padding,
            self.num_classes,
        )  # fmt: skip

    def _check(self, input, spatial_dims, filtration, dims, padding) -> None:
        """That a call is one of those it was made for."""
        if input.shape != self.shape:
            raise ValueError(
                f"input and target must have the same shape, got {tuple(input.shape)} and a "
                f"BettiTarget for {tuple(self.shape)}"
            )
        asked = dict(
            spatial_dims=spatial_dims, filtration=filtration, dims=sorted(dims), padding=padding
        )
        for name, value in asked.items():
            made_for = getattr(self, name)
            if value != made_for:
                raise ValueError(
                    f"target was computed in advance for {name}={made_for!r}, got {value!r}"
                )
        _check_same_device(input, self.target)

    def _pair(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input, without a frame, and the images of the target, of a common dtype."""
        x, images = _computed(input), self._images
        dtype = torch.promote_types(x.dtype, images[0].dtype)
        return x.to(dtype), images if images[0].dtype == dtype else self._prepared(dtype)


def persistence_pairs(
    input: Tensor,
    spatial_dims: int | None = None,
    *,
    filtration: str = "sublevel",
    dims: Sequence[int] | None = None,
    min_persistence: float = 0.0,
    essential: bool = False,
    construction: str = "V",
) -> PersistencePairs:
    r"""Barcode of cubical persistent homology, as voxels that give birth and death.

    The sublevel sets :math:`\{x \le t\}` grow with t; a component (dimension 0) or a hole (the last
    dimension) that appears at value b and vanishes at d is the bar (b, d). Bars of length 0 are
    left out.

    Args:
        input: ``(*batch, *spatial)``, any real dtype; the batch is flattened.
        spatial_dims: number of trailing spatial dimensions, 1 or 2; default: ``input.dim() - 2``,
            as for ``(N, C, *spatial)``.
        filtration: ``"sublevel"`` or ``"superlevel"``, the sets :math:`\{x \ge t\}`.
        dims: homology dimensions that are wanted; default: ``0 .. spatial_dims - 1``.
        min_persistence: leaves out bars of a length up to this.
        essential: adds the component that never dies, with a death of -1.
        construction: ``"V"``: voxels are vertices, sets are 4-connected; ``"T"``: voxels are
            squares, sets are 8-connected.

    Returns:
        :class:`PersistencePairs`; ``values`` is differentiable.

    Raises:
        TypeError: ``input`` is no tensor.
        ValueError: an unknown option, a spatial size of 0, NaN.
        NotImplementedError: three spatial dimensions.

    Example:
        >>> import torch, pyloss
        >>> ring = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
        >>> pairs = pyloss.persistence_pairs(ring, spatial_dims=2, filtration="superlevel")
        >>> pairs.index.tolist()  # one hole: dimension 1
        [[0, 1, 8, 4]]

    Reference:
        Stucki et al. arXiv 2211.15272. Garin, Heiss, Maggs, Bleile, Robins. Duality in Persistent
        Homology of Images. arXiv 2005.04597.
    """
    spatial_dims = _checked_spatial_dims(input, spatial_dims)
    dims = _checked_dims(dims, spatial_dims)
    superlevel = _one_of("filtration", filtration, _FILTRATIONS) == "superlevel"
    _one_of("construction", construction, ("V", "T"))
    _check_number("min_persistence", min_persistence)
    shape = tuple(input.shape[input.dim() - spatial_dims :])
    images = _as_batch(input, spatial_dims)
    computed = _computed(images)
    if construction == "V":
        rows = op.persistence_pairs(computed, superlevel, dims, essential)[:, :4]
    else:
        rows = _t_construction(computed, superlevel, dims, essential)
    pairs = PersistencePairs(images.flatten(1), rows, superlevel, shape)
    if min_persistence > 0:
        b, d = pairs.values.detach().unbind(1)
        keep = (b - d).abs() > min_persistence
        pairs = PersistencePairs(images.flatten(1), rows[keep], superlevel, shape)
    return pairs


def _t_construction(images, superlevel, dims, essential):
    """By duality: the V-construction of the negated image, framed by what enters first there.

    A bar (b, d) of dimension k there is the bar (d, b) of dimension D - 1 - k here; the bar that
    the frame bears is the component here that never dies.
    """
    spatial = images.dim() - 1
    f = images if superlevel else -images  # the sublevel filtration of the negated image
    framed = F.pad(f, [1] * (2 * spatial), value=-math.inf)
    dual = [spatial - 1 - d for d in dims]
    rows = op.persistence_pairs(framed, False, dual, False)[:, :4]
    rows = _unpadded(rows, tuple(framed.shape[1:]))
    rows = torch.stack([rows[:, 0], spatial - 1 - rows[:, 1], rows[:, 3], rows[:, 2]], 1)
    if not essential:
        rows = rows[rows[:, 3] >= 0]
    order = range(rows.shape[0])
    listed = rows.tolist()
    return rows[sorted(order, key=listed.__getitem__)]


def betti_matching(
    input: Tensor,
    target: Tensor | BettiTarget,
    spatial_dims: int | None = None,
    *,
    filtration: str = "superlevel",
    dims: Sequence[int] | None = None,
    padding: str | float | None = None,
) -> BettiMatching:
    r"""Betti matching: which topological features of two images are the same one, in place.

    A bar of the comparison image :math:`\min(f_I, f_T)`, whose sublevel sets contain those of both
    images, matches the two bars that the induced maps of homology send to it.

    Args:
        input: ``(*batch, *spatial)``, any real dtype; the batch is flattened.
        target: of the same shape; or a :class:`BettiTarget`.
        spatial_dims: number of trailing spatial dimensions, 1 or 2; default: ``input.dim() - 2``.
        filtration: ``"superlevel"`` for probabilities of the foreground, or ``"sublevel"``.
        dims: homology dimensions that are wanted; default: ``0 .. spatial_dims - 1``.
        padding: a frame of one voxel around both images: ``"foreground"``, the value of each image
            that enters first; ``"background"``, 0; or a number.

    Returns:
        :class:`BettiMatching`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that differ, an unknown option, a spatial size of 0, NaN.
        NotImplementedError: three spatial dimensions.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16) > 0.5
        >>> pyloss.betti_matching(x, y).counts.shape  # items, dimensions, kinds
        torch.Size([2, 2, 3])

    Reference:
        Stucki, Paetzold, Shit, Menze, Bauer. arXiv 2211.15272. Stucki et al. arXiv 2407.04683.
    """
    spatial_dims = _checked_spatial_dims(input, spatial_dims)
    dims = _checked_dims(dims, spatial_dims)
    superlevel = _one_of("filtration", filtration, _FILTRATIONS) == "superlevel"
    if isinstance(target, BettiTarget):
        target._check(input, spatial_dims, filtration, dims, padding)
        x, (y,) = target._pair(input)
    else:
        _check_same_shape(input, target)
        x, y = _common(input, target)
        if padding is not None:
            y = _framed(y, spatial_dims, padding, superlevel)
    if padding is not None:
        x = _framed(x, spatial_dims, padding, superlevel)
    x, y = (_as_batch(t, spatial_dims) for t in (x, y))
    tables = op.betti_matching(x, y, superlevel, dims)
    return BettiMatching(x, y, tables, superlevel, int(padding is not None))


def betti_matching_loss(
    input: Tensor,
    target: Tensor | BettiTarget,
    *,
    filtration: str = "superlevel",
    dims: Sequence[int] | None = None,
    weight: Sequence[float] | None = None,
    matched_weight: float = 1.0,
    unmatched_weight: float = 1.0,
    target_weight: float = 1.0,
    include_target_unmatched: bool = True,
    unmatched: str = "diagonal",
    min_persistence: float = 0.0,
    essential: bool = False,
    padding: str | float | None = None,
    include_background: bool = True,
    activation: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Betti matching loss: pulls matched features together, removes unmatched ones.

    Per item and channel, over matched bars (b, d), (b', d') and unmatched ones of either image:

    .. math::
        L = \sum_{\text{dim}} w_{\text{dim}} \Big( w_m \sum_{\text{matched}} 2 \big[(b-b')^2 +
        (d-d')^2\big] + w_u \sum_{\text{input}} (b-d)^2 + w_t \sum_{\text{target}} (b-d)^2 \Big)

    Args:
        input: ``(N, C, *spatial)`` with 1 or 2 spatial dimensions; float32, float64, float16 or
            bfloat16 (the last two are computed in float32). Each channel is a problem of its own.
        target: of the same shape, float, bool or integer; or class indices ``(N, *spatial)`` of an
            integer dtype, which are expanded to C channels; or a :class:`BettiTarget`.
        filtration: ``"superlevel"`` for probabilities of the foreground, ``"sublevel"``, or
            ``"both"``, the sum of the two losses.
        dims: homology dimensions that count; default: all.
        weight: of each entry of ``dims``; default: 1.
        matched_weight, unmatched_weight, target_weight: of the three sums, :math:`\ge 0`.
        include_target_unmatched: False leaves out the third sum, which has no gradient for a
            constant target.
        unmatched: ``"diagonal"`` as above; ``"extreme"``: an unmatched bar costs
            :math:`2[(f_b - 1)^2 + f_d^2]`, with f the input for sublevel sets and 1 - input for
            superlevel sets: birth is pushed to the background, death to the foreground.
        min_persistence: unmatched bars of the input up to this length are left out.
        essential: also matches the oldest components, by their birth.
        padding: as for :func:`pyloss.betti_matching`.
        include_background: False leaves out channel 0 if there are others.
        activation: ``None``, ``"sigmoid"`` or ``"softmax"`` (over the channels) for ``input``.
        reduction: ``"mean"`` over items and channels (0 for none), ``"sum"``, ``"none"``.

    Returns:
        0-d, or ``(N, C)`` with ``reduction="none"``; of the dtype of ``input``, or the wider one of
        it and a floating ``target``; float32 under autocast. Differentiable, twice too; by the
        target as well if it requires a gradient.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that do not fit, an unknown option, a negative weight, a spatial size of
            0, NaN (CPU; on CUDA loss and gradient of that item are NaN).
        IndexError: a class index out of range (CPU).
        NotImplementedError: three spatial dimensions.

    Example:
        >>> import torch, pyloss
        >>> logits = torch.randn(2, 1, 16, 16, requires_grad=True)
        >>> target = torch.rand(2, 1, 16, 16) > 0.5
        >>> loss = pyloss.betti_matching_loss(logits.sigmoid(), target)
        >>> loss.backward()

    Reference:
        Stucki, Paetzold, Shit, Menze, Bauer. arXiv 2211.15272. Stucki et al. arXiv 2407.04683.
        Multi-class: Berger et al. arXiv 2403.11001.
    """
    _check_tensor("input", input)
    prepared = target if isinstance(target, BettiTarget) else None
    if prepared is None:
        _check_tensor("target", target)
    spatial = _checked_spatial_dims(input, None)
    dims = _checked_dims(dims, spatial)
    _one_of("filtration", filtration, (*_FILTRATIONS, "both"))
    _one_of("unmatched", unmatched, _UNMATCHED)
    _one_of("reduction", reduction, _REDUCTIONS)
    _check_numbers(
        matched_weight=matched_weight, unmatched_weight=unmatched_weight,
        target_weight=target_weight, min_persistence=min_persistence,
    )  # fmt: skip
    dim_weight = _checked_weight(weight, dims, spatial)

    if prepared is None:
        target = _expanded(target, input)
        _check_same_shape(input, target)
    else:
        prepared._check(input, spatial, filtration, dims, padding)
        target = prepared.target
    if activation is not None:
        _one_of("activation", activation, _ACTIVATIONS)
        input = input.sigmoid() if activation == "sigmoid" else input.softmax(1)
    first = int(not include_background and input.shape[1] > 1)
    dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else None
    dtype = (dtype or input.dtype) if input.is_floating_point() else torch.get_default_dtype()
    input = input[:, first:]
    if prepared is None:
        x, y = _common(input, target[:, first:])
    else:
        x, images = prepared._pair(input)

    total = None
    for i, superlevel in enumerate(_DIRECTIONS[filtration]):
        a = x if padding is None else _framed(x, spatial, padding, superlevel)
        if prepared is not None:
            b = images[i if len(images) > 1 else 0][:, first:]
        else:
            b = y if padding is None else _framed(y, spatial, padding, superlevel)
        options = op.Options(
            superlevel=superlevel,
            dims=sum(1 << d for d in dims),
            extreme=unmatched == "extreme",
            essential=bool(essential),
            want_grad=False,
            min_persistence=float(min_persistence),
            matched_weight=float(matched_weight),
            unmatched_weight=float(unmatched_weight),
            dim_weight0=dim_weight[0],
            dim_weight1=dim_weight[1] if spatial > 1 else 0.0,
        )
        part = op.betti_loss(a, b, options, target_weight if include_target_unmatched else 0.0)
        total = part if total is None else total + part
    if torch.is_autocast_enabled(total.device.type) and dtype != torch.float64:
        dtype = torch.float32
    if (
        reduction != "none"
    ):  # before it is rounded: a float16 sum may overflow where the mean does not
        items = max(total.numel(), 1) if reduction == "mean" else 1
        total = total.sum() / items
    return total.to(dtype)


# --------------------------------------------------------------------------------------------------
# Helpers


def _gather(image: Tensor, item: Tensor, voxel: Tensor, missing: float) -> Tensor:
    values = image[item, voxel.clamp(min=0)]
    if not values.is_floating_point():
        values = values.to(torch.get_default_dtype())
    return torch.where(voxel < 0, missing, values)


def _counts(index: Tensor, items: int, dims: int) -> Tensor:
    flat = index[:, 0] * dims + index[:, 1]
    return torch.bincount(flat, minlength=items * dims).view(items, dims)


def _unravelled(voxels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(..., D) coordinates of flat indices; -1 stays -1."""
    found, rest = [], voxels.clamp(min=0)
    for size in reversed(shape):
        found.append(rest % size)
        rest = rest // size
    return torch.where(voxels.unsqueeze(-1) < 0, -1, torch.stack(found[::-1], -1))


def _unpadded(rows: Tensor, padded_shape: tuple[int, ...]) -> Tensor:
    """Voxel columns (all but two) of a framed image as indices into the image itself."""
    at = _unravelled(rows[:, 2:], padded_shape) - 1
    index = torch.zeros_like(rows[:, 2:])
    outside = torch.zeros_like(index, dtype=torch.bool)
    for axis, size in enumerate(padded_shape):
        x = at[..., axis]
        outside |= (x < 0) | (x >= size - 2)
        index = index * (size - 2) + x
    return torch.cat([rows[:, :2], torch.where(outside, -1, index)], 1)


def _as_batch(x: Tensor, spatial: int) -> Tensor:
    shape = x.shape[x.dim() - spatial :]
    return x.reshape(-1, *shape) if x.numel() else x.flatten(0, -spatial - 1)


def _framed(x: Tensor, spatial: int, padding, superlevel: bool) -> Tensor:
    """x in a frame of one voxel, which has no gradient."""
    sides = [1] * (2 * spatial)
    axes = tuple(range(x.dim() - spatial, x.dim()))
    padded = F.pad(x, sides)
    if padding == "foreground":
        value = x.detach().amax(axes, keepdim=True) if superlevel else x.detach().amin(axes, True)
    elif padding == "background":
        return padded
    elif isinstance(padding, str) or isinstance(padding, bool):
        raise ValueError(f"padding must be None, one of {_PADDINGS} or a number, got {padding!r}")
    elif not isinstance(padding, (int, float)):
        raise TypeError(f"padding must be None, a string or a number, got {padding!r}")
    elif math.isnan(padding):
        raise ValueError("padding must not be NaN: it would poison every bar")
    else:
        value = x.new_tensor(float(padding))
    inside = F.pad(torch.ones(x.shape[-spatial:], dtype=torch.bool, device=x.device), sides)
    return torch.where(inside, padded, value)


def _computed(x: Tensor) -> Tensor:
    """x in float32 or float64, exactly."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    if x.dtype in (torch.int32, torch.int64):
        small = x.device.type == "cpu" and not torch.compiler.is_compiling() and _fits(x)
        return x.to(torch.float32 if small else torch.float64)
    return x.to(torch.float32)


def _fits(x: Tensor) -> bool:
    """Whether float32 holds every value."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return -(2**24) <= int(low) and int(high) <= 2**24


def _computed_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _common(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _computed(input), _computed(target)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _expanded(target: Tensor, input: Tensor) -> Tensor:
    """Class indices (N, *spatial) or (N, 1, *spatial) as one channel per class; with one channel
    they are a mask."""
    labels, classes = target, input.shape[1]
    if target.dim() == input.dim() and target.shape[1] == 1 < classes:
        labels = target.squeeze(1)
    if labels.shape != (input.shape[0], *input.shape[2:]) or labels.is_floating_point():
        return target  # the check of shapes says so
    if classes == 1:
        return labels.unsqueeze(1)
    return target if labels.dtype == torch.bool else _one_hot(labels, classes)


def _one_hot(target: Tensor, classes: int) -> Tensor:
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and target.numel():
        low, high = (int(v) for v in torch.aminmax(target))
        if low < 0 or high >= classes:
            raise IndexError(f"Target {low if low < 0 else high} is out of bounds.")
    index = torch.arange(classes, device=target.device, dtype=torch.int64)
    index = index.view(1, classes, *(1,) * (target.dim() - 1))
    return (target.unsqueeze(1).long() == index).to(torch.uint8)


# --------------------------------------------------------------------------------------------------
# Checks


def _one_of(name: str, value, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS + _INTS:
        raise ValueError(f"{name} must be real, got {x.dtype}")


def _check_class_indices(target: Tensor, num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"class indices must be integers, got {target.dtype}")


def _checked_spatial_dims(input, spatial_dims, name: str = "input") -> int:
    _check_tensor(name, input)
    if spatial_dims is None:
        spatial_dims = input.dim() - 2
        if spatial_dims < 1:
            raise ValueError(f"{name} must be (N, C, *spatial), got shape {tuple(input.shape)}")
    if isinstance(spatial_dims, bool) or not isinstance(spatial_dims, int):
        raise TypeError(f"spatial_dims must be an integer, got {spatial_dims!r}")
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
    if spatial_dims == 3:
        raise NotImplementedError("Betti matching has 1 or 2 spatial dimensions so far, got 3")
    if input.dim() < spatial_dims:
        raise ValueError(
            f"{name} must have at least {spatial_dims} dimensions, got shape {tuple(input.shape)}"
        )
    if 0 in input.shape[input.dim() - spatial_dims :]:
        raise ValueError(f"{name} has a spatial size of 0: shape {tuple(input.shape)}")
    return spatial_dims


def _check_same_shape(input, target) -> None:
    _check_tensor("target", target)
    if input.shape != target.shape:
        raise ValueError(
            f"input and target must have the same shape, got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    _check_same_device(input, target)


def _check_same_device(input, target) -> None:
    if input.device != target.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but target is on {target.device} and "
            f"input on {input.device}"
        )


def _checked_dims(dims, spatial: int) -> list[int]:
    if dims is None:
        return list(range(spatial))
    if isinstance(dims, (str, int)) or not isinstance(dims, Iterable):
        raise TypeError(f"dims must be a sequence of integers or None, got {dims!r}")
    dims = list(dims)
    for d in dims:
        if isinstance(d, bool) or not isinstance(d, int) or d not in range(spatial):
            raise ValueError(f"dims must be integers in 0..{spatial - 1}, got {dims}")
    if len(set(dims)) != len(dims):
        raise ValueError(f"dims must not repeat, got {dims}")
    return dims


def _checked_weight(weight, dims, spatial: int) -> list[float]:
    """One number per dimension of the image, 0 for those not wanted."""
    found = [0.0] * spatial
    if isinstance(weight, (str, int, float)):
        raise TypeError(f"weight must be a sequence of numbers or None, got {weight!r}")
    weight = [1.0] * len(dims) if weight is None else [float(w) for w in weight]
    if len(weight) != len(dims):
        raise ValueError(f"weight must have one entry per entry of dims {dims}, got {weight}")
    for d, w in zip(dims, weight):
        _check_number("weight", w)
        found[d] = w
    return found


def _check_numbers(**numbers) -> None:
    for name, x in numbers.items():
        _check_number(name, x)


def _check_number(name: str, x) -> None:
    if isinstance(x, (bool, str)) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} must be a number, got {x!r}")
    if not 0 <= x < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {x}")
