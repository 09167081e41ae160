"""What the region losses of segmentation share: targets, probabilities, sums over the voxels.

A loss reads its target (:func:`read_target`), activates its input (:func:`probabilities`), sums
over the voxels (:func:`overlaps`), and reduces what it makes of the sums (:func:`finished`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import check_range
from pyloss.functional._ranges import bounds, can_look, outside, warn
from pyloss.ops._launch import accumulator_dtype, constants
from pyloss.ops._transforms import functorch_active


class Target(NamedTuple):
    """The channels that count, as all region losses take them."""

    values: Tensor  # (N, C', *): bool where the target was class indices; 0 where ignored
    ignored: Tensor | None  # (N, 1, *) bool: voxels that do not count
    poison: Tensor | None  # (N, 1): NaN for an item with a class index out of range, else 1
    first: int  # the channel of the input that the first of them is
    labels: Tensor  # class indices (N, *), otherwise (N, C, *), as given
    is_index: bool


def check_options(
    *, sigmoid, softmax, other_act, reduction, smooth_nr, smooth_dr, ignore_index, empty, validate,
    **others,
) -> None:  # fmt: skip
    """The options of a region loss as far as they can be judged without tensors."""
    if bool(sigmoid) + bool(softmax) + (other_act is not None) > 1:
        raise ValueError("at most one of sigmoid, softmax and other_act may be set")
    if other_act is not None and not callable(other_act):
        raise TypeError(f"other_act must be callable, got {type(other_act).__name__}")
    for name, value in (("smooth_nr", smooth_nr), ("smooth_dr", smooth_dr)):
        check_range(name, value, 0.0)
    check_target_options(reduction, ignore_index, empty, validate)


def check_target_options(reduction, ignore_index, empty, validate) -> None:
    checks.check_reduction(reduction)
    if ignore_index is not None:
        checks.checked_integer("ignore_index", ignore_index)
    checks.check_empty(empty)
    if validate is not None and validate not in (True, False):
        raise ValueError(f"validate must be True, False or None, got {validate!r}")


def checked_weights(weight) -> float | list[float]:
    """One number or several (an array of numpy's too), none of them negative."""
    several = isinstance(weight, Iterable)
    found = list(weight) if several else [weight]
    for value in found:
        check_range("weight", value, 0.0)
    found = [float(value) for value in found]
    return found if several else found[0]


def read_target(input, target, *, include_background, to_onehot_y, ignore_index) -> Target:
    """Looks at input and target together; raises where they do not fit."""
    channels = checked_channels(input)
    labels, is_index = split_target(input, target, to_onehot_y)
    if ignore_index is not None and not is_index and channels > 1:
        raise ValueError("ignore_index needs class indices, target is one-hot")
    if channels == 1 and not include_background:
        warn("include_background=False has no effect: input has one channel")
    first = 0 if include_background or channels == 1 else 1
    ignored = poison = None
    if ignore_index is not None:
        ignored = checks.equals(_as_channel(labels, input), ignore_index)
    if is_index:
        poison = _checked_classes(labels, channels, ignore_index)
        shape = [1, -1] + [1] * (input.dim() - 2)
        classes = torch.arange(first, channels, device=labels.device).view(shape)
        values = labels.unsqueeze(1) == classes  # one byte per voxel and class
    else:
        values = labels[:, first:]
    if ignored is not None:
        values = values.masked_fill(ignored, 0)
    return Target(values, ignored, poison, first, labels, is_index)


def read_regions(
    input, target, *, include_background, to_onehot_y, sigmoid, softmax, other_act, ignore_index,
    validate, **others,
) -> tuple[Target, Tensor]:  # fmt: skip
    """Target and probabilities, by the options of a loss."""
    read = read_target(
        input,
        target,
        include_background=include_background,
        to_onehot_y=to_onehot_y,
        ignore_index=ignore_index,
    )
    return read, probabilities(
        input, read, sigmoid=sigmoid, softmax=softmax, other_act=other_act, validate=validate
    )


def probabilities(input, target: Target, *, sigmoid, softmax, other_act, validate) -> Tensor:
    """The input after its activation, (N, C', *), no less than float32; 0 where ignored."""
    if softmax and input.shape[1] == 1:
        raise ValueError("softmax over one channel is 1 everywhere: use sigmoid=True")
    p = _activated(input, sigmoid, softmax, other_act)[:, target.first :]
    if target.ignored is not None:
        p = p.masked_fill(target.ignored, 0)
    activated = bool(sigmoid) or bool(softmax) or other_act is not None
    check_ranges(None if activated else p, None if target.is_index else target.values, validate)
    return p


def overlaps(p, t, *, batch, squared=False, soft_label=False) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the voxels, with `batch` over the items too: of p t, of p and of t."""
    dims = [*([0] if batch else []), *range(2, p.dim())]
    hard = t.dtype == torch.bool
    if hard:
        t = as_bytes(t)
    total_p = sum_over(p.square() if squared else p, dims, p.dtype)
    # The squares of a mask are itself; another byte would overflow in its own.
    total_t = sum_over(t.to(p.dtype).square() if squared and not hard else t, dims,
                       p.dtype)  # fmt: skip
    if soft_label and not squared:
        apart = sum_over((p - t.to(p.dtype)).abs(), dims, p.dtype)
        return 0.5 * (total_p + total_t - apart), total_p, total_t
    return sum_over(p * t, dims, p.dtype), total_p, total_t


def as_bytes(mask: Tensor) -> Tensor:
    """A bool mask, as what torch multiplies, adds and converts several times faster."""
    # A copy under vmap, which knows no view of another type before torch 2.13, and in compiled
    # code: inductor of 2.6 knows none of bool, and forms the copy where it is read.
    copied = torch.compiler.is_compiling() or functorch_active()
    return mask.to(torch.uint8) if copied else mask.view(torch.uint8)


def finished(value, input, target: Target, *, batch, reduction, empty, weight=None) -> Tensor:
    """A loss (N, K), with `batch` (K), reduced; NaN for items at fault, 0 for empty ones."""
    if target.poison is not None:
        value = value * (target.poison.amax(0) if batch else target.poison)
    if empty == "zero":
        value = torch.where(_counted(input, target.ignored, batch), value, 0.0)
    if weight is not None:
        value = value * weight.to(value.dtype)
    if reduction == "none":
        return value
    nothing = empty == "zero" and value.numel() == 0
    return value.sum() if reduction == "sum" or nothing else value.mean()


def check_ranges(p: Tensor | None, t: Tensor | None, validate: bool | None) -> None:
    """That predictions and targets lie in [0, 1]; None: nothing to look at."""

    def beyond(x: Tensor | None) -> bool:
        if x is None or x.dtype == torch.bool or torch.compiler.is_compiling():
            return False
        return (bool(validate) if validate is not None else can_look(x)) and outside(bounds(x))

    if beyond(t):
        low, high = bounds(t)
        raise ValueError(
            f"target must lie in [0, 1], got values from {low:g} to {high:g}: divide a mask of 0 "
            "and 255 by 255, or compare it (target > 0); validate=False lets anything pass"
        )
    if beyond(p):
        message = (
            "input has values outside [0, 1]: for logits set sigmoid=True or softmax=True; "
            "validate=False lets anything pass"
        )
        if validate:
            raise ValueError(message)
        warn(message)


def _counted(input: Tensor, ignored: Tensor | None, batch: bool) -> Tensor:
    """(N, 1), with batch (1): whether there is a voxel that counts."""
    items = input.shape[0]
    if ignored is None:
        some = math.prod(input.shape[2:]) > 0 and (items > 0 or not batch)
        return torch.full((1,) if batch else (items, 1), some, device=input.device)
    found = ~ignored.flatten(1).all(1, keepdim=True)
    return found.any(0) if batch else found


def sum_over(values, dims, dtype):
    # sum(dim=[]) would be the sum over everything.
    return values.sum(dims, dtype=dtype) if dims else values.to(dtype)


def _activated(input, sigmoid, softmax, other_act):
    if softmax:
        return torch.softmax(input, 1, dtype=accumulator_dtype(input.dtype))
    input = input.to(accumulator_dtype(input.dtype))
    if sigmoid:
        return torch.sigmoid(input)
    return input if other_act is None else other_act(input)


def checked_channels(input) -> int:
    checks.check_tensor("input", input)
    if input.dim() < 2:
        raise ValueError(f"input must have shape (N, C, *), got {list(input.shape)}")
    checks.check_supported("soft_dice_loss", input)
    if input.shape[1] == 0:
        raise ValueError(f"input has no channels: shape {list(input.shape)}")
    return input.shape[1]


def split_target(input, target, to_onehot_y) -> tuple[Tensor, bool]:
    """(labels, whether they are class indices): indices as (N, *), the rest as (N, C, *)."""
    checks.check_tensor("target", target)
    checks.check_device("target", target, input)
    one = (input.shape[0], 1, *input.shape[2:])
    flat = (input.shape[0], *input.shape[2:])
    if to_onehot_y is not None:
        to_onehot_y = bool(to_onehot_y)  # numpy's too
    if input.shape[1] == 1:  # a mask, whatever to_onehot_y says
        if target.shape not in (one, flat):
            raise ValueError(_shape_message(input, target))
        return target.view(one) if target.shape == one else target.unsqueeze(1), False
    if target.shape == input.shape and not to_onehot_y:
        return target, False
    if target.shape not in (one, flat) or to_onehot_y is False:
        raise ValueError(_shape_message(input, target))
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise RuntimeError(
            "expected target with class indices to have an integer dtype such as Long, but got "
            f"{checks.scalar_name(target.dtype)}"
        )
    return target.squeeze(1) if target.shape == one else target, True


def _shape_message(input, target) -> str:
    return (
        "target must have the shape of input, or hold class indices of shape (N, *) or (N, 1, *); "
        f"got input {list(input.shape)} and target {list(target.shape)}"
    )


def _as_channel(labels, input):
    return labels if labels.dim() == input.dim() else labels.unsqueeze(1)


def _checked_classes(labels, channels, ignore_index) -> Tensor | None:
    """Raises on the CPU; where that would need a synchronisation, NaN for the items at fault."""
    raises = can_look(labels)
    if raises and ignore_index is None and labels.numel():
        # One pass and no mask, the usual way out.
        low, high = (int(v) for v in torch.aminmax(labels))
        if low >= 0 and high < channels:
            return None
    bad = (labels < 0) | checks.at_least(labels, channels)
    if ignore_index is not None:
        bad &= ~checks.equals(labels, ignore_index)
    if raises:
        if bad.any():
            raise IndexError(f"Target {int(labels[bad][0])} is out of bounds.")
        return None
    poison = torch.full((), torch.nan, device=labels.device)
    return torch.where(bad.flatten(1).any(1), poison, 1.0).unsqueeze(1)


def checked_weight(weight, classes, input) -> Tensor | None:
    if weight is None:
        return None
    given = isinstance(weight, Tensor)
    if not given:
        numbers = checked_weights(weight)
        several = isinstance(numbers, list)
        values = numbers if several else [numbers]
        weight = constants(values, accumulator_dtype(input.dtype), input.device)
        weight = weight if several else weight[0]
    checks.check_device("weight", weight, input)
    if weight.dim() > 1 or (weight.dim() == 1 and weight.shape[0] != classes):
        raise ValueError(
            f"weight must be one number or one for each of the {classes} classes that count, got "
            f"shape {list(weight.shape)}"
        )
    # A tensor on another device, or in compiled code, is not looked into: that would synchronise.
    if given and can_look(weight):
        if (weight < 0).any():
            raise ValueError(f"weight must be >= 0, got {weight.min().item()}")
    return weight
