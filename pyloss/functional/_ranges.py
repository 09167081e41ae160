"""Probabilities and masks lie in [0, 1]: what is said where logits or masks of 0 and 255 do not.

On the CPU alone, outside of graphs and transforms: elsewhere a look at the numbers would have to
wait for a device, or cannot be had.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor

from pyloss.ops._shards import is_dtensor
from pyloss.ops._transforms import is_transformed

Bounds = tuple[float, float]
_SLACK = 1e-3  # what a resize or the rounding of a half type may add to a probability


def warn(message: str) -> None:
    """A UserWarning at the line that called into pyloss, through a module or not; Python shows one
    of each text and line. Nothing while compiling."""
    if torch.compiler.is_compiling():
        return
    level, frame = 1, sys._getframe()
    while frame is not None and _of_a_package(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _of_a_package(module: str) -> bool:
    return module.partition(".")[0] in ("pyloss", "torch")


def can_look(x: Tensor) -> bool:
    """Whether the numbers can be read without waiting for them."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed(x))


def bounds(x: Tensor) -> Bounds:
    """Smallest and largest value; waits for the device. Of DTensors nobody looks at them."""
    if x.numel() == 0 or x.dtype == torch.bool or is_dtensor(x):
        return 0.0, 1.0
    x = x.detach()
    if x.dtype == torch.float32:
        # The bits of numbers >= 0 are in their order, and integers are compared twice as fast.
        low, high = torch.aminmax(x.view(torch.int32))
        if low >= 0:
            return float(low.view(x.dtype)), float(high.view(x.dtype))
    return float(x.amin()), float(x.amax())  # on the CPU aminmax takes longer than the two


def outside(found: Bounds) -> bool:
    """False for NaN, which others report."""
    return found[0] < -_SLACK or found[1] > 1 + _SLACK


def warn_of_scales(input: Tensor, activated: bool, target: Tensor, of_target: Bounds) -> None:
    """Of logits, and of a mask of 0 and 255, beside the other image in [0, 1].

    Two images that both leave [0, 1] are a pair like any other, such as heights; but a uint8 target
    beside floats is a mask.
    """
    beyond_y = outside(of_target)
    beyond_x = not activated and outside(bounds(input))
    if beyond_x and beyond_y and (target.dtype != torch.uint8 or not input.is_floating_point()):
        return
    if beyond_x:
        warn(
            "input has values outside [0, 1], target does not: the loss takes probabilities; for "
            "logits give activation='sigmoid' or 'softmax'"
        )
    if beyond_y:
        warn(
            "target has values outside [0, 1], input does not: a mask of 0 and 255 must be divided "
            "by 255, or compared (target > 0)"
        )


def warn_of_bytes(target: Tensor) -> None:
    """Of a mask of 0 and 255, whatever the dtype; waits for the device."""
    if target.dtype == torch.bool or target.numel() == 0:
        return
    high = target == 255
    if bool(high.any()) and bool((high | (target == 0)).all()):
        warn(
            "target is a mask of 0 and 255 and probabilities lie in [0, 1]: divide it by 255, or "
            "compare it (target > 0)"
        )
