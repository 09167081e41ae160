"""Batches of images: places of voxels, frames, dtypes, class indices; and checks of all that."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._ranges import can_look, warn
from pyloss.ops._labels import outside

FILTRATIONS = ("sublevel", "superlevel")
_PADDINGS = ("foreground", "foreground_detached", "background")
_REAL = (*checks.FLOATS, torch.bool, *checks.INTEGERS)


def values_at(image: Tensor, item: Tensor, voxel: Tensor, missing: float) -> Tensor:
    values = image[item, voxel.clamp(min=0)]
    if not values.is_floating_point():
        # A missing death is infinite, so they are floating; the dtype holds every value exactly.
        wide = values.dtype in (torch.int32, torch.int64)
        least = torch.float64 if wide else torch.float32
        values = values.to(torch.promote_types(least, torch.get_default_dtype()))
    return torch.where(voxel < 0, missing, values)


def counts_of(index: Tensor, items: int, dims: int) -> Tensor:
    """Rows per item and dimension, (items, dims); no bincount, which waits for a GPU."""
    flat = index[:, 0] * dims + index[:, 1]
    return flat.new_zeros(items * dims).index_add_(0, flat, torch.ones_like(flat)).view(items, dims)


def unravelled(voxels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(..., D) coordinates of flat indices; -1 stays -1."""
    found, rest = [], voxels.clamp(min=0)
    for size in reversed(shape):
        found.append(rest % size)
        rest = rest // size
    return torch.where(voxels.unsqueeze(-1) < 0, -1, torch.stack(found[::-1], -1))


def unpadded(rows: Tensor, padded_shape: tuple[int, ...]) -> Tensor:
    """Voxel columns (all but two) of a framed image as indices into the image itself."""
    at = unravelled(rows[:, 2:], padded_shape) - 1
    index = torch.zeros_like(rows[:, 2:])
    outside = torch.zeros_like(index, dtype=torch.bool)
    for axis, size in enumerate(padded_shape):
        x = at[..., axis]
        outside |= (x < 0) | (x >= size - 2)
        index = index * (size - 2) + x
    return torch.cat([rows[:, :2], torch.where(outside, -1, index)], 1)


def as_batch(x: Tensor, spatial: int) -> Tensor:
    shape = x.shape[x.dim() - spatial :]
    return x.reshape(-1, *shape) if x.numel() else x.flatten(0, -spatial - 1)


def framed(x: Tensor, spatial: int, padding, superlevel: bool) -> Tensor:
    """x in a frame of one voxel."""
    sides = [1] * (2 * spatial)
    axes = tuple(range(x.dim() - spatial, x.dim()))
    padded = F.pad(x, sides)
    if padding in ("foreground", "foreground_detached"):
        inner = x if padding == "foreground" else x.detach()
        value = inner.amax(axes, keepdim=True) if superlevel else inner.amin(axes, keepdim=True)
    elif padding == "background":
        return padded
    else:
        value = x.new_full((), float(padding))  # filled there: a copy would wait for a GPU
    inside = F.pad(torch.ones(x.shape[-spatial:], dtype=torch.bool, device=x.device), sides)
    return torch.where(inside, padded, value)


def computed(x: Tensor) -> Tensor:
    """x in float32 or float64, exactly."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    if x.dtype in (torch.int32, torch.int64):
        if not can_look(x):
            return x.to(torch.float64)
        size = _largest(x)
        if size > 2**53:
            raise ValueError(
                f"images of integers beyond 2**53 are not exact in float64, got {size} in size"
            )
        return x.to(torch.float32 if size <= 2**24 else torch.float64)
    return x.to(torch.float32)


def left_out(
    x: Tensor, y: Tensor, ignored: Tensor, spatial: int, superlevel: bool
) -> tuple[Tensor, Tensor]:
    """Both images with one constant in the ignored voxels, which enter last there: 0 (sublevel
    sets: 1), or the last of the voxels that count where that is further out."""
    axes = tuple(range(x.dim() - spatial, x.dim()))
    last = []
    for t in (x, y):
        counted = t.detach().masked_fill(ignored, 0 if superlevel else 1)
        last.append((counted.amin if superlevel else counted.amax)(axes, keepdim=True))
    value = (torch.minimum if superlevel else torch.maximum)(*last)
    return torch.where(ignored, value, x), torch.where(ignored, value, y)


def _largest(x: Tensor) -> int:
    if x.numel() == 0:
        return 0
    low, high = torch.aminmax(x)
    return max(-int(low), int(high))


def common(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x, y = computed(input), computed(target)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def expanded(target: Tensor, input: Tensor) -> Tensor:
    """Class indices (N, *spatial) or (N, 1, *spatial) as one channel per class; with one channel
    they are a mask."""
    labels, classes = target, input.shape[1]
    if target.dim() == input.dim() and target.shape[1] == 1 < classes:
        labels = target.squeeze(1)
    if labels.shape != (input.shape[0], *input.shape[2:]) or labels.is_floating_point():
        return target  # the check of shapes says so
    if classes == 1:
        return labels.unsqueeze(1)
    return target if labels.dtype == torch.bool else one_hot(labels, classes)


def ignored_voxels(target: Tensor, ignore_index: int | None, spatial: int) -> Tensor | None:
    """(N, 1, *spatial): where class indices, or a mask of one channel, are the ignored one."""
    if ignore_index is None:
        return None
    ignore_index = checks.checked_integer("ignore_index", ignore_index)
    channels = target.shape[1] if target.dim() == spatial + 2 else 1
    if channels != 1 or target.dim() < spatial + 1:
        raise ValueError(
            "ignore_index needs class indices or a mask of one channel, got a target of shape "
            f"{tuple(target.shape)}"
        )
    return with_channel(checks.equals(target, ignore_index), spatial)


def one_hot(target: Tensor, classes: int) -> Tensor:
    """One channel per class; NaN for an item with a class out of range, where that cannot raise."""
    index = torch.arange(classes, device=target.device, dtype=torch.int64)
    index = index.view(1, classes, *(1,) * (target.dim() - 1))
    found = (target.unsqueeze(1).long() == index).to(torch.uint8)
    if not can_look(target):
        wrong = outside(target, classes).flatten(1).any(1).view(-1, *(1,) * target.dim())
        return torch.where(wrong, math.nan, found.float())
    if target.numel():
        low, high = (int(v) for v in torch.aminmax(target))
        if low < 0 or high >= classes:
            raise IndexError(f"Target {low if low < 0 else high} is out of bounds.")
    return found


# --------------------------------------------------------------------------------------------------
# Checks


def check_choice(name: str, value, known: tuple[str, ...]):
    checks.check_one_of(name, value, known, show=repr)
    return value


def check_real(name: str, x) -> None:
    checks.check_tensor(name, x)
    if x.dtype not in _REAL:
        raise ValueError(f"{name} must be real, got {x.dtype}")


def check_class_indices(target: Tensor, num_classes: int) -> int:
    given, num_classes = num_classes, checks.as_integer(num_classes)
    if num_classes is None:
        raise TypeError(f"num_classes must be an integer, got {given!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"class indices must be integers, got {target.dtype}")
    return num_classes


def checked_spatial_dims(input, spatial_dims, name: str = "input") -> int:
    check_real(name, input)
    if spatial_dims is None:
        spatial_dims = input.dim() - 2
        if spatial_dims < 1:
            raise ValueError(f"{name} must be (N, C, *spatial), got shape {tuple(input.shape)}")
        if spatial_dims == 1 and input.shape[1] > 1:  # no image has one row
            warn(
                f"{name} of shape {tuple(input.shape)} is taken for (N, C, length), signals of one "
                "dimension: give spatial_dims=2 for images (N, H, W), or spatial_dims=1"
            )
    spatial_dims = check_spatial_dims(spatial_dims)
    if input.dim() < spatial_dims:
        raise ValueError(
            f"{name} must have at least {spatial_dims} dimensions, got shape {tuple(input.shape)}"
        )
    if 0 in input.shape[input.dim() - spatial_dims :]:
        raise ValueError(f"{name} has a spatial size of 0: shape {tuple(input.shape)}")
    return spatial_dims


def check_spatial_dims(spatial_dims) -> int:
    given, spatial_dims = spatial_dims, checks.as_integer(spatial_dims)
    if spatial_dims is None:
        raise TypeError(f"spatial_dims must be an integer, got {given!r}")
    if spatial_dims not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims}")
    return spatial_dims


def as_channels(input, spatial_dims, name: str = "input") -> tuple[Tensor, int]:
    """((N, C, *spatial), spatial dimensions) of that, or with `spatial_dims` of (N, *spatial)."""
    spatial = checked_spatial_dims(input, spatial_dims, name)
    if input.dim() - spatial not in (1, 2):
        raise ValueError(
            f"{name} must be (N, C, *spatial) or, with spatial_dims, (N, *spatial); got shape "
            f"{tuple(input.shape)} and spatial_dims={spatial}"
        )
    return with_channel(input, spatial), spatial


def with_channel(x: Tensor, spatial: int) -> Tensor:
    return x.unsqueeze(1) if x.dim() == spatial + 1 else x


def check_same_shape(input, target) -> None:
    check_real("target", target)
    if input.shape != target.shape:
        raise ValueError(
            f"input and target must have the same shape, got {tuple(input.shape)} and "
            f"{tuple(target.shape)}"
        )
    checks.check_device("target", target, input)


def checked_dims(dims, spatial: int) -> list[int]:
    if dims is None:
        return list(range(spatial))
    check_sequence("dims", dims, "integers")
    dims = list(dims)
    found = [checks.as_integer(d) for d in dims]
    for d in found:
        if d is None or d not in range(spatial):
            raise ValueError(f"dims must be integers in 0..{spatial - 1}, got {dims}")
    dims = found
    if len(set(dims)) != len(dims):
        raise ValueError(f"dims must not repeat, got {dims}")
    return dims


def checked_weight(weight, dims, spatial: int) -> list[float]:
    """One number per dimension of the image, 0 for those not wanted."""
    found = [0.0] * spatial
    check_sequence("weight", weight, "numbers")
    weight = [1.0] * len(dims) if weight is None else list(weight)
    if any(isinstance(w, str) for w in weight):
        raise TypeError(f"weight must be a sequence of numbers or None, got {weight}")
    weight = [float(w) for w in weight]
    if len(weight) != len(dims):
        raise ValueError(f"weight must have one entry per entry of dims {dims}, got {weight}")
    for d, w in zip(dims, weight):
        check_not_negative(weight=w)
        found[d] = w
    return found


def check_padding(padding) -> None:
    if padding is None or (isinstance(padding, str) and padding in _PADDINGS):
        return
    if isinstance(padding, (str, bool)):
        raise ValueError(f"padding must be None, one of {_PADDINGS} or a number, got {padding!r}")
    if not isinstance(padding, Real):
        raise TypeError(f"padding must be None, a string or a number, got {padding!r}")
    if math.isnan(padding):
        raise ValueError("padding must not be NaN: it would poison every bar")


def check_item(item, items: int) -> None:
    if checks.checked_integer("item", item) not in range(items):
        raise IndexError(f"item must be in 0..{items - 1}, got {item}")


def check_sequence(name: str, values, of: str) -> None:
    if values is not None and (isinstance(values, str) or not isinstance(values, Iterable)):
        raise TypeError(f"{name} must be a sequence of {of} or None, got {values!r}")


def check_not_negative(**numbers) -> None:
    for name, x in numbers.items():
        checks.check_number(name, x)
        if not 0 <= x < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {x}")
