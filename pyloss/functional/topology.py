"""Persistence pairs, Betti matching and the losses made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._barcodes import UNMATCHED, BettiMatching, PersistencePairs
from pyloss.functional._betti_target import DIRECTIONS, BettiTarget
from pyloss.functional._images import (
    FILTRATIONS,
    as_batch,
    as_channels,
    check_choice,
    check_not_negative,
    check_padding,
    check_real,
    check_same_shape,
    check_sequence,
    check_spatial_dims,
    checked_dims,
    checked_spatial_dims,
    checked_weight,
    common,
    computed,
    expanded,
    framed,
    ignored_voxels,
    left_out,
    unpadded,
    with_channel,
)
from pyloss.functional._ranges import bounds, can_look, warn_of_scales
from pyloss.ops import betti_matching as op

_ACTIVATIONS = ("sigmoid", "softmax")


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

    The sublevel sets :math:`\{x \le t\}` grow with t; a component (dimension 0), in 3D a loop
    (dimension 1), or a hole (the last dimension; in 3D a cavity) that appears at value b and
    vanishes at d is the bar (b, d). Bars of length 0 are left out. **Sublevel** sets are the
    default here, as in other packages of persistent homology; :func:`pyloss.betti_matching` and its
    loss take **superlevel** sets.

    Args:
        input: ``(*batch, *spatial)``, any real dtype; the batch is flattened.
        spatial_dims: number of trailing spatial dimensions, 1 to 3; default: ``input.dim() - 2``,
            as for ``(N, C, *spatial)``.
        filtration: ``"sublevel"`` or ``"superlevel"``, the sets :math:`\{x \ge t\}`.
        dims: homology dimensions that are wanted; default: ``0 .. spatial_dims - 1``.
        min_persistence: leaves out bars of a length up to this.
        essential: adds the component that never dies, with a death of -1.
        construction: ``"V"``: voxels are vertices, sets are 4-connected (3D: 6-connected); ``"T"``:
            voxels are squares (cubes), sets are 8-connected (26-connected).

    Returns:
        :class:`PersistencePairs`; ``values`` is differentiable.

    Raises:
        TypeError: ``input`` is no tensor.
        ValueError: an unknown option, a spatial size of 0, NaN.

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
    superlevel = check_choice("filtration", filtration, FILTRATIONS) == "superlevel"
    check_choice("construction", construction, ("V", "T"))
    check_not_negative(min_persistence=min_persistence)
    shape = tuple(input.shape[input.dim() - spatial_dims :])
    images = as_batch(input, spatial_dims)
    cells = computed(images)
    if construction == "V":
        rows = op.persistence_pairs(cells, superlevel, dims, bool(essential))[:, :4]
    else:
        rows = _t_construction(cells, superlevel, dims, essential)
    pairs = PersistencePairs(images.flatten(1), rows, superlevel, shape)
    if min_persistence > 0:
        b, d = checks.widened(pairs.values.detach()).unbind(1)  # a half type would round the length
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
    if bool((f == -math.inf).any()):  # the frame enters before it: places among the values instead
        places = f.unique(return_inverse=True)[1]
        f = torch.where(f.isnan(), math.nan, checks.widened(places))
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
        spatial_dims: number of trailing spatial dimensions, 1 to 3; default: ``input.dim() - 2``.
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
    superlevel = check_choice("filtration", filtration, FILTRATIONS) == "superlevel"
    check_padding(padding)
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
    return BettiMatching(x, y, tables, superlevel, int(padding is not None), dims)


def check_options(
    *, filtration, dims, weight, matched_weight, unmatched_weight, target_weight, unmatched,
    min_persistence, padding, activation, ignore_index, spatial_dims, reduction, **flags,
) -> None:  # fmt: skip
    """The options of :func:`betti_matching_loss` as far as they can be judged without images."""
    check_choice("filtration", filtration, (*FILTRATIONS, "both"))
    check_choice("unmatched", unmatched, UNMATCHED)
    check_choice("reduction", reduction, checks.REDUCTIONS)
    if activation is not None and not callable(activation):
        check_choice("activation", activation, _ACTIVATIONS)
    check_not_negative(
        matched_weight=matched_weight, unmatched_weight=unmatched_weight,
        target_weight=target_weight, min_persistence=min_persistence,
    )  # fmt: skip
    check_padding(padding)
    if ignore_index is not None:
        checks.checked_integer("ignore_index", ignore_index)
    if spatial_dims is not None:
        check_spatial_dims(spatial_dims)
    check_sequence("dims", dims, "integers")
    check_sequence("weight", weight, "numbers")


def check_dims(dims, weight, spatial_dims) -> None:
    """Refuses what fits images of no number of dimensions, or not of `spatial_dims`."""
    most = 3 if spatial_dims is None else spatial_dims
    if dims is None and spatial_dims is None and weight is not None:
        dims = range(min(max(len(weight), 1), most))
    checked_weight(weight, checked_dims(dims, most), most)


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
    activation: str | Callable[[Tensor], Tensor] | None = None,
    ignore_index: int | None = None,
    spatial_dims: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Betti matching loss: pulls matched features together, removes unmatched ones.

    Per item and channel, over matched bars (b, d), (b', d') and unmatched ones of either image:

    .. math::
        L = \sum_{\text{dim}} w_{\text{dim}} \Big( w_m \sum_{\text{matched}} 2 \big[(b-b')^2 +
        (d-d')^2\big] + w_u \sum_{\text{input}} (b-d)^2 + w_t \sum_{\text{target}} (b-d)^2 \Big)

    Args:
        input: ``(N, C, *spatial)`` with 1 to 3 spatial dimensions, or with ``spatial_dims``
            ``(N, *spatial)``; float32, float64, float16 or bfloat16 (the last two are computed in
            float32). Each channel is a problem of its own.
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
        activation: ``None``, ``"sigmoid"`` or ``"softmax"`` (over the channels) for ``input``, or a
            function that takes it and keeps its shape.
        ignore_index: voxels of this class take no part. In both images they get the value that
            enters last, a constant: 0 for superlevel sets, 1 for sublevel sets, or the last of the
            voxels that count where that is further out. What they divide stays divided until then;
            an ignored margin is as if cut off. Class indices, and masks of one channel.
        spatial_dims: number of trailing spatial dimensions; default: ``input.dim() - 2``. A tensor
            of three dimensions is ``(N, C, length)`` then, which warns: 2 takes it for
            ``(N, H, W)``. One of four is ``(N, C, H, W)``: 3 takes it for ``(N, depth, H, W)``.
        reduction: ``"mean"`` over items and channels (0 for none), ``"sum"``, ``"none"``.

    Warns where ``input`` has values outside [0, 1] beside a target within, as logits, or the target
    beside an input within, as masks of 0 and 255 do. On the CPU, outside of compiled graphs: a GPU
    would have to be waited for; there :meth:`pyloss.functional.BettiTarget.precompute` looks at
    the target.

    Returns:
        0-d, or ``(N, C)`` with ``reduction="none"``; of the dtype of ``input``, or the wider one of
        it and a floating ``target``; float32 under autocast. Differentiable, twice too; by the
        target as well if it requires a gradient.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that do not fit, an unknown option, a negative weight, a spatial size of
            0, softmax of one channel, ``ignore_index`` with a one-hot target, NaN (on CUDA loss and
            gradient of that item are NaN, but for small volumes and dimension 1 of volumes).
        IndexError: a class index out of range (CPU). On CUDA, where raising would need a
            synchronisation, it makes the target NaN.

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
    given = input
    input, spatial = as_channels(input, spatial_dims)
    check_options(
        filtration=filtration, dims=dims, weight=weight, matched_weight=matched_weight,
        unmatched_weight=unmatched_weight, target_weight=target_weight, unmatched=unmatched,
        min_persistence=min_persistence, padding=padding, activation=activation,
        ignore_index=ignore_index, spatial_dims=spatial_dims, reduction=reduction,
    )  # fmt: skip
    dims = checked_dims(dims, spatial)
    dim_weight = checked_weight(weight, dims, spatial)

    dtype = _result_dtype(input, target)
    if prepared is None:
        target = target if input is given else with_channel(target, spatial)
        target, ignored = _channels_of(target, input, ignore_index, spatial)
    else:
        prepared._check(given, spatial, filtration, dims, padding, ignore_index)
        target, ignored = prepared.target, prepared._ignored
    if ignored is not None:
        input = input.masked_fill(ignored, 0)  # before the activation: NaN is ignored as well
    input = _activated(input, activation)
    if can_look(input) and can_look(target):
        range_of_target = bounds(target) if prepared is None else prepared._bounds
        warn_of_scales(input, activation is not None, target, range_of_target)
    first = int(not include_background and input.shape[1] > 1)
    input = input[:, first:]
    if prepared is None:
        x, y = common(input, target[:, first:])
        images = (y,)
    else:
        x, images = prepared._pair(input)
        images = tuple(with_channel(t, spatial)[:, first:] for t in images)

    total = None
    for i, superlevel in enumerate(DIRECTIONS[filtration]):
        a, b = x, images[i if len(images) > 1 else 0]
        if ignored is not None:
            a, b = left_out(a, b, ignored, spatial, superlevel)
        if padding is not None:
            a = framed(a, spatial, padding, superlevel)
            if prepared is None or ignored is not None:
                b = framed(b, spatial, padding, superlevel)
        options = op.Options(
            superlevel=superlevel,
            dims=sum(1 << d for d in dims),
            extreme=unmatched == "extreme",
            essential=bool(essential),
            want_grad=False,
            min_persistence=float(min_persistence),
            matched_weight=float(matched_weight),
            unmatched_weight=float(unmatched_weight),
            **{f"dim_weight{d}": w for d, w in enumerate(dim_weight)},
        )
        part = op.betti_loss(a, b, options, target_weight if include_target_unmatched else 0.0)
        total = part if total is None else total + part
    dtype = checks.result_dtype(dtype, total)
    if reduction != "none":
        # Before it is rounded: a float16 sum may overflow where the mean does not.
        items = max(total.numel(), 1) if reduction == "mean" else 1
        total = total.sum() / items
    return total.to(dtype)


def _result_dtype(input: Tensor, target: Tensor | BettiTarget) -> torch.dtype:
    target = target.target if isinstance(target, BettiTarget) else target
    if not input.is_floating_point():
        return torch.get_default_dtype()
    if not target.is_floating_point():
        return input.dtype
    return torch.promote_types(input.dtype, target.dtype)


def _channels_of(target, input, ignore_index, spatial) -> tuple[Tensor, Tensor | None]:
    """(the target in the shape of input, the voxels (N, 1, *spatial) that are ignored)."""
    ignored = ignored_voxels(target, ignore_index, spatial)
    if ignored is not None:
        target = target.masked_fill(ignored.view(target.shape), 0)
    target = expanded(target, input)
    check_same_shape(input, target)
    return target, ignored


def _activated(input: Tensor, activation: str | Callable[[Tensor], Tensor] | None) -> Tensor:
    if activation is None:
        return input
    if callable(activation):
        found = activation(input)
        if found.shape != input.shape:
            raise ValueError(
                f"activation must keep the shape {list(input.shape)}, got {list(found.shape)}"
            )
        return found
    if activation == "softmax" and input.shape[1] == 1:
        raise ValueError("softmax over one channel is 1 everywhere: use activation='sigmoid'")
    return input.sigmoid() if activation == "sigmoid" else input.softmax(1)
