"""Persistence pairs, Betti matching and the losses made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._barcodes import UNMATCHED, BettiMatching, PersistencePairs
from pyloss.functional._images import (
    as_batch,
    check_choice,
    check_class_indices,
    check_not_negative,
    check_real,
    check_same_shape,
    checked_dims,
    checked_spatial_dims,
    checked_weight,
    common,
    computed,
    expanded,
    framed,
    one_hot,
    unpadded,
)
from pyloss.ops import betti_matching as op
from pyloss.ops._launch import accumulator_dtype

_FILTRATIONS = ("sublevel", "superlevel")
_DIRECTIONS = {"sublevel": (False,), "superlevel": (True,), "both": (False, True)}
_ACTIVATIONS = ("sigmoid", "softmax")


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
        check_real("target", target)
        if target.requires_grad:
            raise ValueError("target must not require a gradient to be computed in advance")
        if num_classes is not None:
            check_class_indices(target, num_classes)
            if spatial_dims is None:
                spatial_dims = target.dim() - 1
        spatial_dims = checked_spatial_dims(target, spatial_dims, "target")
        if num_classes is not None and spatial_dims != target.dim() - 1:
            raise ValueError(
                f"class indices must be (N, *spatial), got shape {tuple(target.shape)} and "
                f"spatial_dims={spatial_dims}"
            )
        if dtype is not None and dtype not in checks.FLOATS:
            raise ValueError(f"dtype must be a floating point dtype, got {dtype}")
        check_choice("filtration", filtration, (*_FILTRATIONS, "both"))
        dims = sorted(checked_dims(dims, spatial_dims))
        made = cls(target, (), spatial_dims, filtration, dims, padding, num_classes)
        made._images = made._prepared(dtype)
        return made

    def _prepared(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        x = self.target
        if self.num_classes is not None:
            x = one_hot(x, self.num_classes)
        x = computed(x)
        if dtype is not None:
            x = x.to(torch.promote_types(x.dtype, accumulator_dtype(dtype)))
        x = x.contiguous()
        if self.padding is None:
            return (x,)
        directions = _DIRECTIONS[self.filtration]
        return tuple(framed(x, self.spatial_dims, self.padding, d) for d in directions)

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
        index = checks.as_integer(item)
        if index is None:
            raise TypeError(f"an index must be an integer or a slice, got {item!r}; see select")
        item = index
        if not -len(self) <= item < len(self):
            raise IndexError(f"item {item} of a target of {len(self)} items")
        item %= len(self)
        return self._map(lambda t: t[item : item + 1])

    def select(self, indices: Tensor | Sequence[int]) -> BettiTarget:
        """The target of these items of the batch.

        Args:
            indices: integers, negative ones from the end, in any order and repeated at will; or a
                bool mask of the batch, which selects as ``target[mask]`` does. 1-d, a tensor or
                what :func:`torch.as_tensor` takes.

        Raises:
            TypeError: neither bool nor integer.
            ValueError: not 1-d, or a mask of another length.
            IndexError: an item out of range (indices on the CPU).
        """
        places = _places(indices, len(self)).to(self.device)
        return self._map(lambda t: t.index_select(0, places))

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
        checks.check_device("target", self.target, input)

    def _pair(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The input, without a frame, and the images of the target, of a common dtype."""
        x, images = computed(input), self._images
        dtype = torch.promote_types(x.dtype, images[0].dtype)
        return x.to(dtype), images if images[0].dtype == dtype else self._prepared(dtype)


def _places(indices: Tensor | Sequence[int], items: int) -> Tensor:
    """Indices or a mask of a batch as int64 indices from 0 on."""
    found = torch.as_tensor(indices)
    if not isinstance(indices, Tensor) and found.numel() == 0:
        found = found.long()  # an empty list has no dtype of its own
    if found.dtype not in (torch.bool, *checks.INTEGERS):
        raise TypeError(f"indices must be integers or a bool mask, got {found.dtype}")
    if found.dim() != 1:
        raise ValueError(f"indices must have one dimension, got shape {list(found.shape)}")
    if found.dtype == torch.bool:
        if len(found) != items:
            raise ValueError(f"a mask of {len(found)} entries for a target of {items} items")
        return found.nonzero().squeeze(1)
    found = found.long()
    if found.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = found[(found < -items) | (found >= items)]
        if outside.numel():
            raise IndexError(f"item {int(outside[0])} of a target of {items} items")
    return torch.where(found < 0, found + items, found)


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
    left out. **Sublevel** sets are the default here, as in other packages of persistent homology;
    :func:`pyloss.betti_matching` and its loss take **superlevel** sets.

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
    spatial_dims = checked_spatial_dims(input, spatial_dims)
    dims = checked_dims(dims, spatial_dims)
    superlevel = check_choice("filtration", filtration, _FILTRATIONS) == "superlevel"
    check_choice("construction", construction, ("V", "T"))
    check_not_negative(min_persistence=min_persistence)
    shape = tuple(input.shape[input.dim() - spatial_dims :])
    images = as_batch(input, spatial_dims)
    cells = computed(images)
    if construction == "V":
        rows = op.persistence_pairs(cells, superlevel, dims, essential)[:, :4]
    else:
        rows = _t_construction(cells, superlevel, dims, essential)
    pairs = PersistencePairs(images.flatten(1), rows, superlevel, shape)
    if min_persistence > 0:
        b, d = pairs.values.detach().double().unbind(1)  # a half type would round the length
        keep = (b - d).abs() > min_persistence
        pairs = PersistencePairs(images.flatten(1), rows[keep], superlevel, shape)
    return pairs


def _t_construction(images, superlevel, dims, essential):
    """By duality: the V-construction of the negated image, padded by what enters first there.

    A bar (b, d) of dimension k there is the bar (d, b) of dimension D - 1 - k here; the bar that
    the frame bears is the component here that never dies.
    """
    spatial = images.dim() - 1
    f = images if superlevel else -images  # the sublevel filtration of the negated image
    padded = F.pad(f, [1] * (2 * spatial), value=-math.inf)
    dual = [spatial - 1 - d for d in dims]
    rows = op.persistence_pairs(padded, False, dual, False)[:, :4]
    rows = unpadded(rows, tuple(padded.shape[1:]))
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
    images, matches the two bars that the induced maps of homology send to it. By default it is of
    **superlevel** sets (bright is foreground), where :func:`pyloss.persistence_pairs` takes
    **sublevel** sets.

    Args:
        input: ``(*batch, *spatial)``, any real dtype; the batch is flattened.
        target: of the same shape; or a :class:`BettiTarget`.
        spatial_dims: number of trailing spatial dimensions, 1 or 2; default: ``input.dim() - 2``.
        filtration: ``"superlevel"`` for probabilities of the foreground, or ``"sublevel"``.
        dims: homology dimensions that are wanted; default: ``0 .. spatial_dims - 1``.
        padding: a frame of one voxel around both images: ``"foreground"``, the value of each image
            that enters first, with its gradient (equal values share it); ``"foreground_detached"``,
            the same as a constant; ``"background"``, 0; or a number.

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
    spatial_dims = checked_spatial_dims(input, spatial_dims)
    dims = checked_dims(dims, spatial_dims)
    superlevel = check_choice("filtration", filtration, _FILTRATIONS) == "superlevel"
    if isinstance(target, BettiTarget):
        target._check(input, spatial_dims, filtration, dims, padding)
        x, (y,) = target._pair(input)
    else:
        check_same_shape(input, target)
        x, y = common(input, target)
        if padding is not None:
            y = framed(y, spatial_dims, padding, superlevel)
    if padding is not None:
        x = framed(x, spatial_dims, padding, superlevel)
    x, y = (as_batch(t, spatial_dims) for t in (x, y))
    tables = op.betti_matching(x, y, superlevel, dims)
    return BettiMatching(x, y, tables, superlevel, int(padding is not None))


def check_options(options: dict) -> None:
    """The names among the options of :func:`betti_matching_loss`: a typo is found at once."""
    check_choice("filtration", options["filtration"], (*_FILTRATIONS, "both"))
    check_choice("unmatched", options["unmatched"], UNMATCHED)
    check_choice("reduction", options["reduction"], checks.REDUCTIONS)
    if options["activation"] is not None:
        check_choice("activation", options["activation"], _ACTIVATIONS)


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
            0, softmax of one channel, NaN (CPU; on CUDA loss and gradient of that item are NaN).
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
    check_real("input", input)
    prepared = target if isinstance(target, BettiTarget) else None
    if prepared is None:
        check_real("target", target)
    spatial = checked_spatial_dims(input, None)
    dims = checked_dims(dims, spatial)
    check_choice("filtration", filtration, (*_FILTRATIONS, "both"))
    check_choice("unmatched", unmatched, UNMATCHED)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    check_not_negative(
        matched_weight=matched_weight, unmatched_weight=unmatched_weight,
        target_weight=target_weight, min_persistence=min_persistence,
    )  # fmt: skip
    dim_weight = checked_weight(weight, dims, spatial)

    if prepared is None:
        target = expanded(target, input)
        check_same_shape(input, target)
    else:
        prepared._check(input, spatial, filtration, dims, padding)
        target = prepared.target
    if activation is not None:
        check_choice("activation", activation, _ACTIVATIONS)
        if activation == "softmax" and input.shape[1] == 1:
            raise ValueError("softmax over one channel is 1 everywhere: use activation='sigmoid'")
        input = input.sigmoid() if activation == "sigmoid" else input.softmax(1)
    first = int(not include_background and input.shape[1] > 1)
    dtype = torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else None
    dtype = (dtype or input.dtype) if input.is_floating_point() else torch.get_default_dtype()
    input = input[:, first:]
    if prepared is None:
        x, y = common(input, target[:, first:])
    else:
        x, images = prepared._pair(input)

    total = None
    for i, superlevel in enumerate(_DIRECTIONS[filtration]):
        a = x if padding is None else framed(x, spatial, padding, superlevel)
        if prepared is not None:
            b = images[i if len(images) > 1 else 0][:, first:]
        else:
            b = y if padding is None else framed(y, spatial, padding, superlevel)
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
    dtype = checks.result_dtype(dtype, total)
    if reduction != "none":
        # Before it is rounded: a float16 sum may overflow where the mean does not.
        items = max(total.numel(), 1) if reduction == "mean" else 1
        total = total.sum() / items
    return total.to(dtype)
