"""Targets of the Betti matching loss that were made ready in advance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._images import (
    FILTRATIONS,
    check_choice,
    check_class_indices,
    check_padding,
    check_real,
    checked_dims,
    checked_spatial_dims,
    computed,
    framed,
    ignored_voxels,
    one_hot,
)
from pyloss.functional._ranges import bounds, warn_of_bytes
from pyloss.ops._launch import accumulator_dtype

DIRECTIONS = {"sublevel": (False,), "superlevel": (True,), "both": (False, True)}


class BettiTarget:
    """A target made ready once for many calls, from :meth:`precompute`.

    Takes the place of ``target`` in :func:`pyloss.betti_matching_loss`, in
    :class:`pyloss.nn.BettiMatchingLoss` and in :func:`pyloss.betti_matching`, with the same
    results bit for bit. Saved per call: the check and expansion of class indices, the conversion to
    the kernel's dtype and layout, the frame of ``padding`` (not with ``ignore_index``): 1 to 3 % of
    loss and gradient, measured on the CPU. Not saved: sorting the target and its bars, which the
    kernel does beside the input's; on CUDA likewise.

    ``len(t)`` is the batch size; ``t[i]``, ``t[2:5]`` and ``t.select(indices)`` are targets of
    these items, ``t[i]`` as a batch of one. Can be pickled.

    Attributes:
        target: the tensor that it was made of, which must not change afterwards.
        shape: of the input that it goes with.
        filtration, dims, padding, ignore_index: what it was made for.

    Example:
        >>> import torch, pyloss
        >>> x, labels = torch.rand(4, 3, 16, 16), torch.randint(3, (4, 16, 16))
        >>> target = pyloss.BettiTarget.precompute(labels, num_classes=3)
        >>> batch = torch.tensor([2, 0])
        >>> loss = pyloss.betti_matching_loss(x[batch], target.select(batch))
        >>> bool(loss == pyloss.betti_matching_loss(x[batch], labels[batch]))
        True
    """

    def __init__(
        self, target, images, spatial_dims, filtration, dims, padding, num_classes,
        ignore_index=None, ignored=None, bounds=(0.0, 1.0),
    ):  # fmt: skip
        self.target = target
        self.spatial_dims, self.filtration, self.dims = spatial_dims, filtration, dims
        self.padding, self.num_classes, self.ignore_index = padding, num_classes, ignore_index
        # One per direction of the filtration, framed; one where there is no frame, or where the
        # voxels that are ignored get values that depend on the input.
        self._images = images
        self._ignored = ignored  # (N, 1, *spatial)
        self._bounds = bounds  # smallest and largest value

    def __repr__(self) -> str:
        names = ("filtration", "dims", "padding", "num_classes", "ignore_index")
        made_for = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"BettiTarget(shape={tuple(self.shape)}, {made_for}, device={str(self.device)!r})"

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
        ignore_index: int | None = None,
    ) -> BettiTarget:
        """Makes a target ready for calls with these options.

        Args:
            target: ``(*batch, *spatial)`` as for the functions, ``(N, C, *spatial)`` for the loss;
                or with ``num_classes`` class indices ``(N, *spatial)``.
            spatial_dims: number of trailing spatial dimensions, 1 to 3; default: all but the two
                of ``(N, C, *spatial)``, with ``num_classes`` all but the first.
            filtration, dims, padding: as in the later calls.
            num_classes: number of channels of the input, for class indices.
            dtype: of the input, where it is float64 and the target is not: else each call converts.
            ignore_index: as for the loss, of class indices or a mask ``(N, 1, *spatial)``.

        Warns of a mask of 0 and 255, and keeps the smallest and the largest value: here, once, a
        GPU is waited for.

        Raises:
            TypeError: ``target`` is no tensor.
            ValueError: ``target`` requires a gradient, has a spatial size of 0, or does not fit
                ``num_classes``; an unknown option. A later call with another shape, filtration,
                padding or other dims.
            IndexError: a class index out of range (CPU).

        NaN is found by the later calls.
        """
        check_real("target", target)
        if target.requires_grad:
            raise ValueError("target must not require a gradient to be computed in advance")
        if num_classes is not None:
            num_classes = check_class_indices(target, num_classes)
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
        check_choice("filtration", filtration, (*FILTRATIONS, "both"))
        check_padding(padding)
        if ignore_index is not None:
            ignore_index = checks.checked_integer("ignore_index", ignore_index)
        dims = sorted(checked_dims(dims, spatial_dims))
        ignored = ignored_voxels(target, ignore_index, spatial_dims)
        made = cls(
            target, (), spatial_dims, filtration, dims, padding, num_classes, ignore_index, ignored
        )
        made._images = made._prepared(dtype)
        if num_classes is None:
            plain = made._images[0] if ignored is not None else target
            made._bounds = bounds(plain)
            warn_of_bytes(plain)
        return made

    def _prepared(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        x = self.target
        if self._ignored is not None:
            x = x.masked_fill(self._ignored.view(x.shape), 0)
        if self.num_classes is not None:
            x = one_hot(x, self.num_classes)
        x = computed(x)
        if dtype is not None:
            x = x.to(torch.promote_types(x.dtype, accumulator_dtype(dtype)))
        x = x.contiguous()
        if self.padding is None or self._ignored is not None:
            return (x,)
        directions = DIRECTIONS[self.filtration]
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
        ignored = None if self._ignored is None else f(self._ignored)
        return type(self)(
            target, images, self.spatial_dims, self.filtration, self.dims, self.padding,
            self.num_classes, self.ignore_index, ignored, self._bounds,
        )  # fmt: skip

    def _check(self, input, spatial_dims, filtration, dims, padding, ignore_index=None) -> None:
        """That a call is one of those it was made for."""
        if input.shape != self.shape:
            raise ValueError(
                f"input and target must have the same shape, got {tuple(input.shape)} and a "
                f"BettiTarget for {tuple(self.shape)}"
            )
        asked = dict(
            spatial_dims=spatial_dims, filtration=filtration, dims=sorted(dims), padding=padding,
            ignore_index=ignore_index,
        )  # fmt: skip
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


# Public there, and shown there.
BettiTarget.__module__ = "pyloss.functional.topology"
