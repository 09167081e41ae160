"""Topology metrics: Betti numbers of masks, and errors of segmentations by feature."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyloss.functional import _images as images
from pyloss.functional import topology as F
from pyloss.functional._checks import REDUCTIONS, at_least, check_number
from pyloss.functional._images import check_real
from pyloss.functional._options import check_names, names_of


@torch.no_grad()
def betti_numbers(mask: Tensor, spatial_dims: int | None = None) -> Tensor:
    r"""Betti numbers of masks: components :math:`b_0`; in 2D holes :math:`b_1`; in 3D loops
    :math:`b_1` and cavities :math:`b_2`.

    The foreground is 4-connected and the background 8-connected; 6- and 26-connected in 3D, where
    :math:`b_1 = b_0 + b_2 - \chi`, with Euler's number :math:`\chi` from counts of cells.

    Args:
        mask: ``(*batch, *spatial)``, any real dtype; what is not 0 is foreground.
        spatial_dims: number of trailing spatial dimensions, 1 to 3; default: ``mask.dim() - 2``.

    Returns:
        int64 ``(*batch, spatial_dims)``.

    Raises:
        TypeError, ValueError: as :func:`pyloss.persistence_pairs`.

    Example:
        >>> import torch, pyloss
        >>> ring = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
        >>> pyloss.betti_numbers(ring, spatial_dims=2)
        tensor([1, 1])

    Reference:
        Stucki et al. arXiv 2211.15272.
    """
    check_real("mask", mask)
    _check_no_nan("mask", mask)
    mask = mask != 0
    spatial = images.checked_spatial_dims(mask, spatial_dims, "mask")
    ends = sorted({0, spatial - 1})
    counts = F.persistence_pairs(mask, spatial, filtration="superlevel", dims=ends).counts
    # Every bar of a mask is born in the foreground and dies in the background; the component that
    # never dies is missing, and is one of the foreground if there is any.
    counts[:, 0] += mask.reshape(counts.shape[0], -1).any(1) if counts.shape[0] else 0
    counts = counts.view(*mask.shape[: mask.dim() - spatial], spatial)
    if spatial == 3:
        counts[..., 1] = counts[..., 0] + counts[..., 2] - _euler_number(mask, spatial)
    return counts


@torch.no_grad()
def betti_number_error(
    input: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    *,
    include_background: bool = True,
    spatial_dims: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Difference of Betti numbers, :math:`|b_d(x \ge t) - b_d(y \ge t)|`.

    Args:
        input: ``(N, C, *spatial)`` probabilities, or with ``spatial_dims`` ``(N, *spatial)``.
        target: of the same shape, or class indices ``(N, *spatial)``.
        threshold: values from here on are foreground.
        include_background: False leaves out channel 0 if there are others.
        spatial_dims: as for :func:`pyloss.betti_matching_loss`.
        reduction: ``"mean"`` or ``"sum"`` over items and channels, ``"none"``.

    Returns:
        Per dimension ``(D)``; ``(N, C, D)`` with ``reduction="none"``. float32.

    Raises:
        TypeError, ValueError, IndexError: as :func:`pyloss.betti_matching_loss`.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
        >>> x[..., 1:4, 1:4], y[..., 0, 0] = 0.9, 1
        >>> x[..., 2, 2] = 0.2
        >>> pyloss.betti_number_error(x, y)  # one component each, one hole too many
        tensor([0., 1.])

    Reference:
        Stucki et al. arXiv 2211.15272.
    """
    _check_options(threshold, reduction)
    x, y, spatial = _masks(input, target, threshold, include_background, spatial_dims)
    numbers = (betti_numbers(t, spatial) for t in (x, y))
    return _reduced(torch.sub(*numbers).abs().float(), reduction)


@torch.no_grad()
def betti_matching_error(
    input: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    *,
    normalize: bool = False,
    binarize: bool = True,
    include_background: bool = True,
    spatial_dims: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Number of features of either mask that the other does not have in the same place.

    Args:
        input: ``(N, C, *spatial)`` probabilities, or with ``spatial_dims`` ``(N, *spatial)``.
        target: of the same shape, or class indices ``(N, *spatial)``.
        threshold: values from here on are foreground.
        normalize: the sum over the dimensions, divided by the number of features of the target and
            at most 1; a target without features gives 0, or 1 if there is any error.
        binarize: False: the Betti matching loss of each dimension instead, ``threshold`` unused.
        include_background: False leaves out channel 0 if there are others.
        spatial_dims: as for :func:`pyloss.betti_matching_loss`.
        reduction: ``"mean"`` or ``"sum"`` over items and channels, ``"none"``.

    Returns:
        Per dimension ``(D)``, with ``normalize`` 0-d; with ``reduction="none"`` ``(N, C, D)`` or
        ``(N, C)``. float32.

    Raises:
        TypeError, ValueError, IndexError: as :func:`pyloss.betti_matching_loss`.

    Example:
        >>> import torch, pyloss
        >>> x, y = torch.zeros(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
        >>> x[..., 0, 0], y[..., 4, 4], y[..., 0, 0] = 1, 1, 1
        >>> pyloss.betti_matching_error(x, y)  # a component of the target has no counterpart
        tensor([1., 0.])

    Reference:
        Stucki et al. arXiv 2211.15272. Normalised: Berger et al. arXiv 2403.11001.
    """
    _check_options(threshold, reduction, normalize, binarize)
    if not binarize:
        spatial = images.checked_spatial_dims(input, spatial_dims)
        options = dict(
            include_background=include_background, spatial_dims=spatial, reduction="none"
        )
        dims = range(spatial)
        per_dim = [F.betti_matching_loss(input, target, dims=[d], **options) for d in dims]
        return _reduced(torch.stack(per_dim, -1).float(), reduction)
    x, y, spatial = _masks(input, target, threshold, include_background, spatial_dims)
    counts = F.betti_matching(x, y, spatial).counts
    error = (counts[..., 1] + counts[..., 2]).view(*x.shape[:2], counts.shape[1]).float()
    if not normalize:
        return _reduced(error, reduction)
    features = betti_numbers(y, spatial).sum(-1)
    error = error.sum(-1)
    share = (error / features.clamp(min=1)).clamp(max=1.0)
    return _reduced(torch.where(features == 0, (error > 0).float(), share), reduction)


def _euler_number(mask: Tensor, spatial: int) -> Tensor:
    """Cells of even dimension less those of odd dimension, of the V-construction."""
    total: Tensor | int = 0
    for axes in itertools.product((False, True), repeat=spatial):
        cells = mask
        for axis in (a - spatial for a, along in enumerate(axes) if along):
            length = max(cells.shape[axis] - 1, 0)
            cells = cells.narrow(axis, 0, length) & cells.narrow(
                axis, cells.shape[axis] - length, length
            )
        total = total + (-1) ** sum(axes) * cells.flatten(-spatial).sum(-1)
    return total


def _check_options(threshold, reduction="none", normalize=False, binarize=True) -> None:
    check_number("threshold", threshold)
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, got nan")
    images.check_choice("reduction", reduction, REDUCTIONS)
    if normalize and not binarize:
        raise ValueError("normalize needs binarize=True")


def _masks(input, target, threshold, include_background, spatial_dims):
    """(mask of the input, mask of the target, spatial dimensions), (N, C, *spatial)."""
    check_real("input", input)
    check_real("target", target)
    given = input
    input, spatial = images.as_channels(input, spatial_dims)
    target = target if input is given else images.with_channel(target, spatial)
    target = images.expanded(target, input)
    images.check_same_shape(input, target)
    if not include_background and input.shape[1] > 1:
        input, target = input[:, 1:], target[:, 1:]
    _check_no_nan("input", input)
    _check_no_nan("target", target)
    return at_least(input, threshold), at_least(target, threshold), spatial


def _check_no_nan(name, x):
    if x.is_floating_point() and bool(x.isnan().any()):
        raise ValueError(f"{name} must not contain NaN")


def _reduced(x: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return x
    total = x.sum((0, 1))
    return total if reduction == "sum" else total / max(x.shape[0] * x.shape[1], 1)


class _Mean:
    """Mean of a metric over all items and channels seen since the last reset."""

    _function: Callable[..., Tensor]

    def __init__(self, **options) -> None:
        check_names(type(self).__name__, options, names_of(self._function, without=("reduction",)))
        names = ("threshold", "normalize", "binarize")
        _check_options(**{name: options[name] for name in names if name in options})
        if options.get("spatial_dims") is not None:
            images.check_spatial_dims(options["spatial_dims"])
        self.options = options
        self.reset()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"

    def reset(self) -> None:
        """Forgets everything."""
        self._total: Tensor | None = None
        self._count = 0

    def update(self, input: Tensor, target: Tensor) -> None:
        """Adds a batch; arguments as for the function."""
        self(input, target)

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Adds a batch as `update` does, and returns the mean of this batch alone."""
        found = self._function(input, target, **self.options, reduction="none").double()
        total, count = found.sum((0, 1)), found.shape[0] * found.shape[1]
        self._total = total if self._total is None else self._total + total
        self._count += count
        return (total / max(count, 1)).float()

    def compute(self) -> Tensor:
        """The mean so far; RuntimeError before the first update."""
        if self._total is None:
            raise RuntimeError(f"{type(self).__name__}.compute() before update()")
        return (self._total / max(self._count, 1)).float()

    def aggregate(self) -> Tensor:
        """`compute` by the name that MONAI's metrics have for it."""
        return self.compute()


class BettiNumberError(_Mean):
    r"""Mean over batches of :func:`pyloss.betti_number_error`, :math:`|b_d(x) - b_d(y)|`.

    Args:
        threshold: values from here on are foreground.
        **options: the other keyword arguments of the function, except ``reduction``.

    Shape:
        - input: ``(N, C, *spatial)``; target: the same, or ``(N, *spatial)``
        - compute: ``(D)``

    ``metric(input, target)`` adds a batch too, and returns the mean of it; ``aggregate`` is
    ``compute``.

    Raises:
        As :func:`pyloss.betti_number_error`, for the options when made; RuntimeError: ``compute``
        before ``update``.

    Example:
        >>> import torch, pyloss
        >>> metric = pyloss.metrics.BettiNumberError()
        >>> for _ in range(3):
        ...     metric.update(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16) > 0.5)
        >>> metric.compute().shape
        torch.Size([2])

    Reference:
        Stucki et al. arXiv 2211.15272.
    """

    _function = staticmethod(betti_number_error)

    def __init__(self, threshold: float = 0.5, **options) -> None:
        super().__init__(threshold=threshold, **options)


class BettiMatchingError(_Mean):
    r"""Mean over batches of :func:`pyloss.betti_matching_error`, the number of unmatched features.

    Args:
        threshold: values from here on are foreground.
        **options: the other keyword arguments of the function, except ``reduction``.

    Shape:
        - input: ``(N, C, *spatial)``; target: the same, or ``(N, *spatial)``
        - compute: ``(D)``; 0-d with ``normalize=True``

    ``metric(input, target)`` adds a batch too, and returns the mean of it; ``aggregate`` is
    ``compute``.

    Raises:
        As :func:`pyloss.betti_matching_error`, for the options when made; RuntimeError: ``compute``
        before ``update``.

    Example:
        >>> import torch, pyloss
        >>> metric = pyloss.metrics.BettiMatchingError(normalize=True)
        >>> metric.update(torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 16) > 0.5)
        >>> metric.compute().shape
        torch.Size([])

    Reference:
        Stucki et al. arXiv 2211.15272.
    """

    _function = staticmethod(betti_matching_error)

    def __init__(self, threshold: float = 0.5, **options) -> None:
        super().__init__(threshold=threshold, **options)
