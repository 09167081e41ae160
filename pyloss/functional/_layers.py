"""Checks of a linear layer and of the labels of its rows, whole or split over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from pyloss.functional import _checks as checks
from pyloss.functional._checks import is_dtensor as is_dtensor
from pyloss.functional._rows import FLOAT_STATS
from pyloss.ops import linear_cross_entropy as op
from pyloss.ops._labels import wide

STRATEGIES = ("auto", "forward", "recompute", "tiles")


def checked_settings(chunk, strategy, accumulate_dtype, filter, reduction, return_stats):
    if chunk != "auto":
        rows = checks.as_integer(chunk)
        if rows is None:
            raise TypeError(f"chunk must be 'auto' or a number of rows, got {chunk!r}")
        chunk = rows
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
    checks.check_one_of("strategy", strategy, STRATEGIES)
    if strategy == "forward" and reduction == "none":
        raise ValueError("strategy='forward' needs a scalar reduction, got 'none'")
    if strategy == "forward" and any(s in FLOAT_STATS for s in return_stats):
        raise ValueError("strategy='forward' cannot return differentiable statistics")
    if accumulate_dtype not in (None, torch.float32):
        raise ValueError(f"accumulate_dtype must be None or torch.float32, got {accumulate_dtype}")
    if filter is not None:
        checks.check_range("filter", filter, 0.0, open_low=True)
    if filter is not None and strategy not in ("auto", "tiles"):
        raise ValueError(f"filter needs strategy 'auto' or 'tiles', got {strategy!r}")
    tiles = filter if filter is not None else 0.0 if strategy == "tiles" else None
    exact = accumulate_dtype is not None
    return op.Settings(0 if chunk == "auto" else chunk, strategy, exact, tiles)


def checked_layer(input, weight, bias):
    """(input, linear_weight, linear_bias) of shapes and dtypes that fit, cast under autocast."""
    for name, t in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if t is not None or name != "linear_bias":
            checks.check_tensor(name, t)
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {weight.dim()}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {weight.shape[-1]}, respectively"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}"
        )
    checks.check_supported("fused_linear_cross_entropy", input)
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None:
            checks.check_device(name, t, input)
    if checks.autocast_on(input) and input.dtype != torch.float64:
        # The weight stays as it is: the op casts it, and gives its gradient in its own dtype.
        return input.to(torch.get_autocast_dtype(input.device.type)), weight, bias
    for name, t in (("linear_weight", weight), ("linear_bias", bias)):
        if t is not None and t.dtype != input.dtype:
            raise RuntimeError(
                f"expected input and {name} to have the same dtype, but got: "
                f"{checks.scalar_name(input.dtype)} and {checks.scalar_name(t.dtype)}"
            )
    return input, weight, bias


def checked_shift(shift, lead) -> int:
    shift = int(checks.checked_integer("shift", shift))
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    if shift and not lead:
        raise ValueError("shift needs a sequence dimension, (..., T, D), but input has 1 dimension")
    if shift and shift >= lead[-1]:
        raise ValueError(f"shift must be less than the sequence length {lead[-1]}, got {shift}")
    return shift


def check_target_shape(target, lead, classes) -> None:
    """What the check of the flattened target could not name."""
    tensors = [target] if isinstance(target, Tensor) else []
    if isinstance(target, tuple):
        tensors = [t for t in target[:2] if isinstance(t, Tensor)]
    for t in tensors:
        expected = (*lead, classes) if t.is_floating_point() else lead
        if tuple(t.shape) == expected:
            continue
        if t.is_floating_point() and len(lead) < 2:
            raise RuntimeError(
                "Expected floating point type for target with class probabilities to have the "
                f"shape {list(expected)}, got {list(t.shape)}"
            )
        if len(lead) > 1:
            raise RuntimeError(
                f"expected input with dimensionality 1 or 2, got {len(lead) + 1}, or a target of "
                f"shape {list(expected)} to go with it, got {list(t.shape)}"
            )
        if tuple(t.shape) == (*lead, classes):
            raise RuntimeError(
                "Expected floating point type for target with class probabilities, got "
                f"{checks.scalar_name(t.dtype)}"
            )
        if len(lead) == 1 and t.dim() and t.shape[0] == lead[0]:
            raise RuntimeError(f"Expected target size {list(expected)}, got {list(t.shape)}")
        size = t.shape[0] if t.dim() else 1
        batch = lead[0] if lead else 1
        raise ValueError(
            f"Expected input batch_size ({batch}) to match target batch_size ({size})."
        )


# --------------------------------------------------------------------------------------------------
# Shifted labels


def shifted(x: Tensor, shift: int, fill) -> Tensor:
    """x[..., t + shift] at t, and `fill` at the end: the hidden states need no slice, no copy."""
    if not shift:
        return x
    moved = torch.full_like(x, fill)
    moved[..., : x.shape[-1] - shift] = x[..., shift:]
    return moved


def unshifted(x: Tensor, shift: int) -> Tensor:
    return x[..., : x.shape[-1] - shift] if shift else x


def flat_labels(target, lead, shift, ignore_index):
    """Labels, or a MixUp tuple, one entry for each row."""

    def flat(labels):
        if not isinstance(labels, Tensor):
            return labels  # to be refused by name
        if shift:  # a narrow dtype has no room for every ignore_index
            labels = wide(labels)
        return shifted(labels, shift, ignore_index).reshape(-1)

    if not isinstance(target, tuple) or len(target) != 3:
        return flat(target) if isinstance(target, Tensor) else target
    y, y2, lam = target
    if isinstance(lam, Tensor) and lam.dim():
        try:
            lam = lam.expand(lead)
        except RuntimeError:
            raise RuntimeError(
                f"lam of shape {list(lam.shape)} does not broadcast to the labels' {list(lead)}"
            ) from None
        lam = shifted(lam, shift, 0.0).reshape(-1)
    return flat(y), flat(y2), lam
